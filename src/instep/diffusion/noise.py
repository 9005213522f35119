"""Gaussian noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from instep.diffusion.transfer import to_device


def randn(shape: Sequence[int], rng: torch.Generator, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise of `shape` on `device`, drawn where the generator lives: a run's is on the host, so it draws the same numbers on every device."""
    return to_device(torch.randn(tuple(shape), generator=rng, device=rng.device, dtype=dtype), device)
