"""Tensors that several processes hold in shards (DTensor, as FSDP2 makes them): each whole again for a file, and shards taken from whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    if type(x) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def whole(x: Tensor) -> Tensor:
    """The whole tensor, of any shape, on the device of its shards. Of a sharded tensor every process calls this, and each gets it."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor; a shard may be empty."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def like(target: Tensor, value: Tensor) -> Tensor:
    """`value`, which every process has whole, in the shards of `target`, which has its shape. Nothing is sent."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)  # type: ignore[attr-defined]


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copies `value`, which every process has whole, into `target`, in place; dtype and device remain those of `target`."""
    target.copy_(like(target, value))
