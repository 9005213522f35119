"""Roles: named denoisers on backbones. A role is a full copy of the network, or a LoRA adapter on a shared frozen one.

One hazard decides the design: with activation checkpointing the blocks run again *during backward*, under whatever adapter is
active then. So everything that a forward depends on besides its arguments (adapter, scale, condition) is one frozen `CallContext`, set
for the forward and set again for its recomputation. What a forward leaves behind besides its result (features for a head) is asked
for by the same `CallContext`, and not asked for again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from instep.prediction import Condition, Prediction, PredictionType, to_prediction
from instep.strengths import GuidanceEmbedding, GuidanceRange

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
class CallContext:
    """What a forward depends on besides its arguments. The output of the family's feature block is put into `features`, if given.

    Blocks whose numbers are in `skips` pass on what they are given.
    """

    adapter: str | None
    scale: float
    cond: Condition
    exits: nn.Embedding | None
    features: list[Tensor] | None = None
    skips: tuple[int, ...] = ()
    guidance_embedding: GuidanceEmbedding | None = None


class ActiveCall:
    """A context that can be entered again: a graph that is kept for a second backward recomputes under the same one."""

    def __init__(self, backbone: Backbone, call: CallContext) -> None:
        self.backbone, self.call = backbone, call
        self._before: list[tuple[CallContext | None, AbstractContextManager[None]]] = []

    def __enter__(self) -> None:
        skipped = self.backbone.family.skip(self.backbone.module, self.call.skips) if self.call.skips else nullcontext()
        skipped.__enter__()
        self._before.append((self.backbone.switch(self.call), skipped))

    def __exit__(self, *error: object) -> None:
        before, skipped = self._before.pop()
        self.backbone.switch(before)
        skipped.__exit__(None, None, None)


class Head(nn.Module):
    """How real a noised sample looks, from the tokens [B, N, width] of its role's features: a logit [B], in float32.

    DMD2 (Sec. 4.3) reads the fake score's features in the same way. The tokens are scored before they are averaged: a flaw in a few of
    them would be lost in the mean token. The last layer starts at zero, so the first logits are 0.
    """

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        # without a scale of its own: the layer after it has one
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.hidden = nn.Linear(width, hidden, dtype=torch.float32)
        self.logit = nn.Linear(hidden, 1, dtype=torch.float32)
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logit(nn.functional.silu(self.hidden(self.norm(tokens.float()))).mean(1)).squeeze(1)


class Backbone:
    """A network of a family that one or several roles run on."""

    def __init__(self, family: Family, module: nn.Module, *, checkpointing: bool = False) -> None:
        self.family, self.module = family, module
        self._call: CallContext | None = None
        self._adapters: dict[str, LoRA] = {}
        self._watched = False
        family.prepare(module, lambda: self._call and self._call.cond)
        for embedder in family.time_embedders(module):
            embedder.register_forward_hook(self._condition_time)
        if checkpointing:
            module.enable_gradient_checkpointing(self._checkpointed)

    def __deepcopy__(self, memo: dict) -> Self:
        # a copy of the module copies its hooks, which would otherwise copy this object and with it the whole pipeline
        return self

    def active_call(self, call: CallContext) -> ActiveCall:
        """Adapter, scale and condition of `call` for everything inside."""
        return ActiveCall(self, call)

    def switch(self, call: CallContext | None) -> CallContext | None:
        """`call` (None: the module runs outside any role) takes the place of the one that is returned."""
        before, self._call = self._call, call
        if call is not None:
            self._activate(call)
        return before

    def _activate(self, call: CallContext) -> None:
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
        with warnings.catch_warnings():
            # student and fake are two adapters on one module: meant, and peft asks whether it is
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
            inject_adapter_in_model(config, self.module, adapter_name=name)
        self._adapters[name] = lora
        for layer in self._lora_layers():
            layer.set_requires_grad(list(self._adapters), True)

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        return {key: p for key, p in self.module.named_parameters() if f".{name}." in key and "lora_" in key}

    def _condition_time(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """The time embedding with what the running role is told besides: the exit, guidance scales."""
        call = self._call
        if call is not None and call.exits is not None and call.cond.exit_id is not None:
            output = output + call.exits(call.cond.exit_id).to(output.dtype)
        if call is not None and call.guidance_embedding is not None and call.cond.guidance_scales is not None:
            output = output + call.guidance_embedding(call.cond.guidance_scales).to(output.dtype)
        return output

    def watch_features(self) -> None:
        """From now on a `CallContext` can ask for features; a backbone without heads has no hook for them."""
        if not self._watched:
            self.family.feature_block(self.module).register_forward_hook(self._keep_features)
            self._watched = True

    def _keep_features(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self._call is not None and self._call.features is not None:
            self._call.features.append(output)

    def _checkpointed(self, block: Callable, *args) -> Tensor:
        assert self._call is not None, "a checkpointed backbone is trained through a role"
        # the features of the forward carry the graph; those of the recomputation would belong to nobody and, kept by the graph that
        # they are part of, would never be freed
        recomputed = replace(self._call, features=None)
        return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), self.active_call(recomputed)))


class Role:
    """A named denoiser: backbone + adapter + scale (+ an exit embedding, + a discriminator head, + an embedding of guidance scales). Calling it gives a
    `Prediction` in float32, its output read as `prediction_type` (the family's by default).

    A role with an adapter owns that adapter's parameters, a full copy owns its whole backbone; the teacher owns none to train. A head is
    evaluated in every call, whether its logit is used or not: next to the backbone it is tiny.
    """

    def __init__(
        self,
        name: str,
        backbone: Backbone,
        *,
        adapter: str | None = None,
        scale: float = 1.0,
        exits: int | None = None,
        head: bool = False,
        prediction_type: PredictionType | None = None,
        guidance_range: GuidanceRange | None = None,
    ) -> None:
        self.name, self.backbone, self.adapter, self.scale = name, backbone, adapter, scale
        self.prediction_type = prediction_type or backbone.family.prediction_type
        self.skips: tuple[int, ...] = ()
        self.exits: nn.Embedding | None = None
        self.head: Head | None = None
        self.guidance_embedding: GuidanceEmbedding | None = None
        device = next(backbone.module.parameters()).device
        if exits is not None:
            self.exits = nn.Embedding(exits, backbone.family.time_width(backbone.module)).to(device)
            # zero: the fake starts as exactly the teacher
            nn.init.zeros_(self.exits.weight)
        if head:
            backbone.watch_features()
            self.head = Head(backbone.family.feature_width(backbone.module)).to(device)
        if guidance_range is not None:
            self.guidance_embedding = GuidanceEmbedding(guidance_range, backbone.family.time_width(backbone.module)).to(device)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        family, module = self.backbone.family, self.backbone.module
        features: list[Tensor] | None = None if self.head is None else []
        with self.backbone.active_call(CallContext(self.adapter, self.scale, cond, self.exits, features, self.skips, self.guidance_embedding)):
            raw = family.forward(module, x_t, t, cond)
        answer = to_prediction(self.prediction_type, raw, family.path, x_t, t)
        if self.head is None or features is None:
            return answer
        (tokens,) = features
        return replace(answer, logit=self.head(tokens))

    def scaled(self, scale: float) -> Role:
        """The same role with its adapter at `scale`."""
        if self.adapter is None:
            raise ValueError(f"role {self.name!r} has no adapter to scale; give it a LoRA")
        other = copy(self)
        other.scale = scale
        return other

    def skipping(self, blocks: Sequence[int]) -> Role:
        """The same role without the blocks of these numbers: each passes on what it is given."""
        other = copy(self)
        other.skips = tuple(blocks)
        return other

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What this role owns: its adapter's parameters or its full copy, its exit embedding, its head and its guidance embedding."""
        backbone = self.backbone
        own = backbone.adapter_parameters(self.adapter) if self.adapter else dict(backbone.module.named_parameters())
        if self.exits is not None:
            own |= {"exits.weight": self.exits.weight}
        if self.head is not None:
            own |= {f"head.{key}": p for key, p in self.head.named_parameters()}
        if self.guidance_embedding is not None:
            own |= {f"guidance_embedding.{key}": p for key, p in self.guidance_embedding.named_parameters()}
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
            if p.shape != state[key].shape:
                raise ValueError(
                    f"state of role {self.name!r}: {key} is {tuple(state[key].shape)} there and {tuple(p.shape)} here; start from a run of the same model, "
                    "with as many steps (the fake knows each exit) and the same LoRA rank"
                )
        for key, p in own.items():
            p.copy_(state[key])
