"""Several rewards at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from instep.data.prompt import Prompt
from instep.diffusion.transfer import constants
from instep.rewards.base import Reward, as_reward, check_prompts, checked_scores


@dataclass(frozen=True)
class Several:
    """Rewards with weights. Training normalises each within its group (or its gradient to the mean norm) before weighting; see `several`.

    `score` is their plain weighted sum, for logs and probes.
    """

    parts: tuple[Reward, ...]
    weights: tuple[float, ...]
    sees_first_frames = True  # each reward gets the form it takes

    def __post_init__(self) -> None:
        if not self.parts or len(self.parts) != len(self.weights):
            raise ValueError(f"weights: {len(self.weights)} for {len(self.parts)} rewards; give one weight a reward, at least one")
        spaces = {part.space for part in self.parts}
        if len(spaces) > 1:
            raise ValueError("rewards: some look at pixels and some at latents; give all of one kind")

    @property
    def name(self) -> str:
        return " + ".join(f"{weight:g} {part.name}" for part, weight in zip(self.parts, self.weights, strict=True))

    @property
    def differentiable(self) -> bool:
        return all(part.differentiable for part in self.parts)

    @property
    def space(self) -> Literal["pixel", "latent"]:
        return self.parts[0].space

    def check_prompts(self, prompts: Sequence[Prompt | str]) -> None:
        """RewardError for the first prompt that one of the rewards cannot score."""
        for part in self.parts:
            check_prompts(part, prompts)

    def each(self, media: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
        """Every reward's own scores, [B, R]."""
        return torch.stack([checked_scores(part, media, prompts) for part in self.parts], 1)

    def score(self, media: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
        each = self.each(media, prompts)
        return each @ constants(self.weights, each)


def parts_of(reward: Reward) -> tuple[Reward, ...]:
    """Returns each of several rewards, or the single one."""
    return reward.parts if isinstance(reward, Several) else (reward,)


def several(*rewards: tuple[Reward | Callable[[Tensor, Sequence[str]], Any], float]) -> Several:
    """Rewards (or plain functions) with their weights: several((pickscore, 1.0), (brightness, 0.5))."""
    return Several(tuple(as_reward(reward) for reward, _ in rewards), tuple(float(weight) for _, weight in rewards))
