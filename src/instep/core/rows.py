"""Rows of a batch, a few at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def slices(n: int, size: int | None) -> list[slice]:
    """Slices of at most `size` rows that cover n rows; one slice if `size` is None. ValueError for a size below 1."""
    if size is None:
        return [slice(0, n)]
    if size < 1:
        raise ValueError(f"micro_batch: {size} is not allowed; 1 or more rows")
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def by_rows(function: Callable[[slice], Any], n: int, size: int | None, *, recompute: bool = False, draws_on: torch.device | None = None) -> list[Any]:
    """`function` of each slice of at most `size` of n rows.

    With a graph, and more than one slice (or `recompute`), a slice keeps its inputs alone: its activations are computed again during the backward pass, so that
    the graph of one slice is alive at a time. This costs one more forward pass; outputs and gradients are those of all rows at once, up to rounding.

    `draws_on`: the function may draw from torch's global generators, those of the host and of this device. The second pass then draws what the first one drew,
    for a copy of the generators' states a slice; None: it draws nothing.
    """
    parts = slices(n, size)
    if (len(parts) == 1 and not recompute) or not torch.is_grad_enabled():
        return [function(rows) for rows in parts]
    if draws_on is None:
        return [checkpoint(function, rows, use_reentrant=False, preserve_rng_state=False) for rows in parts]
    # checkpoint keeps the generators of the devices of its tensor arguments
    anchor = torch.empty(0, device=draws_on)
    return [checkpoint(lambda rows, _: function(rows), rows, anchor, use_reentrant=False) for rows in parts]


def joined(function: Callable[[slice], Tensor], n: int, size: int | None, *, draws_on: torch.device | None = None) -> Tensor:
    """The outputs of `by_rows`, one tensor of n rows."""
    parts = by_rows(function, n, size, draws_on=draws_on)
    return parts[0] if len(parts) == 1 else torch.cat(parts)
