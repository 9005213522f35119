"""How often the samples of one model score higher than those of another: of the same prompts and the same seeds, pair by pair."""

from __future__ import annotations

import math

from torch import Tensor

from instep.core.statistics import Interval, wilson


def win_rate(scores: Tensor, others: Tensor, prompt: Tensor) -> Interval:
    """Share of pairs in which `scores` is higher than `others`, equal ones as half, with a 95 % interval; all [N], `prompt` integers.

    Samples of a prompt depend on each other, so the interval is Wilson's for as many pairs as would vary so much if they were independent: p (1 - p) over
    the variance of the mean over prompts, no fewer than prompts and no more than pairs (Kish's effective sample size). Raises ValueError unless all have N
    elements, at least one.
    """
    if not len(scores) == len(others) == len(prompt) or not len(scores):
        raise ValueError(f"scores: {len(scores)} and {len(others)} of {len(prompt)} prompts cannot be paired; give as many of each, at least one")
    won = (scores > others).double() + (scores == others).double() / 2
    share = float(won.mean())
    groups = [won[prompt == one] for one in prompt.unique()]
    count = len(groups)
    # the error of a ratio of sums over prompts
    spread = sum((float(group.sum()) - share * len(group)) ** 2 for group in groups) / max(1, count - 1) * count / len(won) ** 2
    # where all pairs have one outcome nothing tells that those of a prompt are independent
    independent = float(count) if share in (0, 1) else share * (1 - share) / spread if spread > 0 else math.inf
    n = min(float(len(won)), max(float(count), independent))
    return wilson(share * n, n)
