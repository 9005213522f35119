"""A network that one or several roles run on: its adapters, and the context that each call runs in."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from instep.diffusion.prediction import Condition
from instep.methods.role_config import LoRA
from instep.models.borrow import compute_dtype
from instep.models.context import ContextParallel
from instep.models.embeddings import GuidanceEmbedding
from instep.models.residency import Residency
from instep.models.sharded import Sharded

if TYPE_CHECKING:
    from instep.models.family import Family


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


class Backbone:
    """A network of a family that one or several roles run on."""

    def __init__(
        self, family: Family, module: Any, *, checkpointing: bool = False, trained: Sequence[str] | None = None, residency: Residency | None = None
    ) -> None:
        """`trained`: the parts of the network (of two experts) that roles on it own and adapt; None: all. `residency`: takes the network to the device."""
        self.family, self.module, self.residency = family, module, residency
        self.dtype, self.device = compute_dtype(module), family.device
        self.trained = None if trained is None or set(trained) == set(family.denoisers) else tuple(trained)
        self.sharded: Sharded | None = None
        self.context: ContextParallel | None = None
        self._call: CallContext | None = None
        self._adapters: dict[str, LoRA] = {}
        self._layers: list[Any] = []
        self._active: tuple[str | None, float] | None = None
        self._watched = False
        family.prepare(module, lambda: None if self._call is None else self._call.cond)
        for embedder in family.time_embedders(module):
            embedder.register_forward_hook(self._condition_time)
        if checkpointing:
            module.enable_gradient_checkpointing(self._checkpointed)

    def go_home(self) -> None:
        """Where networks take turns on a device: leaves none there."""
        if self.residency is not None:
            self.residency.clear()

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
            self._activate(call.adapter, call.scale)
        return before

    def _activate(self, adapter: str | None, scale: float) -> None:
        """Makes an adapter the active one; nothing is done if it is, as in every block but the first of those that are computed again."""
        if self._active == (adapter, scale):
            return
        for layer in self._layers:
            layer.set_adapter([adapter] if adapter else [])
            # PEFT switches requires_grad with the active adapter; here every adapter stays what it was made to be
            layer.set_requires_grad(list(self._adapters), True)
            if adapter:
                layer.set_scale(adapter, scale)
        self._active = (adapter, scale)

    def add_adapter(self, name: str, lora: LoRA) -> None:
        """A new adapter that starts as the identity; the base weights are frozen."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        if not self._adapters:
            self.module.requires_grad_(False)
        alpha: Any = lora.alpha  # PEFT divides by it, and takes any number
        config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=self._lora_targets(), init_lora_weights=True)
        with warnings.catch_warnings():
            # student and fake are two adapters on one module: meant, and peft asks whether it is
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
            inject_adapter_in_model(config, self.module, adapter_name=name)
        self._adapters[name] = lora
        self._layers, self._active = [layer for layer in self.module.modules() if isinstance(layer, BaseTunerLayer)], None
        for layer in self._layers:
            for part in (layer.lora_A, layer.lora_B):
                if name in part:
                    part[name].to(layer.weight.device)
            layer.set_requires_grad(list(self._adapters), True)

    def _lora_targets(self) -> list[str] | str:
        """The layers that an adapter touches: names, or where only some parts are trained a pattern."""
        if self.trained is None:
            return list(self.family.lora_targets)
        return rf"({'|'.join(map(re.escape, self.trained))})\..*\b({'|'.join(map(re.escape, self.family.lora_targets))})"

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the trained parts."""
        named = dict(self.module.named_parameters())
        return named if self.trained is None else {key: p for key, p in named.items() if key.split(".")[0] in self.trained}

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        return {key: p for key, p in self.module.named_parameters() if f".{name}." in key and "lora_" in key}

    def _condition_time(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Adds the running role's embeddings of the exit and of guidance scales to the time embedding."""
        call = self._call
        if call is not None and call.exits is not None and call.cond.exit_id is not None:
            output = output + _beside(call.exits(call.cond.exit_id), output)
        if call is not None and call.guidance_embedding is not None and call.cond.guidance_scales is not None:
            output = output + _beside(call.guidance_embedding(call.cond.guidance_scales), output)
        return output

    def watch_features(self) -> None:
        """From now on a `CallContext` can ask for features; a backbone without heads has no hook for them."""
        if not self._watched:
            self.family.feature_block(self.module).register_forward_hook(self._keep_features)
            self._watched = True

    def _keep_features(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self._call is not None and self._call.features is not None:
            self._call.features.append(output)

    def _checkpointed(self, block: nn.Module, *args) -> Tensor:
        assert self._call is not None, "a checkpointed backbone is trained through a role"
        # the features of the forward carry the graph; those of the recomputation would belong to nobody and, kept by the graph that
        # they are part of, would never be freed
        recomputed = replace(self._call, features=None)
        return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), self.active_call(recomputed)))


def _beside(embedding: Tensor, time: Tensor) -> Tensor:
    """An embedding [B, width] shaped to be added to a time embedding, [B, width] or one a token, [B, N, width]."""
    return embedding.to(time.dtype).reshape(len(embedding), *[1] * (time.ndim - 2), -1)
