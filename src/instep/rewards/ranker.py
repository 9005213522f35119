"""Pairwise rankers, which decide which of two samples of a prompt is better; adapters from rewards to rankers, and from rankers to group rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from instep.data.prompt import Prompt
from instep.rewards.base import Reward, as_reward, checked_scores, prompts_for
from instep.rewards.several import parts_of


class Ranker(Protocol):
    """Compares media [B, 3, (F,) H, W] in [0, 1] with others of the same prompts: [B] of 1 (the first is better), -1 (the second), 0 (neither)."""

    @property
    def name(self) -> str: ...

    def compare(self, first: Tensor, second: Tensor, prompts: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True)
class RewardRanker:
    """A reward as a ranker: the higher score wins; scores no further apart than `margin` are equal."""

    reward: Reward
    margin: float = 0.0
    sees_first_frames = True  # its reward then gets the form it takes

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise ValueError(f"margin: {self.margin} is not allowed; 0 or more, in the reward's own unit")

    @property
    def name(self) -> str:
        return self.reward.name

    def compare(self, first: Tensor, second: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
        gap = checked_scores(self.reward, first, prompts) - checked_scores(self.reward, second, prompts)
        return gap.sign() * (gap.abs() > self.margin)


def reward_ranker(reward: Reward | Callable[[Tensor, Sequence[str]], Any], margin: float = 0.0) -> RewardRanker:
    """A reward, or a plain function (media, prompts) -> scores, as a ranker."""
    return RewardRanker(as_reward(reward), margin)


@dataclass(frozen=True)
class Ranked:
    """A ranker as the reward of groups: a sample's score is its wins minus its losses against the others of its group, over their number, in [-1, 1].

    Adjacent samples of one prompt form a group, as in training; a single sample scores 0. A group of two costs one
    comparison and scores (1, -1), (-1, 1) or (0, 0), with which it makes no pair (Diffusion-APO 3.3.1).
    """

    ranker: Ranker
    differentiable: bool = False
    sees_first_frames = True  # equal prompts are a group: of equal texts with other first frames, none
    space: Literal["pixel", "latent"] = "pixel"

    @property
    def name(self) -> str:
        return f"ranked by {self.ranker.name}"

    def score(self, media: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
        groups = [[i for i, _ in rows] for _, rows in groupby(enumerate(prompts), key=lambda row: row[1])]
        pairs = [pair for rows in groups for pair in combinations(rows, 2)]
        scores = torch.zeros(len(media))
        if pairs:
            a, b = (torch.tensor(rows) for rows in zip(*pairs, strict=True))
            won = checked_comparisons(self.ranker, media[a.to(media.device)], media[b.to(media.device)], [prompts[i] for i, _ in pairs])
            others = torch.tensor([len(rows) - 1 for rows in groups for _ in rows], dtype=torch.float32).clamp(min=1)
            scores = scores.index_add(0, a, won).index_add(0, b, -won) / others
        return scores.to(media.device)


def relative(reward: Reward) -> bool:
    """Whether a reward, or one of several, compares samples with each other; its mean is then meaningless, and groups must be scored whole."""
    return any(isinstance(part, Ranked) for part in parts_of(reward))


def checked_comparisons(ranker: Ranker, first: Tensor, second: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
    """Comparisons [B] on the CPU; ValueError unless each is 1, 0 or -1."""
    got = ranker.compare(first, second, prompts_for(ranker, prompts))
    shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
    if shape != (len(prompts),) or not bool(torch.isin(got.cpu().float(), torch.tensor([-1.0, 0.0, 1.0])).all()):
        raise ValueError(f"ranker {ranker.name!r} returned {shape} for {len(prompts)} pairs, or a value that is not 1, 0 or -1; it returns one of these a pair")
    return got.detach().cpu().float()


def both_ways(ask: Callable[[Tensor, Tensor, Sequence[str]], Tensor], first: Tensor, second: Tensor, prompts: Sequence[str]) -> Tensor:
    """Compares in both orders, so that a preference for a position cancels. Answers that disagree are 0."""
    forward, backward = ask(first, second, prompts), -ask(second, first, prompts)
    return torch.where(forward == backward, forward, torch.zeros_like(forward))
