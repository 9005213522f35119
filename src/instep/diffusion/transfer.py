"""Tensors on their way from the host to the device, without making the host wait."""

from __future__ import annotations

import torch
from torch import Tensor

# the driver stages copies of pageable memory up to this size, 64 KiB, and returns; larger ones wait for it unless the memory is pinned
STAGED = 2**16


def to_device(x: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """x on `device` (and in `dtype`; None: its own). A copy from the host does not wait for what the device still computes.

    A tensor of more than 64 KiB goes through pinned memory to a CUDA device. A copy to the host blocks: its values would be read before they arrive.
    """
    target, kind = torch.device(device), x.dtype if dtype is None else dtype
    if x.device.type != "cpu":
        return x.to(target, kind, non_blocking=target.type != "cpu")
    if target.type == "cuda" and x.nbytes > STAGED and not x.is_pinned():
        x = x.to(kind).pin_memory()
    return x.to(target, kind, non_blocking=True)


def to_match(x: Tensor, like: Tensor) -> Tensor:
    """x on the device and in the dtype of `like` (see `to_device`)."""
    return to_device(x, like.device, like.dtype)


def constants(values: object, like: Tensor) -> Tensor:
    """Numbers, in any nesting of sequences, as a tensor on the device and in the dtype of `like` (see `to_device`)."""
    return to_device(torch.tensor(values, dtype=like.dtype), like.device)


def widest(device: torch.device | str) -> torch.dtype:
    """The widest floating-point dtype to sum in on a device: float64 on the CPU and on CUDA, float32 elsewhere (MPS has no float64)."""
    return torch.float64 if torch.device(device).type in ("cpu", "cuda") else torch.float32
