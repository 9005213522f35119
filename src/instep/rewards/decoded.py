"""Rewards of latents: decoded to media and scored, with and without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from instep.core.rows import joined
from instep.data.prompt import Prompt
from instep.rewards.base import Reward, checked_scores
from instep.rewards.ranker import relative
from instep.rewards.several import Several


class Decodes(Protocol):
    """A decoder of latents into media; every model family is one."""

    def decode(self, x: Tensor) -> Tensor:
        """Latents [B, C, (F,) H, W] to media [B, 3, (F,) H, W], nominally in [0, 1] and not clamped."""
        ...

    @property
    def micro_batch(self) -> int | None:
        """The most rows that are decoded and scored at once; None: no bound of the run's own."""
        ...


# decoding all samples of a large batch at once would need more memory than the student's own step
DECODE_BATCH = 32


def make_reward_fn(family: Decodes, reward: Reward | None) -> Callable[[Tensor, Sequence[Prompt | str]], Tensor] | None:
    """Reward of latents: decoded a few at a time, clamped to [0, 1] like a file's pixels.

    A reward that compares samples sees all samples of a prompt at once, whatever the family's `micro_batch` is.
    """
    if reward is None:
        return None
    size = min(DECODE_BATCH, family.micro_batch or DECODE_BATCH)

    @torch.no_grad()
    def reward_fn(x: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
        parts = []
        for rows in chunks(prompts, size, whole=relative(reward)):
            parts.append(_scores(reward, _media(family, reward, x[rows]), prompts[rows]))
        return torch.cat(parts)

    return reward_fn


def chunks(prompts: Sequence[Prompt | str], size: int, *, whole: bool) -> list[slice]:
    """Slices of `size` rows that are scored together, or with `whole` more, so that adjacent samples of one prompt stay together."""
    ends, n = [0], len(prompts)
    while ends[-1] < n:
        end = min(n, ends[-1] + size)
        while whole and end < n and prompts[end] == prompts[end - 1]:
            end += 1
        ends.append(end)
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def make_reward_grad_fn(family: Decodes, reward: Reward | None) -> Callable[[Tensor, Sequence[Prompt | str]], Tensor] | None:
    """Reward of latents with a graph; None if it has none.

    The reward sees media in [0, 1]. Where the decoder leaves the range, the gradient passes as if nothing were clamped (straight-through); a plain clamp
    has none there. Of a bounded number of rows at a time the graph of decoder and reward is alive (`core/rows.py`). A reward may draw from torch's global
    generators.
    """
    if reward is None or not reward.differentiable:
        return None

    def reward_grad_fn(x: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
        return joined(lambda rows: _scores(reward, _media(family, reward, x[rows]), prompts[rows]), len(x), family.micro_batch, draws_on=x.device)

    return reward_grad_fn


def _scores(reward: Reward, media: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
    """Checked scores [B], or [B, R] of several rewards."""
    return reward.each(media, prompts) if isinstance(reward, Several) else checked_scores(reward, media, prompts)


def weights_of(reward: Reward | None) -> tuple[float, ...]:
    """The weights of several rewards; 1 for a single one."""
    return reward.weights if isinstance(reward, Several) else (1.0,)


def _media(family: Decodes, reward: Reward, x: Tensor) -> Tensor:
    """The input of a reward: decoded media in [0, 1], or the latents themselves."""
    return x if reward.space == "latent" else in_range(family.decode(x))


def in_range(media: Tensor) -> Tensor:
    """Media clamped to [0, 1], with the gradient of the identity (straight-through, Bengio et al. 2013)."""
    clamped: Tensor = _InRange.apply(media)
    return clamped


class _InRange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, media: Tensor) -> Tensor:
        return media.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope
