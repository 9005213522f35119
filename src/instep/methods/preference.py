"""Direct preference optimisation on denoising errors (Wallace et al. 2024): Diffusion-DPO, Diffusion-APO and online DPO are one objective.

They differ in the source of their pairs (`pairs`) and in the levels at which these are compared (`levels`): DPO draws one of all levels, APO a
window of those its sampler visits (`level_windows.HighLow`), and a few-step student uses its own (`levels.OneOf`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from instep.diffusion.advantage import best_and_worst
from instep.diffusion.levels import LevelSampler, Uniform
from instep.diffusion.prediction import Condition
from instep.diffusion.transfer import to_device
from instep.methods.critics import ErrorOf, denoising_error
from instep.methods.term import Need, Objective, View

PairSource = Literal["online", "half-online", "offline"]


def preference_loss(won: Tensor, lost: Tensor, won_reference: Tensor, lost_reference: Tensor, beta: float) -> Tensor:
    """-log sigmoid(-beta / 2 ((won - won_reference) - (lost - lost_reference))) of denoising errors [B]; log 2 before any update."""
    return -F.logsigmoid(-0.5 * beta * ((won - won_reference) - (lost - lost_reference)))


@dataclass(frozen=True)
class Compared:
    """Pairs x [2 N, ...], the preferred ones first, with their conditions; `has_preference` [N] is False where there is no preference."""

    x: Tensor
    cond: Condition
    has_preference: Tensor | float = 1.0


@dataclass(frozen=True, kw_only=True)
class Preference(Objective):
    """Lowers the denoising error of the preferred sample of each pair, relative to the student at the beginning of the stage, and raises the other's.

    Errors are those of the velocity (`target`: or of the noise, or of x0), means over elements; both samples are noised to the same level with the same
    noise. `pairs`:

    - online: the best and the worst sample of each group, by the run's reward (DMDR Table 5b; Flow-DPO; APO's online stage, whose ranker is the
      reward of a group of two: `rewards.ranker.Ranked`). Groups of equal rewards make no pair.
    - half-online: a labelled sample against a new one of the student for the same prompt: a chosen one wins, a rejected one loses
      (APO 3.3.2). `positive` is the share of chosen ones (paper: 18k of 30k); 1 needs preferred samples alone.
    - offline: labelled pairs.

    `levels`: every sampler of its `window` yields one scalar, each backwarded at once, so their gradients add up (APO, total gradient of a window).
    """

    name: str = "dpo"
    beta: float = 500.0
    levels: LevelSampler = field(default_factory=Uniform)
    pairs: PairSource = "online"
    positive: float = 0.6
    target: ErrorOf = "velocity"

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta: {self.beta} is not allowed; it is positive, 100 to 5000 on mean squared velocity errors")
        if not 0 <= self.positive <= 1:
            raise ValueError(f"positive: {self.positive} is not allowed; the share of labelled samples that are chosen ones, between 0 and 1")
        if self.target not in get_args(ErrorOf):
            raise ValueError(f"target: {self.target!r} is not known; allowed: {', '.join(get_args(ErrorOf))}")

    @property
    def needs(self) -> frozenset[Need]:
        labelled: Need = "preferred" if self.positive == 1 else "pairs"
        needed: dict[PairSource, frozenset[Need]] = {
            "online": frozenset({"reward", "reference"}),
            "half-online": frozenset({"final", labelled, "reference"}),
            "offline": frozenset({"pairs", "reference"}),
        }
        return needed[self.pairs]

    def __call__(self, view: View) -> Iterator[Tensor]:
        draw = {"online": self.online, "half-online": self.half_online, "offline": self.offline}[self.pairs]
        pairs = draw(view)
        n = len(pairs.x) // 2
        for levels in self.levels.window:
            t = view.levels(levels, n).to(pairs.x.dtype).repeat(2)
            noise = view.randn_like(pairs.x[:n]).repeat(2, *(1,) * (pairs.x.ndim - 1))
            with torch.no_grad():
                before = denoising_error(view.roles["reference"], view, pairs.x, t, noise, pairs.cond, self.target).chunk(2)
            now = denoising_error(view.roles["student"], view, pairs.x, t, noise, pairs.cond, self.target).chunk(2)
            yield (preference_loss(now[0], now[1], before[0], before[1], self.beta) * pairs.has_preference).mean()

    def online(self, view: View) -> Compared:
        """Best and worst of each group."""
        samples = view.samples
        x, advantage = samples.point("final").x.detach(), samples.advantage
        assert advantage is not None, "online preferences come from rewards; the stage must score them"
        best, worst, differ = best_and_worst(advantage, samples.group)
        rows = torch.cat([best, worst])
        return Compared(x[rows], samples.cond[rows], differ)

    def half_online(self, view: View) -> Compared:
        """A labelled sample of each prompt and the student's first one of it."""
        samples, batch = view.samples, view.batch
        own = samples.point("final").x.detach()[:: samples.group]
        if self.positive == 1:
            assert batch.real is not None, "half-online preferences need preferred samples in the batch"
            return Compared(torch.cat([batch.real, own]), batch.cond.stack(batch.cond))
        assert batch.pairs is not None, "half-online preferences need labelled samples in the batch"
        good = view.rand(len(own)) < self.positive
        good = to_device(good.reshape(-1, *(1,) * (own.ndim - 1)), own.device)
        won, lost = torch.where(good, batch.pairs.chosen, own), torch.where(good, own, batch.pairs.rejected)
        return Compared(torch.cat([won, lost]), batch.cond.stack(batch.cond))

    def offline(self, view: View) -> Compared:
        """Labelled pairs."""
        pairs = view.batch.pairs
        assert pairs is not None, "offline preferences need labelled pairs in the batch"
        return Compared(torch.cat([pairs.chosen, pairs.rejected]), view.batch.cond.stack(view.batch.cond))
