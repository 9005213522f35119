"""Policy gradients on the student's own sampler: its stochastic steps are a Gaussian policy with an exact log-probability.

A few-step student goes from x0 predicted at one level to the next by N(a(t') x0, b(t')^2): its steps are already stochastic.
A many-step model's deterministic steps are made stochastic by another `Transition` of its rollout. The last step, to a clean sample, is
deterministic and left out; `Stage` rejects a one-step student, which has no other step. Log-probabilities are means over elements, as is usual for latents
of any size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from instep.diffusion.advantage import best_and_worst
from instep.diffusion.guidance import GuidedDenoiser
from instep.diffusion.noise import shared
from instep.diffusion.prediction import Denoiser
from instep.diffusion.rollout import Trajectory
from instep.methods.term import Need, Objective, View

# unit of GRPO's penalty: the mean over a latent's elements, or their sum
KLUnit = Literal["mean", "sum"]

# before the first update the policy is the one that rolled out: a difference beyond rounding is an error in the student
SAME = 1e-2


@dataclass(frozen=True, kw_only=True)
class _Policy(Objective):
    """The base of policy gradients: one scalar a transition, each with its own forward pass.

    `fraction` of the stored transitions, drawn anew for every update, is trained on (DanceGRPO: 0.6); all of them by default.
    """

    fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: {self.fraction} is not allowed; the part of a trajectory's transitions that is trained on, above 0 up to 1")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reward", "trajectory"})

    def steps(self, view: View, path: Trajectory) -> Sequence[int]:
        """Draws the transitions to train on."""
        n = len(path.t)
        if self.fraction == 1:
            return range(n)
        chosen = torch.randperm(n, generator=shared(view.rng))[: max(1, round(self.fraction * n))]
        return sorted(chosen.tolist())

    def predict(self, view: View, path: Trajectory, s: int, denoiser: Denoiser) -> tuple[Tensor, Tensor, Tensor]:
        """x0 [B, ...] of transition s by `denoiser`, guided as the rollout was, and its two levels [B]."""
        t, t_next = (level.expand(len(path.x_t[s])) for level in (path.t[s], path.t_next[s]))
        if path.guidance != 1:
            denoiser = GuidedDenoiser(denoiser, view.batch.null.repeat(view.samples.group), path.guidance)
        return denoiser(path.x_t[s], t, view.samples.cond).x0, t, t_next

    def log_prob(self, view: View, path: Trajectory, s: int, denoiser: Denoiser) -> Tensor:
        """log pi(x_next | x_t) of transition s by `denoiser`, [B], with its graph."""
        x0, t, t_next = self.predict(view, path, s, denoiser)
        return path.transition.log_prob(view.path, x0, path.x_t[s], path.x_next[s], t, t_next)

    @staticmethod
    def parts(view: View) -> tuple[Trajectory, Tensor]:
        path, advantage = view.samples.trajectory, view.samples.advantage
        assert path is not None and advantage is not None
        return path, advantage


@dataclass(frozen=True, kw_only=True)
class GRPO(_Policy):
    """-mean min(r A, clip(r, 1 - c, 1 + c) A) over the stored transitions, r the ratio of probabilities to the student that rolled out.

    DMDR's policy branch; matching beside it takes the place of a KL penalty. `kl` adds that penalty, relative to the student at the beginning of the
    stage: kl |mean - mean_reference|^2 / (2 std^2), the exact divergence of the two Gaussians. `kl_unit` of it: the mean over elements, the unit of the
    log-probabilities and of Flow-GRPO's released code, or their sum, as Flow-GRPO's paper writes the divergence (Liu et al. 2025). With one
    inner epoch every ratio is 1 and its gradient is the score function's; `Stage.inner_epochs` of 2 or more make use of the clip. `clip` is
    for log-probabilities that are means over elements.
    """

    name: str = "grpo"
    clip: float = 1e-3
    kl: float = 0.0
    kl_unit: KLUnit = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.clip < 1:
            raise ValueError(f"clip: {self.clip} is not allowed; a bound on the ratio between 0 and 1 (1e-3 for latents, .2 in two dimensions)")
        if self.kl < 0:
            raise ValueError(f"kl: {self.kl} is not allowed; 0 (no penalty) or more")
        if self.kl_unit not in get_args(KLUnit):
            raise ValueError(f"kl_unit: {self.kl_unit!r} is not known; allowed: {', '.join(get_args(KLUnit))}")

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | {"reference"} if self.kl else super().needs

    def __call__(self, view: View) -> Iterator[Tensor]:
        path, advantage = self.parts(view)
        steps = self.steps(view, path)
        for s in steps:
            x0, t, t_next = self.predict(view, path, s, view.roles["student"])
            ratio = (path.transition.log_prob(view.path, x0, path.x_t[s], path.x_next[s], t, t_next) - path.log_prob[s]).exp()
            if view.epoch == 0:
                view.require((ratio.detach() - 1).abs().max() <= SAME, partial(_changed, ratio.detach()))
            loss = surrogate(ratio, advantage, self.clip)
            if self.kl:
                loss = loss + self.kl * self.divergence(view, path, s, x0, t, t_next)
            yield loss.mean() / len(steps)

    def divergence(self, view: View, path: Trajectory, s: int, x0: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """KL of transition s from the reference's in `kl_unit`, [B]: of two Gaussians of the same std."""
        with torch.no_grad():
            before = self.predict(view, path, s, view.roles["reference"])[0]
            reference_mean, std = path.transition.gaussian(view.path, before, path.x_t[s], t, t_next)
        mean, _ = path.transition.gaussian(view.path, x0, path.x_t[s], t, t_next)
        squared = (mean - reference_mean).flatten(1).square()
        return 0.5 * (squared.mean(1) if self.kl_unit == "mean" else squared.sum(1)) / std.square()


