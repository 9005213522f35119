"""Connectionist temporal classification (Graves et al. 2006): the probability that a network which reads columns gives to a word.

It stands in place of `torch.nn.functional.ctc_loss`, whose backward pass is not deterministic on a GPU and cannot be differentiated again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLANK = 0
_NONE = -1e9  # the logarithm of an impossible path's probability, finite so that gradients are


def ctc_log_probability(log_p: Tensor, words: Tensor, lengths: Tensor | None = None) -> Tensor:
    """log of the summed probability of all paths over the columns that read a word, [N] <= 0 (section 4.1).

    log_p [N, T, C]: log-probabilities of a column's C symbols, 0 is the blank. words [N, L]: symbols 1 to C - 1. lengths [N]: how many of the L count,
    0 to L (None: all). A path reads the word that is left when repetitions are merged and blanks are dropped. -1e9 or less where T columns are too few.
    """
    n, columns, _ = log_p.shape
    states = words.new_full((n, 2 * words.shape[1] + 1), BLANK)  # blanks around each letter
    states[:, 1::2] = words
    emitted = log_p.gather(2, states[:, None].expand(-1, columns, -1))
    # from a letter to the next one without the blank between, which only equal letters need
    skips = (states != BLANK) & (states != F.pad(states, (2, 0), value=BLANK)[:, :-2])
    begins = torch.arange(states.shape[1], device=log_p.device) < 2
    alpha = emitted[:, 0].masked_fill(~begins, _NONE)
    for i in range(1, columns):
        from_last = F.pad(alpha, (1, 0), value=_NONE)[:, :-1]
        skipped = F.pad(alpha, (2, 0), value=_NONE)[:, :-2].masked_fill(~skips, _NONE)
        alpha = torch.stack([alpha, from_last, skipped]).logsumexp(0) + emitted[:, i]
    last = lengths[:, None] * 2 if lengths is not None else words.new_full((n, 1), 2 * words.shape[1])
    on_letter = alpha.gather(1, (last - 1).clamp(min=0)).masked_fill(last == 0, _NONE)
    return torch.cat([alpha.gather(1, last), on_letter], 1).logsumexp(1)


def best_path(log_p: Tensor) -> list[list[int]]:
    """The symbols that the most probable path of each row reads: log_p [N, T, C] to N lists."""
    best = log_p.argmax(2)
    kept = (best != BLANK) & (best != F.pad(best, (1, 0), value=BLANK)[:, :-1])
    return [row[keep].tolist() for row, keep in zip(best.cpu(), kept.cpu(), strict=True)]
