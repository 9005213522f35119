"""Guidance distillation: the student's single forward pass learns the guided prediction of its own teacher (Diffusion-APO Eq. 3 and 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from instep.diffusion.guidance import guided_by, halves, skip_layers
from instep.diffusion.guidance_scales import GuidanceRange
from instep.diffusion.levels import LevelSampler, Uniform
from instep.diffusion.path import broadcast
from instep.diffusion.prediction import Denoiser, skipping
from instep.methods.term import Need, Objective, View


@dataclass(frozen=True, kw_only=True)
class GuidanceDistillation(Objective):
    """mean |v_student(x_t, c) - v_guided(x_t, c)|^2 on real samples noised to `levels`; the sampling schedule stays as it is.

    v_guided = u + guidance (c - u) + skip_scale (c - skipped), of the student at the beginning of the stage (role `reference`), where `skipped` is
    its prediction without the blocks `blocks` of its network. Three evaluations become one. The paper's omega is guidance - 1, its lambda `skip_scale`.

    Both scales are fixed, or with `draw` drawn for every sample, as in Eq. 4; the student is then conditioned on them (`Condition.guidance_scales`).
    The paper leaves this open: an unconditioned student learns the guided prediction at the mean scales, since the prediction is linear in them.
    """

    name: str = "guidance"
    guidance: float = 3.0
    skip_scale: float = 0.0
    blocks: tuple[int, ...] = ()
    levels: LevelSampler = field(default_factory=Uniform)
    draw: GuidanceRange | None = None

    def __post_init__(self) -> None:
        if self.skip_scale < 0:
            raise ValueError(f"skip: {self.skip_scale} is not allowed; 0 (no skip-layer guidance) or more")
        if self._skip and not self.blocks:
            raise ValueError(f"skip_blocks: none, and skip-layer guidance of scale {self._skip:g} compares with a pass without some; name at least one")
        if not self._guides and not self._skip:
            raise ValueError("guidance: 1 is none, and there is nothing to distil; use more than 1, or skip-layer guidance")

    @property
    def _guides(self) -> bool:
        """Whether the unconditional pass is needed."""
        return (self.guidance != 1) if self.draw is None else self.draw.guidance != (1, 1)

    @property
    def _skip(self) -> float:
        """The largest scale of skip-layer guidance; 0: its pass is not needed."""
        return self.skip_scale if self.draw is None else self.draw.skip[1]

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"real", "reference"})

    @property
    def skips(self) -> tuple[int, ...]:
        return self.blocks if self._skip else ()

    def __call__(self, view: View) -> Iterator[Tensor]:
        real = view.batch.real
        assert real is not None, "guidance distillation needs real samples in the batch"
        for levels in self.levels.window:
            t = view.levels(levels, len(real)).to(real.dtype)
            x_t = view.path.renoise(real, view.randn_like(real), t)
            guidance_scales = None if self.draw is None else self.draw.draw(len(real), view.rng)
            target = self.guided(view.roles["reference"], view, x_t, t, guidance_scales)
            yield (view.roles["student"](x_t, t, view.batch.cond.with_guidance(guidance_scales)).v - target).square().mean()

    @torch.no_grad()
    def guided(self, teacher: Denoiser, view: View, x_t: Tensor, t: Tensor, guidance_scales: Tensor | None = None) -> Tensor:
        """The teacher's guided velocity [B, ...] at each sample's `guidance_scales` [B, 2] (None: the fixed ones); the teacher is not conditioned on them.

        Conditional and unconditional in one stacked call, one more without the blocks.
        """
        cond, null = view.batch.cond.with_guidance(None), view.batch.null
        w, skip_scale = (self.guidance, self.skip_scale) if guidance_scales is None else (broadcast(column, x_t) for column in guidance_scales.unbind(1))
        if self._guides:
            c, u = halves(teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.stack(null)))
            v = guided_by(teacher, t, c, u, w).v
        else:
            c = teacher(x_t, t, cond)
            v = c.v
        return skip_layers(v, c.v, skipping(teacher, self.blocks)(x_t, t, cond).v, skip_scale) if self._skip else v
