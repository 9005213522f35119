"""Roles: named denoisers on backbones. A role is a full copy of the network, or a LoRA adapter on a shared frozen one.

One hazard decides the design: with activation checkpointing the blocks run again *during backward*, under whatever adapter is
active then. So everything that a forward depends on besides its arguments (adapter, scale, condition) is one frozen `CallContext`, set
for the forward and set again for its recomputation. What a forward leaves behind besides its result (features for a head) is asked
for by the same `CallContext`, and not asked for again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from instep.core.rows import by_rows
from instep.core.shards import assign
from instep.diffusion.guidance import GuidanceRule
from instep.diffusion.guidance_scales import GuidanceRange
from instep.diffusion.prediction import Condition, Denoiser, Prediction, PredictionType, to_prediction
from instep.models.backbone import Backbone, CallContext
from instep.models.discriminator import Head
from instep.models.embeddings import GuidanceEmbedding, check_foldable

if TYPE_CHECKING:
    from instep.models.family import Family


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
        device = backbone.device
        if exits is not None:
            self.exits = nn.Embedding(exits, backbone.family.time_width(backbone.module)).to(device)
            # zero: the fake starts as exactly the teacher
            nn.init.zeros_(self.exits.weight)
        if head:
            backbone.watch_features()
            self.head = Head(backbone.family.feature_width(backbone.module)).to(device)
        if guidance_range is not None:
            check_foldable(backbone.family.time_embedders(backbone.module), backbone.family.name)
            self.guidance_embedding = GuidanceEmbedding(guidance_range, backbone.family.time_width(backbone.module)).to(device)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """A batch of more rows than the family's `micro_batch` is predicted a few rows at a time, with a graph too (see `core/rows.py`)."""
        residency = self.backbone.residency
        parts = by_rows(lambda rows: self._forward(x_t[rows], t[rows], cond[rows]), len(x_t), self.backbone.family.micro_batch, recompute=residency is not None)
        raw, logit = parts[0] if len(parts) == 1 else (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
        assert raw is not None
        return replace(to_prediction(self.prediction_type, raw, self.backbone.family.path, x_t, t), logit=logit)

    def _forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor | None]:
        """The network's raw output, in the dtype that it computes in, and the logit of the head, if there is one."""
        family, module = self.backbone.family, self.backbone.module
        features: list[Tensor] | None = None if self.head is None else []
        if self.backbone.residency is not None:
            self.backbone.residency.use(module)
        if self.backbone.sharded is not None:
            self.backbone.sharded.check(self.name, len(x_t))
        context = self.backbone.context
        x_t = x_t if context is None else context.entered(x_t)
        with self.backbone.active_call(CallContext(self.adapter, self.scale, cond, self.exits, features, self.skips, self.guidance_embedding)):
            raw = family.forward(module, x_t.to(self.backbone.dtype), t, cond)
        if self.head is None or features is None:
            return raw, None
        (tokens,) = features
        return raw, self.head(tokens if context is None else context.gathered(tokens))

    @property
    def guidance_rule(self) -> GuidanceRule | None:
        """The family's."""
        return self.backbone.family.guidance_rule

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
        own = backbone.adapter_parameters(self.adapter) if self.adapter else backbone.own_parameters()
        if self.exits is not None:
            own |= {f"exits.{key}": p for key, p in self.exits.named_parameters()}
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
        self.backbone.go_home()
        for key, p in own.items():
            assign(p, state[key])


def shift_of(denoiser: Denoiser, family: Family) -> float:
    """The timestep shift of the sampler of the model that a role runs on; `family`'s for a denoiser that is no role."""
    return denoiser.backbone.family.shift if isinstance(denoiser, Role) else family.shift
