"""Distribution matching as a force (DMD Eq. 7, DMD2; DM-Align Eq. 3; AMD Eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from instep.levels import LevelSampler, Uniform
from instep.matching.operator import Displacements, Operator, Standard
from instep.prediction import predict_guided
from instep.rollout import Where
from instep.terms import Force, View, as_force, scalar_per_sample

# mean|x - x0_real| can vanish (a sample the teacher returns unchanged); below this the direction is not amplified further
SCALE_FLOOR = 1e-3


@dataclass(frozen=True)
class Matching:
    """One evaluation of the matching force with everything that went into it, [B, ...] each (DM-Align, Fig. 5).

    `direction` is normalised to a mean of one per unit of |x - x0_real|; `target` = x - direction is what the surrogate
    regression pulls x to.
    """

    x: Tensor
    level: Tensor
    real: Tensor
    fake: Tensor
    direction: Tensor

    @property
    def target(self) -> Tensor:
        return self.x - self.direction


@dataclass(frozen=True, kw_only=True)
class DistributionMatching(Force):
    """g = H(x - x0_real, x - x0_fake) / mean|x - x0_real| per sample, at a re-noised level.

    x0_real is the teacher's prediction with `guidance` (w = 1 is none), x0_fake the fake's without, told the exit if it is
    conditioned on it. All in float32: casting the predictions back to half precision before the difference costs 2 to 24 % of it.
    """

    name: str = "dm"
    on: Where = "exit"
    levels: LevelSampler = field(default_factory=Uniform)
    guidance: float = 1.0
    operator: Operator = field(default_factory=Standard)

    def __call__(self, view: View) -> Tensor:
        return as_force(self.explain(view).direction)

    @torch.no_grad()
    def explain(self, view: View) -> Matching:
        samples = view.samples
        point = samples.point(self.on).detach()
        x, n = point.x, len(point.x)
        t = self.levels(n, progress=view.progress, t_exit=point.level, rng=view.rng).to(x)
        x_t = view.path.renoise(x, view.randn_like(x), t)
        null = view.batch.null.repeat(samples.group)
        real = predict_guided(view.roles["teacher"], x_t, t, samples.cond, null, self.guidance).x0
        fake = view.roles["fake"](x_t, t, samples.cond.at_exit(point.exit_id)).x0
        d = Displacements(x - real, x - fake)
        scale = scalar_per_sample(d.real.abs()).clamp(min=SCALE_FLOOR)
        return Matching(x, t, real, fake, self.operator(d, samples.advantage) / scale)
