"""Distribution matching as a force (DMD Eq. 7, DMD2; DM-Align Eq. 3; AMD Eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from instep.diffusion.guidance import guided_by, halves, predict_guided, scale_at
from instep.diffusion.levels import LevelSampler, Uniform
from instep.diffusion.prediction import Prediction, at_scale
from instep.diffusion.rollout import Point, Where
from instep.methods.adapted_teacher import Annealed
from instep.methods.operators import Displacements, Operator, Standard, relative
from instep.methods.term import NOTHING, Force, Need, View, as_force, scalar_per_sample

# mean|x - x0_real| can vanish (a sample the teacher returns unchanged); below this the direction is not amplified further
SCALE_FLOOR = 1e-3


@dataclass(frozen=True)
class Matching:
    """One evaluation of the matching force with everything that went into it, [B, ...] each (DM-Align, Fig. 5).

    `direction` is normalised to a mean of one per unit of |x - x0_real|; `target` = x - direction is the target of
    the surrogate regression.
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

    x0_real is the teacher's prediction with `guidance` (w = 1 is none; `guidance_2` of a second expert), x0_fake the fake's without, conditioned on the exit
    if the role is. All in float32: casting the predictions back to half precision before the difference costs 2 to 24 % of it.

    `ca_levels` gives the guidance term (w - 1)(d_cond - d_uncond) levels and noise of its own (Decoupled-DMD); each of the two terms is
    then normalised by the distance to the estimate at its own level. `adapter` adapts the teacher, at a scale that is
    annealed over the stage: its own, or with `adapter_of="fake"` the fake's on the shared backbone (DynaDG in DMDR's released code).
    """

    name: str = "dm"
    on: Where = "exit"
    levels: LevelSampler = field(default_factory=Uniform)
    guidance: float = 1.0
    guidance_2: float | None = None
    operator: Operator = field(default_factory=Standard)
    ca_levels: LevelSampler | None = None
    adapter: Annealed | None = None
    adapter_of: str = "teacher"

    @property
    def second(self) -> float:
        """The guidance of a second expert."""
        return self.guidance if self.guidance_2 is None else self.guidance_2

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reward"}) if self.operator.needs_advantage else NOTHING

    def __call__(self, view: View) -> Tensor:
        return as_force(self.explain(view).direction)

    @torch.no_grad()
    def explain(self, view: View) -> Matching:
        samples = view.samples
        point = samples.point(self.on).detach()
        x = point.x
        t, x_t = self._renoised(view, point, self.levels)
        null = view.batch.null.repeat(samples.group)
        teacher = view.roles["teacher"] if self.adapter is None else at_scale(view.roles[self.adapter_of], self.adapter.at(view.progress))
        if self.ca_levels is None or self.guidance == self.second == 1:
            w = view.guidance(self.guidance, self.guidance_2)
            here = predict_guided(teacher, x_t, t, samples.cond, null, w)
            real, cond, ca = here.x0, here.cond, here.cond - here.x0
            scale = distance(x, real)
        else:
            t_ca, x_ca = self._renoised(view, point, self.ca_levels)
            # one call of 3 B samples: conditional at the one level, both at the other
            stacked = teacher(torch.cat([x_t, x_ca, x_ca]), torch.cat([t, t_ca, t_ca]), samples.cond.stack(samples.cond).stack(null))
            cond = stacked.x0[: len(x)]
            cond_ca, uncond_ca = halves(Prediction(stacked.x0[len(x) :], stacked.v[len(x) :]))
            scale = distance(x, cond)
            # each term in the units of its own level: divided by `scale` below, this is its own normalisation
            w_ca = scale_at(view.guidance(self.guidance, self.guidance_2), t_ca, x)
            guided = guided_by(teacher, t_ca, cond_ca, uncond_ca, w_ca).x0
            ca = (cond_ca.x0 - guided) * scale / distance(x, guided)
            real = cond - ca
        fake = view.roles["fake"](x_t, t, samples.cond.at_exit(point.exit_id)).x0
        d = Displacements(x - real, x - fake, fake - cond, ca)
        reward = relative(samples.reward, view.ranks) if self.operator.reads_reward and samples.reward is not None else None
        return Matching(x, t, real, fake, self.operator(d, samples.advantage, reward) / scale)

    def _renoised(self, view: View, point: Point, levels: LevelSampler) -> tuple[Tensor, Tensor]:
        t = view.levels(levels, len(point.x), point.level).to(point.x.dtype)
        return t, view.path.renoise(point.x, view.randn_like(point.x), t)


def distance(x: Tensor, estimate: Tensor) -> Tensor:
    """mean|x - x0_hat| per sample, floored, shaped to divide x: what DMD normalises a direction by."""
    return scalar_per_sample((x - estimate).abs()).clamp(min=SCALE_FLOOR)
