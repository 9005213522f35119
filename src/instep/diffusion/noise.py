"""Gaussian noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def randn(shape: Sequence[int], rng: torch.Generator, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise of `shape` on `device`, drawn where the generator lives: a run's is on the host, so it draws the same numbers on every device."""
    return torch.randn(tuple(shape), generator=rng, device=rng.device, dtype=dtype).to(device, non_blocking=True)
