"""DM-Align's alignment forces (paper Eq. 6 and 7): the fake model's estimate of a preferred sample against that of the student's own.

Both are read as differences of *denoised estimates*, as DMD's own gradient is. The literal difference of scores at two points
would also subtract the points themselves and push away from the preferred sample (docs/errata.md). The graph reaches the student
through the last step of its rollout; `Stage.rollout.through = "trajectory"` reaches through all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from instep.diffusion.advantage import top_n
from instep.diffusion.levels import LevelSampler, Uniform
from instep.diffusion.path import broadcast
from instep.diffusion.rollout import Where
from instep.methods.term import Force, Need, View, as_force, scalar_per_sample

# mean|x - x0_fake| can vanish at small levels; below this the direction is not amplified further
SCALE_FLOOR = 1e-3

Sign = Literal["pull", "signed", "printed"]


def align_direction(x: Tensor, estimate: Tensor, preferred: Tensor) -> Tensor:
    """[x0_fake(F(x)) - x0_fake(F(x_plus))] / mean|x - x0_fake(F(x))| per sample; all [B, ...]; descending it moves x to x_plus."""
    return (estimate - preferred) / scalar_per_sample((x - estimate).abs()).clamp(min=SCALE_FLOOR)


def group_factor(advantage: Tensor, sign: Sign) -> Tensor:
    """The factor on `align_direction` [B]: the weight and sign of each sample's pull to the preferred mean.

    `signed`: -A, as the text below Eq. 7 describes (low samples move to the preferred mean, high ones away from it);
    `pull`: max(-A, 0), only the low ones move; `printed`: +A, Eq. 7 to the letter, which lowers the reward.

    The pull has a part that all samples of a group share: the preferred mean is an average, so its estimate is paler than any sample's. This part
    cancels under `signed`, because advantages sum to zero; under `pull` it adds up, and samples fade (docs/results.md).
    """
    if sign == "signed":
        return -advantage
    if sign == "pull":
        return (-advantage).clamp(min=0)
    if sign == "printed":
        return advantage
    raise ValueError(f"sign: {sign!r} is not known; allowed: pull, signed, printed")


@dataclass(frozen=True, kw_only=True)
class AlignPair(Force):
    """DM-PairLoss (Eq. 6): toward the fake's estimate of a preferred real sample of the same prompt; same level, same noise."""

    name: str = "pair"
    on: Where = "final"
    levels: LevelSampler = field(default_factory=Uniform)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"preferred"})

    @torch.no_grad()
    def __call__(self, view: View) -> Tensor:
        samples = view.samples
        point = samples.point(self.on).detach()
        assert view.batch.real is not None, "Pair needs preferred samples in the batch"
        preferred = view.batch.real.repeat_interleave(samples.group, 0)
        t = view.levels(self.levels, len(point.x), point.level).to(point.x.dtype)
        noise = view.randn_like(point.x)
        # one call of 2 B samples: the student's and the preferred ones
        x_t = torch.cat([view.path.renoise(x, noise, t) for x in (point.x, preferred)])
        cond = samples.cond.at_exit(point.exit_id)
        own, other = view.roles["fake"](x_t, torch.cat([t, t]), cond.stack(cond)).x0.chunk(2)
        return as_force(align_direction(point.x, own, other))


@dataclass(frozen=True, kw_only=True)
class AlignGroup(Force):
    """DM-GroupLoss (Eq. 7): group advantage times the pull toward the fake's estimate of the mean of the group's `top_n` best.

    Level and noise are shared within a group, so that all its samples are compared with one noised mean. The advantage is not clipped,
    and the normalisation comes before it: after it the advantage would cancel.
    """

    name: str = "group"
    on: Where = "final"
    top_n: int = 2
    sign: Sign = "signed"
    levels: LevelSampler = field(default_factory=Uniform)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reward"})

    @torch.no_grad()
    def __call__(self, view: View) -> Tensor:
        samples = view.samples
        point, k = samples.point(self.on).detach(), samples.group
        assert samples.reward is not None and samples.advantage is not None
        best = top_n(samples.reward, k, self.top_n)
        mean = point.x[best].mean(1)
        t = view.levels(self.levels, len(best), point.level[::k]).to(point.x.dtype)
        noise = view.randn_like(mean)
        t_each, noise_each = t.repeat_interleave(k), noise.repeat_interleave(k, 0)
        x_t = torch.cat([view.path.renoise(point.x, noise_each, t_each), view.path.renoise(mean, noise, t)])
        cond = samples.cond.at_exit(point.exit_id)
        estimates = view.roles["fake"](x_t, torch.cat([t_each, t]), cond.stack(cond[slice(None, None, k)])).x0
        own, preferred = estimates[: len(point.x)], estimates[len(point.x) :].repeat_interleave(k, 0)
        factor = group_factor(samples.advantage, self.sign)
        return as_force(broadcast(factor, own) * align_direction(point.x, own, preferred))
