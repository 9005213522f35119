"""DM-Align's alignment forces (paper Eq. 6 and 7): the estimate of a preferred sample against that of the student's own.

Both are read as differences of *denoised estimates*, as DMD's own gradient is. The literal difference of scores at two points
would also subtract the points themselves and push away from the preferred sample (docs/errata.md). Every other choice that the
paper leaves open is a field of `Align`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from instep.core.numbers import check_number
from instep.core.ranks import ALONE, Ranks
from instep.diffusion.advantage import top_n
from instep.diffusion.levels import LevelSampler, Uniform
from instep.diffusion.path import Path, broadcast
from instep.diffusion.prediction import Condition
from instep.diffusion.rollout import Where
from instep.diffusion.transfer import to_match
from instep.methods.matching import distance
from instep.methods.term import Force, Need, View, as_force

Sign = Literal["pull", "signed", "printed"]
Toward = Literal["nearest", "mean", "kernel"]
Normaliser = Literal["target", "own"]
Estimator = Literal["fake", "teacher", "student", "samples"]


@dataclass(frozen=True)
class Alignment:
    """One evaluation of an alignment force with everything that went into it, [B, ...] each (DM-Align, Fig. 6).

    `own` and `preferred` are the two estimates; `direction` is the normalised difference, for a group times each sample's factor;
    `target` = x - direction is the target of the surrogate regression.
    """

    x: Tensor
    level: Tensor
    own: Tensor
    preferred: Tensor
    direction: Tensor

    @property
    def target(self) -> Tensor:
        return self.x - self.direction


def align_direction(x: Tensor, own: Tensor, preferred: Tensor, normaliser: Normaliser = "target") -> Tensor:
    """(own - preferred) / mean|x - target| per sample, for estimates `own` and `preferred`, all [B, ...]; descending it moves x to the preferred sample.

    The `target` of the pull is the preferred estimate, as DMD divides by the distance to the teacher's: the size is about one at every level.
    `own` divides by the distance to the sample's own estimate, which vanishes as the level does. The distance is floored at .001.
    """
    return (own - preferred) / distance(x, preferred if normaliser == "target" else own)


def group_factor(advantage: Tensor, sign: Sign) -> Tensor:
    """The factor on `align_direction` [B]: the weight and sign of each sample's pull to the preferred estimate.

    `pull`: max(-A, 0), only samples below their group's mean move; `signed`: -A, as the text below Eq. 7 describes (low samples move to the
    preferred estimate, high ones away from it); `printed`: +A, Eq. 7 to the letter, which lowers the reward.

    The pull to a *mean* has a part that all samples of a group share: a mean is paler than any sample, and so is its estimate. This part
    cancels under `signed`, because advantages sum to zero; under `pull` it adds up, and samples fade. The nearest sample is no paler than others.
    """
    if sign == "signed":
        return -advantage
    if sign == "pull":
        return (-advantage).clamp(min=0)
    if sign == "printed":
        return advantage
    raise ValueError(f"sign: {sign!r} is not known; allowed: pull, signed, printed")


def squared_distances(x: Tensor, candidates: Tensor) -> Tensor:
    """|x - c|^2 of each x [B, ...] to its candidates [B, n, ...], as [B, n]; exactly zero for a candidate that is x."""
    return (x[:, None] - candidates).flatten(2).square().sum(2)


def nearest(x: Tensor, candidates: Tensor) -> Tensor:
    """Index [B] of the candidate in [B, n, ...] that is nearest to x [B, ...]; the first one of equals."""
    return squared_distances(x, candidates).argmin(1)


def resembling(squared: Tensor, within: float, ranks: Ranks = ALONE) -> Tensor:
    """Which samples are near what they would follow [B], booleans: those whose squared distance [B] is at most `within` times its mean over all ranks."""
    return squared <= within * ranks.mean(squared.mean())


def posterior_mean(path: Path, x_t: Tensor, t: Tensor, candidates: Tensor) -> Tensor:
    """E[x0 | x_t] if x0 is one of the candidates [B, n, ...], all as likely, and x_t = a x0 + b eps: the denoiser of that set, [B, ...].

    It is their softmax-weighted mean, with logits -|x_t - a c|^2 / (2 b^2); x_t is [B, ...], the levels t are [B], above 0.
    """
    b = to_match(path.b(t), x_t)[:, None]
    logits = -squared_distances(x_t, broadcast(path.a(t), candidates) * candidates) / (2 * b.square())
    weights = logits.softmax(1).reshape(*logits.shape, *(1,) * (x_t.ndim - 1))
    return (weights * candidates).sum(1)


@dataclass(frozen=True, kw_only=True)
class Align(Force):
    """Base of the two alignment forces: where they act, toward what, in which units, and by whose estimate.

    `toward`: the preferred sample that is nearest to the student's (distance of latents), the `mean` of the preferred ones, or the `kernel`: the
    posterior mean of the preferred ones at the sample's own noised point, which needs no network for the preferred side (the score of the
    preferred set at x itself, Eq. 5). `normaliser`: see `align_direction`. `estimate_by`: the fake (the paper's), or a variant of Appendix C.2:
    the teacher, conditional and unguided; the student itself; or `samples`, without noise and without a network, where an estimate *is* its sample.
    """

    on: Where = "exit"
    toward: Toward = "nearest"
    normaliser: Normaliser = "target"
    estimate_by: Estimator = "fake"
    levels: LevelSampler = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        _check_choice("toward", self.toward, Toward)
        _check_choice("normaliser", self.normaliser, Normaliser)
        _check_choice("estimate_by", self.estimate_by, Estimator)
        if self.estimate_by == "samples" and self.toward == "kernel":
            raise ValueError("toward: 'kernel' is not allowed with estimate_by 'samples': without noise there is no posterior; use nearest or mean")
        if self.estimate_by == "samples" and self.normaliser == "own":
            raise ValueError("normaliser: 'own' is not allowed with estimate_by 'samples': a sample's distance to itself is zero; use target")

    def __call__(self, view: View) -> Tensor:
        return as_force(self.explain(view).direction)

    def explain(self, view: View) -> Alignment:
        """The force with everything that went into it."""
        raise NotImplementedError

    def _estimate(self, view: View, x: Tensor, noise: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The estimates of samples x noised to the levels t, [B, ...]."""
        if self.estimate_by == "samples":
            return x
        return view.roles[self.estimate_by](view.path.renoise(x, noise, t), t, cond).x0


@dataclass(frozen=True, kw_only=True)
class AlignPair(Align):
    """DM-PairLoss (Eq. 6): toward the estimate of a preferred real sample of the same prompt; same level, same noise.

    A batch brings up to `candidates` different preferred samples of each prompt, to choose the nearest from, or to average; 1 is the paper's.
    With `within`, only those samples of a batch move whose nearest preferred one is near, compared with the others' (`resembling`). Where what a prompt leaves
    open differs (a motion, a viewpoint), halfway to the preferred sample is neither the one nor the other.
    """

    name: str = "pair"
    candidates: int = 4
    within: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates < 1:
            raise ValueError(f"candidates: {self.candidates} is not allowed; 1 or more preferred samples of a prompt (1 is the paper's)")
        if self.within is not None:
            check_number("within", self.within, 0, open_below=True, what="it is a factor of the mean squared distance, or none")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"preferred"})

    @property
    def preferred_count(self) -> int:
        return self.candidates

    @torch.no_grad()
    def explain(self, view: View) -> Alignment:
        samples = view.samples
        point = samples.point(self.on).detach()
        assert view.batch.preferred is not None, "Pair needs preferred samples in the batch"
        x, candidates = point.x, view.batch.preferred.repeat_interleave(samples.group, 0)
        t = view.levels(self.levels, len(x), point.level).to(x.dtype)
        noise, cond, squared = view.randn_like(x), samples.cond.at_exit(point.exit_id), squared_distances(x, candidates)
        if self.toward == "kernel":
            own = self._estimate(view, x, noise, t, cond)
            preferred = posterior_mean(view.path, view.path.renoise(x, noise, t), t, candidates)
        else:
            rows = torch.arange(len(x), device=x.device)
            plus = candidates.mean(1) if self.toward == "mean" else candidates[rows, squared.argmin(1)]
            # one call of 2 B samples: the student's and the preferred ones
            both = self._estimate(view, torch.cat([x, plus]), torch.cat([noise, noise]), torch.cat([t, t]), cond.stack(cond))
            own, preferred = both.chunk(2)
        direction = align_direction(x, own, preferred, self.normaliser)
        if self.within is not None:
            direction = broadcast(resembling(squared.amin(1), self.within, view.ranks), direction) * direction
        return Alignment(x, t, own, preferred, direction)


