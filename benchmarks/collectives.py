"""What a process sends to others, as `communication.py` and `tests/many_ranks.py` count it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

# names of torch before 2.13, and from it on
FUNCTIONS = {
    "all_reduce": "all_reduce",
    "all_gather_single": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "broadcast": "broadcast",
}


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """The kind and the bytes of every collective inside."""
    found: list[tuple[str, int]] = []
    before = {name: getattr(torch.distributed, name) for name in FUNCTIONS if hasattr(torch.distributed, name)}

    def counting(name: str, *args: Any, **kwargs: Any) -> Any:
        found.append((FUNCTIONS[name], max(x.nbytes for x in (*args, *kwargs.values()) if isinstance(x, Tensor))))
        return before[name](*args, **kwargs)

    for name in before:
        setattr(torch.distributed, name, partial(counting, name))
    try:
        yield found
    finally:
        for name, function in before.items():
            setattr(torch.distributed, name, function)
