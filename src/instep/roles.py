"""Roles: named denoisers on backbones. A role is a full copy of the network, or a LoRA adapter on a shared frozen one.

One hazard decides the design: with activation checkpointing the blocks run again *during backward*, under whatever adapter is
active then. So everything that a forward depends on besides its arguments (adapter, scale, condition) is one frozen `Call`, set
for the forward and set again for its recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from instep.prediction import Condition, Prediction, read

if TYPE_CHECKING:
    from instep.models.base import Family


@dataclass(frozen=True)
class LoRA:
    """A low-rank adapter in place of a full copy; the effective scale is alpha / rank."""

    rank: int = 32
    alpha: float = 32.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora_rank: {self.rank} is not allowed; 1 or more, 4 to 128 are usual")


@dataclass(frozen=True)
class Call:
    """What a forward depends on besides its arguments."""

    adapter: str | None
    scale: float
    cond: Condition
    exits: nn.Embedding | None


class Backbone:
    """A network of a family that one or several roles run on."""

    def __init__(self, family: Family, module: nn.Module, *, checkpointing: bool = False) -> None:
        self.family, self.module = family, module
        self._call: Call | None = None
        self._adapters: dict[str, LoRA] = {}
        family.prepare(module, lambda: self._call and self._call.cond)
        family.time_embedder(module).register_forward_hook(self._add_exit)
        if checkpointing:
            module.enable_gradient_checkpointing(self._checkpointed)

    @contextmanager
    def running(self, call: Call) -> Iterator[None]:
        """Adapter, scale and condition of `call` for everything inside."""
        before, self._call = self._call, call
        self._activate(call)
        try:
            yield
        finally:
            self._call = before
            if before is not None:
                self._activate(before)

    def _activate(self, call: Call) -> None:
        if not self._adapters:
            return
        for layer in self._lora_layers():
            layer.set_adapter([call.adapter] if call.adapter else [])
            # PEFT switches requires_grad with the active adapter; here every adapter stays what it was made to be
            layer.set_requires_grad(list(self._adapters), True)
            if call.adapter:
                layer.set_scale(call.adapter, call.scale)

    def _lora_layers(self) -> list:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [layer for layer in self.module.modules() if isinstance(layer, BaseTunerLayer)]

    def add_adapter(self, name: str, lora: LoRA) -> None:
        """A new adapter that starts as the identity; the base weights are frozen."""
        from peft import LoraConfig, inject_adapter_in_model

        if not self._adapters:
            self.module.requires_grad_(False)
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(self.family.lora_targets), init_lora_weights=True)
        inject_adapter_in_model(config, self.module, adapter_name=name)
        self._adapters[name] = lora
        for layer in self._lora_layers():
            layer.set_requires_grad(list(self._adapters), True)

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        return {key: p for key, p in self.module.named_parameters() if f".{name}." in key and "lora_" in key}

    def _add_exit(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        call = self._call
        if call is None or call.exits is None or call.cond.exit_id is None:
            return output
        return output + call.exits(call.cond.exit_id).to(output.dtype)

    def _checkpointed(self, block: Callable, *args) -> Tensor:
        call = self._call
        assert call is not None, "a checkpointed backbone is trained through a role"
        return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), self.running(call)))


class Role:
    """A named denoiser: backbone + adapter + scale (+ an exit embedding). Calling it gives a `Prediction` in float32.

    A role with an adapter owns that adapter's parameters, a full copy owns its whole backbone; the teacher owns none to train.
    """

    def __init__(
        self, name: str, backbone: Backbone, *, adapter: str | None = None, scale: float = 1.0, exits: int | None = None
    ) -> None:
        self.name, self.backbone, self.adapter, self.scale = name, backbone, adapter, scale
        self.exits: nn.Embedding | None = None
        if exits is not None:
            device = next(backbone.module.parameters()).device
            self.exits = nn.Embedding(exits, backbone.family.time_width(backbone.module)).to(device)
            # zero: the fake starts as exactly the teacher
            nn.init.zeros_(self.exits.weight)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        family, module = self.backbone.family, self.backbone.module
        with self.backbone.running(Call(self.adapter, self.scale, cond, self.exits)):
            raw = family.forward(module, x_t, t, cond)
        return read(family.parameterisation, raw, family.path, x_t, t)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What this role owns: its adapter's parameters or its full copy, and its exit embedding."""
        backbone = self.backbone
        own = backbone.adapter_parameters(self.adapter) if self.adapter else dict(backbone.module.named_parameters())
        if self.exits is not None:
            own |= {"exits.weight": self.exits.weight}
        return own

    def state(self) -> dict[str, Tensor]:
        return {key: p.detach() for key, p in self.named_parameters().items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        own = self.named_parameters()
        if own.keys() != state.keys():
            wrong = sorted(own.keys() ^ state.keys())[:3]
            raise ValueError(f"state of role {self.name!r}: {len(wrong)} or more tensors do not fit, for example {wrong}; was it saved by another recipe?")
        for key, p in own.items():
            p.copy_(state[key])
