"""Direct preference optimisation on denoising errors (Wallace et al. 2024), with pairs from the student itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from instep.levels import LevelSampler, Uniform
from instep.matching.critic import denoising_error
from instep.terms import Need, Objective, View


def preference_loss(won: Tensor, lost: Tensor, won_reference: Tensor, lost_reference: Tensor, beta: float) -> Tensor:
    """-log sigmoid(-beta / 2 ((won - won_reference) - (lost - lost_reference))) of denoising errors [B]; log 2 where nothing has moved."""
    return -F.logsigmoid(-0.5 * beta * ((won - won_reference) - (lost - lost_reference)))


@dataclass(frozen=True, kw_only=True)
class OnlineDPO(Objective):
    """The best sample of each group is preferred to its worst, both noised to the same level with the same noise (DMDR Table 5b; Flow-DPO).

    Errors are those of the velocity, means over elements; they are compared with the student's as it was when the stage began. `levels`: for
    a few-step student its own (`levels.OneOf`), for a many-step model all. Groups of equal rewards make no pair.
    """

    name: str = "dpo"
    beta: float = 500.0
    levels: LevelSampler = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta: {self.beta} is not allowed; it is positive, 100 to 5000 on mean squared velocity errors")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reward", "reference"})

    def passes(self, group: int, transitions: int = 0) -> tuple[float, float]:
        return 2 / group, 2 / group

    def __call__(self, view: View) -> Iterator[Tensor]:
        samples = view.samples
        x, advantage = samples.point("final").x.detach(), samples.advantage
        assert advantage is not None, "online preferences come from rewards; the stage must score them"
        groups = advantage.reshape(-1, samples.group)
        first = torch.arange(len(groups), device=x.device) * samples.group
        rows = torch.cat([first + groups.argmax(1), first + groups.argmin(1)])
        told = groups.amax(1) > groups.amin(1)
        n = len(groups)
        t = self.levels(n, progress=view.progress, t_exit=None, rng=view.rng).to(x).repeat(2)
        noise = view.randn_like(x[:n]).repeat(2, *(1,) * (x.ndim - 1))
        cond = samples.cond[rows]
        with torch.no_grad():
            before = denoising_error(view.roles["reference"], view, x[rows], t, noise, cond, "velocity").chunk(2)
        now = denoising_error(view.roles["student"], view, x[rows], t, noise, cond, "velocity").chunk(2)
        yield (preference_loss(now[0], now[1], before[0], before[1], self.beta) * told).mean()
