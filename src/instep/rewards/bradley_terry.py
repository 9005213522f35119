"""A reward learned from preferences: the Bradley-Terry model with ties of Rao and Kupper (1967), a small head on given features.

    P(first wins) = sigma(d - eta),  P(second wins) = sigma(-d - eta),  P(tie) = (e^{2 eta} - 1) sigma(d - eta) sigma(-d - eta)

with d the difference of the two rewards and eta = log theta >= 0 the width within which people see no difference; eta = 0 is Bradley-Terry.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.core.files import write_json, write_tensors


def rao_kupper_log_prob(gap: Tensor, outcome: Tensor, eta: Tensor) -> Tensor:
    """log probability [B] of outcomes (1: first, -1: second, 0: tie) for differences of rewards `gap` [B]; `eta` > 0."""
    first, second = F.logsigmoid(gap - eta), F.logsigmoid(-gap - eta)
    tie = torch.expm1(2 * eta).log() + first + second
    return torch.where(outcome > 0, first, torch.where(outcome < 0, second, tie))


class RewardHead(nn.Module):
    """Features [B, D] to a reward [B]: linear, or with one hidden layer of `hidden`; features are standardised by the training set's moments."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, hidden: int = 0) -> None:
        super().__init__()
        self.width, self.hidden = width, hidden
        layers = [nn.Linear(width, 1)] if not hidden else [nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1)]
        self.layers = nn.Sequential(*layers)
        if not hidden:
            # features that both samples of a pair share (the prompt's) get no gradient and stay out of the reward
            for parameter in layers[0].parameters():
                nn.init.zeros_(parameter)
        # eta = softplus(raw) starts at 0.31: about one tie in seven between equals
        self.raw_eta = nn.Parameter(torch.tensor(-1.0))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers((features - self.mean) / self.std).squeeze(1)

    @property
    def eta(self) -> Tensor:
        return F.softplus(self.raw_eta)

    def save(self, folder: Path) -> None:
        """reward_head.safetensors and reward_head.json in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "reward_head.safetensors", {key: value.detach() for key, value in self.state_dict().items()})
        write_json(folder / "reward_head.json", {"width": self.width, "hidden": self.hidden})

    @classmethod
    def load(cls, folder: Path) -> Self:
        from safetensors.torch import load_file

        head = cls(**json.loads((folder / "reward_head.json").read_text(encoding="utf-8")))
        head.load_state_dict(load_file(folder / "reward_head.safetensors"))
        return head.eval()


@dataclass(frozen=True)
class Fitted:
    """A trained head and its results on held-out pairs: the share of preferences that it orders right (one half for equal rewards), and its mean log
    probability of all pairs (ties too). `pairs`: number of training pairs; `heldout`: number of held-out pairs.

    `coin` is the mean log probability, on the same pairs, of a coin with the training pairs' rate of ties. `answers`: the effective number of independent
    answers if those of one group always agreed, (sum n)^2 / sum n^2 over the groups' preferences n, so that an interval based on it is not too narrow.
    """

    head: RewardHead
    accuracy: float
    log_prob: float
    pairs: int
    heldout: int
    coin: float
    answers: float


def fit(
    first: Tensor,
    second: Tensor,
    outcome: Tensor,
    *,
    hidden: int = 0,
    steps: int = 300,
    lr: float = 1e-2,
    decay: float = 1.0,
    heldout: float = 0.2,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> Fitted:
    """Fits a head to features [N, D] of pairs and their outcomes [N] (1: first preferred, -1: second, 0: tie), by likelihood with a Gaussian prior on
    its weights (not on eta) of variance 1 / `decay`; more pairs reduce the prior's influence.

    A seeded share `heldout` is kept for measuring: of the pairs, or with `groups` (one for each pair, its prompt) of the groups, so that none is in
    both parts. Raises ValueError if there are too few pairs, or all are ties.
    """
    if first.shape != second.shape or first.ndim != 2 or len(outcome) != len(first):
        raise ValueError(f"features: {tuple(first.shape)} and {tuple(second.shape)} for {len(outcome)} outcomes; give [N, D] of each and one outcome a pair")
    kept, seen, group = split(outcome, heldout, seed, groups)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = RewardHead(first.shape[1], hidden).to(first)
    both = torch.cat([first[seen], second[seen]])
    head.mean.copy_(both.mean(0))
    spread = both.std(0)
    # a feature that is constant here may vary elsewhere, and must not be amplified there
    head.std.copy_(torch.where(spread > 1e-6, spread, torch.ones_like(spread)))
    optimizer = torch.optim.Adam(head.parameters(), lr)
    for _ in range(steps):
        small = sum(p.square().sum() for p in head.layers.parameters()) * decay / 2 / len(seen)
        loss = small - rao_kupper_log_prob(head(first[seen]) - head(second[seen]), outcome[seen], head.eta).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval().requires_grad_(False)
    gap, has_preference = head(first[kept]) - head(second[kept]), outcome[kept] != 0
    accuracy = float(((gap * outcome[kept])[has_preference].sign() + 1).mean() / 2)
    log_prob = float(rao_kupper_log_prob(gap, outcome[kept], head.eta).mean())
    ties = (int((outcome[seen] == 0).sum()) + 1) / (len(seen) + 2)
    coin = float(torch.where(has_preference, math.log((1 - ties) / 2), math.log(ties)).mean())
    each = torch.bincount(group[kept][has_preference]).double()
    return Fitted(head, accuracy, log_prob, len(seen), len(kept), coin, float(each.sum().square() / each.square().sum()))


def split(outcome: Tensor, heldout: float, seed: int, groups: Sequence[Hashable] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the pairs that are held out, of those that are trained on, and the group of every pair, as `fit` divides them by their outcomes [N].

    Raises ValueError if either part has no preference.
    """
    if not bool(torch.isin(outcome.float(), torch.tensor([-1.0, 0.0, 1.0])).all()):
        raise ValueError("outcome: it is 1 (the first is preferred), -1 (the second) or 0 (a tie)")
    if not 0 < heldout < 1:
        raise ValueError(f"heldout: {heldout} is not allowed; the part of the pairs that is kept for measuring, above 0 and below 1")
    group, count = _numbered(groups, len(outcome))
    away = torch.zeros(count, dtype=torch.bool)
    away[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: max(1, round(heldout * count))]] = True
    kept, seen = away[group].nonzero()[:, 0], (~away[group]).nonzero()[:, 0]
    if not bool((outcome[kept] != 0).any()) or not bool((outcome[seen] != 0).any()):
        of = "" if groups is None else f" of {count} prompts"
        raise ValueError(f"pairs: {len(outcome)}{of} with {int((outcome != 0).sum())} preferences are too few to train and to measure on; give more")
    return kept, seen, group


def _numbered(groups: Sequence[Hashable] | None, pairs: int) -> tuple[Tensor, int]:
    """Number of each pair's group [N], and how many groups there are; without groups every pair is one."""
    if groups is None:
        return torch.arange(pairs), pairs
    if len(groups) != pairs:
        raise ValueError(f"groups: {len(groups)} for {pairs} pairs; give one a pair")
    numbers: dict[Hashable, int] = {}
    rows = [numbers.setdefault(group, len(numbers)) for group in groups]
    return torch.tensor(rows), len(numbers)


@dataclass(frozen=True)
class LearnedReward:
    """A trained head as a reward of media: `features` of media [B, 3, (F,) H, W] and their prompts -> [B, D]."""

    head: RewardHead
    features: Callable[..., Tensor]
    name: str = "learned from preferences"
    differentiable: bool = True
    space: Literal["pixel", "latent"] = "pixel"

    def score(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        features = self.features(media, prompts)
        return self.head.to(features)(features)