def _changed(ratio: Tensor) -> RuntimeError:
    return RuntimeError(
        f"grpo: before any update the ratio of probabilities is {float(ratio.max()):.3f} and not 1, so the student's prediction differs from its rollout; "
        "dropout or a changed condition in the network are the usual causes"
    )


def surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate as a loss, [B] (Schulman et al. 2017, Eq. 7, with its sign turned)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


@dataclass(frozen=True, kw_only=True)
class DDPO(_Policy):
    """-mean A log pi over the last `truncate` transitions: the score function (Black et al. 2024; DOLLAR's Algorithm 2 takes the last 2)."""

    name: str = "ddpo"
    truncate: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.truncate < 1:
            raise ValueError(f"truncate: {self.truncate} is not allowed; 1 or more transitions")

    def __call__(self, view: View) -> Iterator[Tensor]:
        path, advantage = self.parts(view)
        steps = self.steps(view, path)[-self.truncate :]
        for s in steps:
            yield -(advantage * self.log_prob(view, path, s, view.roles["student"])).mean() / len(steps)


@dataclass(frozen=True, kw_only=True)
class PSO(_Policy):
    """Online pairwise sample optimisation of a few-step student (Miao et al., ICLR 2025): -log sigmoid(beta (c_won - c_lost)), for each stored transition.

    c = log clip(pi / pi_reference, 1 - clip, 1 + clip) of x_t -> x_next, the reference being the student at the beginning of the stage; `won` is the
    trajectory of each group's best sample by the reward, `lost` that of its worst. It is DPO on the steps that the student itself takes, where
    `Preference` compares denoising errors. A trajectory whose ratio is past the clip has no gradient, groups of equal rewards make no pair, and the loss
    is log 2 before any update. beta 50 and clip 0.1 are those of the released code (SDXL-DMD2 and SDXL-Turbo, pairs of two samples), for
    log-probabilities that are means over elements, as ours are.
    """

    name: str = "pso"
    beta: float = 50.0
    clip: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta: {self.beta} is not allowed; it is positive (the released code of PSO: 50)")
        if not 0 < self.clip < 1:
            raise ValueError(f"clip: {self.clip} is not allowed; a bound on the ratio between 0 and 1 (the released code of PSO: 0.1)")

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | {"reference"}

    def __call__(self, view: View) -> Iterator[Tensor]:
        path, advantage = self.parts(view)
        best, worst, differ = best_and_worst(advantage, view.samples.group)
        rows, steps = torch.cat([best, worst]), self.steps(view, path)
        path = replace(path, x_t=path.x_t[:, rows], x_next=path.x_next[:, rows], log_prob=path.log_prob[:, rows])
        batch = replace(view.batch, null=view.batch.null.stack(view.batch.null))
        pairs = replace(view, batch=batch, rollout=replace(view.samples, cond=view.samples.cond[rows], group=1))
        for s in steps:
            with torch.no_grad():
                before = self.log_prob(pairs, path, s, view.roles["reference"])
            ratio = self.log_prob(pairs, path, s, view.roles["student"]) - before
            won, lost = ratio.clamp(math.log1p(-self.clip), math.log1p(self.clip)).chunk(2)
            yield -(F.logsigmoid(self.beta * (won - lost)) * differ).mean() / len(steps)
