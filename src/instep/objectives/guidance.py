"""Guidance distillation: the student's single forward pass learns what its own teacher says with guidance (Diffusion-APO Eq. 3 and 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from instep.levels import LevelSampler, Uniform
from instep.prediction import Denoiser, guide_and_skip, skipping
from instep.terms import Need, Objective, View


@dataclass(frozen=True, kw_only=True)
class GuidanceDistillation(Objective):
    """mean |v_student(x_t, c) - v_guided(x_t, c)|^2 on real samples noised to `levels`; the sampling schedule stays as it is.

    v_guided = u + guidance (c - u) + strength (c - skipped), of the student as it was when the stage began (role `reference`), where `skipped` is its
    prediction without the blocks `blocks` of its network. Three evaluations become one. The paper's omega is guidance - 1, its lambda `strength`.

    Both strengths are fixed. The paper draws them (Eq. 4) and does not say how the student is told: a student that is not told learns their mean,
    which is the guided prediction at mean strengths, since that is linear in them.
    """

    name: str = "guidance"
    guidance: float = 3.0
    strength: float = 0.0
    blocks: tuple[int, ...] = ()
    levels: LevelSampler = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise ValueError(f"skip: {self.strength} is not allowed; 0 (no skip-layer guidance) or more")
        if self.strength and not self.blocks:
            raise ValueError(f"skip_blocks: none, and skip-layer guidance of strength {self.strength:g} compares with a pass without some; name at least one")
        if self.guidance == 1 and not self.strength:
            raise ValueError("guidance: 1 is none, and there is nothing to distil; use more than 1, or skip-layer guidance")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"real", "reference"})

    @property
    def skips(self) -> tuple[int, ...]:
        return self.blocks if self.strength else ()

    def passes(self, group: int, transitions: int = 0) -> tuple[float, float]:
        each = len(self.levels.window) / group  # a real sample a prompt
        return ((2.0 if self.guidance != 1 else 1.0) + (1.0 if self.strength else 0.0)) * each, each

    def __call__(self, view: View) -> Iterator[Tensor]:
        real = view.batch.real
        assert real is not None, "guidance distillation needs real samples in the batch"
        for levels in self.levels.window:
            t = levels(len(real), progress=view.progress, t_exit=None, rng=view.rng).to(real)
            x_t = view.path.renoise(real, view.randn_like(real), t)
            target = self.guided(view.roles["reference"], view, x_t, t)
            yield (view.roles["student"](x_t, t, view.batch.cond).v - target).square().mean()

    @torch.no_grad()
    def guided(self, teacher: Denoiser, view: View, x_t: Tensor, t: Tensor) -> Tensor:
        """The teacher's guided velocity [B, ...]: conditional and unconditional in one stacked call, one more without the blocks."""
        cond, null = view.batch.cond, view.batch.null
        if self.guidance == 1:
            c = u = teacher(x_t, t, cond).v
        else:
            c, u = teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.stack(null)).v.chunk(2)
        without = skipping(teacher, self.blocks)(x_t, t, cond).v if self.strength else c
        return guide_and_skip(c, u, without, self.guidance, self.strength)