@dataclass(frozen=True, kw_only=True)
class AlignGroup(Align):
    """DM-GroupLoss (Eq. 7): group advantage times the pull toward the estimate of the group's `top_n` best samples (None: half of the group).

    Level and noise are shared within a group, so a preferred sample is noised and estimated once, as itself: the nearest one and the kernel cost no evaluation
    beyond the B own estimates, the mean one a group. A preferred sample is the nearest to itself and feels no force. The advantage, of the final
    samples wherever the force acts, is not clipped, and the normalisation comes before it: after it the advantage would cancel.
    """

    name: str = "group"
    top_n: int | None = None
    sign: Sign = "pull"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("sign", self.sign, Sign)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reward"})

    @torch.no_grad()
    def explain(self, view: View) -> Alignment:
        samples = view.samples
        point, k = samples.point(self.on).detach(), samples.group
        assert samples.reward is not None and samples.advantage is not None
        x, best = point.x, top_n(samples.reward, k, best_of(self.top_n, k))
        t_group = view.levels(self.levels, len(best), point.level[::k]).to(x.dtype)
        noise_group, cond = view.randn_like(x[::k]), samples.cond.at_exit(point.exit_id)
        t, noise = t_group.repeat_interleave(k), noise_group.repeat_interleave(k, 0)
        if self.toward == "mean":
            both = torch.cat([x, x[best].mean(1)])
            noises, levels = torch.cat([noise, noise_group]), torch.cat([t, t_group])
            estimates = self._estimate(view, both, noises, levels, cond.stack(cond[slice(None, None, k)]))
            own, preferred = estimates[: len(x)], estimates[len(x) :].repeat_interleave(k, 0)
        else:
            own, best = self._estimate(view, x, noise, t, cond), best.repeat_interleave(k, 0)
            if self.toward == "nearest":
                preferred = own[best.gather(1, nearest(x, x[best])[:, None])[:, 0]]
            else:
                preferred = posterior_mean(view.path, view.path.renoise(x, noise, t), t, x[best])
        factor = group_factor(samples.advantage, self.sign)
        return Alignment(x, t, own, preferred, broadcast(factor, own) * align_direction(x, own, preferred, self.normaliser))


def best_of(n: int | None, group: int) -> int:
    """How many samples of a group of this size are preferred: n, or half of them if it is None."""
    return max(group // 2, 1) if n is None else n


def _check_choice(name: str, value: str, kind: Any) -> None:
    if value not in get_args(kind):
        raise ValueError(f"{name}: {value!r} is not known; allowed: {', '.join(get_args(kind))}")
