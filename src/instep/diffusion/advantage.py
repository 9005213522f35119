"""Advantages: how much better a sample is than its group. Groups are consecutive: sample i belongs to group i // K."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from instep.diffusion.transfer import to_match


def _by_group(reward: Tensor, group: int) -> Tensor:
    if group < 1 or reward.ndim != 1 or len(reward) % group:
        raise ValueError(f"group: {group} does not divide a batch of {tuple(reward.shape)} rewards; use a divisor of the batch")
    return reward.reshape(-1, group)


def group_variance(reward: Tensor, group: int) -> Tensor:
    """Mean over groups of the population variance within each, a scalar tensor."""
    return _by_group(reward, group).var(1, unbiased=False).mean()


def group_advantage(reward: Tensor, group: int, *, deviation: float | Tensor | None = None, eps: float = 1e-6, clip: float | None = None) -> Tensor:
    """(R - group mean) / (deviation + eps), [B] -> [B]; zero for a group of equal rewards (GRPO; AMD Eq. 12 with clip = 1).

    `deviation` None is each group's own (the population's, divides by K); a number is shared by all groups, so that groups which
    differ little get small advantages. Without the exact zero a constant group's rounding error would be divided by eps and
    saturate.
    """
    rewards = _by_group(reward, group)
    centred = rewards - rewards.mean(1, keepdim=True)
    own = rewards.std(1, unbiased=False, keepdim=True)
    constant = _constant(rewards, eps)
    spread = own if deviation is None else to_match(torch.as_tensor(deviation), own).expand_as(own)
    a = torch.where(constant, torch.zeros_like(centred), centred / (spread + eps)).reshape(-1)
    return a if clip is None else a.clamp(-clip, clip)


def several_advantages(rewards: Tensor, weights: Sequence[float], group: int, deviations: Sequence[float | Tensor | None], clip: float | None = None) -> Tensor:
    """Weighted sum of each reward's own advantage, [B, R] -> [B]: normalised within its group first, so that none dominates by its scale.

    One reward of weight 1 gives `group_advantage`. `clip` bounds the sum.
    """
    parts = [w * group_advantage(r, group, deviation=d) for r, w, d in zip(rewards.unbind(1), weights, deviations, strict=True)]
    total = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    return total if clip is None else total.clamp(-clip, clip)


def constant_groups(reward: Tensor, group: int, eps: float = 1e-6) -> Tensor:
    """How many groups have no spread in reward, and hence no advantage; a scalar tensor."""
    return _constant(_by_group(reward, group), eps).sum()


def _constant(rewards: Tensor, eps: float) -> Tensor:
    """Which groups [G, 1] of rewards [G, K] are equal, but for rounding: the mean of equal numbers is off by their own size, and by more than
    eps alone where they are large."""
    size = rewards.abs().amax(1, keepdim=True).clamp(min=1)
    return rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True) <= eps * size


def best_and_worst(advantage: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Batch indices of each group's best and of its worst sample, [B / K] each, and whether they differ at all, [B / K] booleans."""
    groups = _by_group(advantage, group)
    first = torch.arange(len(groups), device=advantage.device) * group
    return first + groups.argmax(1), first + groups.argmin(1), groups.amax(1) > groups.amin(1)


def top_n(reward: Tensor, group: int, n: int) -> Tensor:
    """Batch indices [B / K, n] of each group's n best samples, best first."""
    if not 1 <= n <= group:
        raise ValueError(f"top_n: {n} is not allowed; between 1 and the group size {group}")
    best = _by_group(reward, group).argsort(dim=1, descending=True, stable=True)[:, :n]
    start = torch.arange(0, len(reward), group, device=reward.device)
    return best + start[:, None]
