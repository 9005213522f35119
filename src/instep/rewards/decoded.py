"""Rewards of latents: decoded to media and scored, with and without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from instep.data.prompt import Prompt
from instep.rewards.base import Reward, checked_scores
from instep.rewards.ranker import relative
from instep.rewards.several import Several


class Decodes(Protocol):
    """A decoder of latents into media; every model family is one."""

    def decode(self, x: Tensor) -> Tensor:
        """Latents [B, C, (F,) H, W] to media [B, 3, (F,) H, W], nominally in [0, 1] and not clamped."""
        ...


# decoding all samples of a large batch at once would need more memory than the student's own step
DECODE_BATCH = 32


def make_reward_fn(family: Decodes, reward: Reward | None) -> Callable[[Tensor, Sequence[Prompt | str]], Tensor] | None:
    """Reward of latents: decoded a few at a time, clamped to [0, 1] like a file's pixels."""
    if reward is None:
        return None

    @torch.no_grad()
    def reward_fn(x: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
        parts = []
        for rows in chunks(prompts, whole=relative(reward)):
            parts.append(_scores(reward, _media(family, reward, x[rows], clamp=True), prompts[rows]))
        return torch.cat(parts)

    return reward_fn


def chunks(prompts: Sequence[Prompt | str], *, whole: bool) -> list[slice]:
    """Slices of rows that are decoded together: `DECODE_BATCH` rows, or with `whole` more, so that adjacent samples of one prompt stay together."""
    ends, n = [0], len(prompts)
    while ends[-1] < n:
        end = min(n, ends[-1] + DECODE_BATCH)
        while whole and end < n and prompts[end] == prompts[end - 1]:
            end += 1
        ends.append(end)
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def make_reward_grad_fn(family: Decodes, reward: Reward | None) -> Callable[[Tensor, Sequence[Prompt | str]], Tensor] | None:
    """Reward of latents with a graph, through the unclamped decoder (a clamped one has no gradient where it saturates); None if it has none."""
    if reward is None or not reward.differentiable:
        return None
    return lambda x, prompts: _scores(reward, _media(family, reward, x), prompts)


def _scores(reward: Reward, media: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
    """Checked scores [B], or [B, R] of several rewards."""
    return reward.each(media, prompts) if isinstance(reward, Several) else checked_scores(reward, media, prompts)


def weights_of(reward: Reward | None) -> tuple[float, ...]:
    """The weights of several rewards; 1 for a single one."""
    return reward.weights if isinstance(reward, Several) else (1.0,)


def _media(family: Decodes, reward: Reward, x: Tensor, *, clamp: bool = False) -> Tensor:
    """The input of a reward: decoded media, or the latents themselves."""
    if reward.space == "latent":
        return x
    return family.decode(x).clamp(0, 1) if clamp else family.decode(x)
