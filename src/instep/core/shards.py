"""Tensors that are divided among the processes of a run, torch's DTensors; every function takes plain ones too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from instep.core.ranks import Ranks


def local(x: Tensor) -> Tensor:
    """This process's part, a view; a plain tensor is its own."""
    return x.to_local() if isinstance(x, DTensor) else x


def is_shared(x: Tensor) -> bool:
    """Whether a tensor is one of all processes, divided among them or the same on each: `whole` is called by all of them together."""
    return isinstance(x, DTensor)


def is_divided(x: Tensor) -> bool:
    """Whether each process holds a part of its own."""
    return isinstance(x, DTensor) and not all(isinstance(placement, Replicate) for placement in x.placements)


def whole(x: Tensor) -> Tensor:
    """All of it, on every process: a collective where it is divided."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, laid out as `like` is and in its dtype; nothing is sent."""
    if not isinstance(like, DTensor):
        return full.to(like)
    return distribute_tensor(full.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def assign(x: Tensor, value: Tensor) -> None:
    """Puts a value, whole or laid out alike, in the place of a tensor's."""
    local(x).copy_(local(value) if isinstance(value, DTensor) else local(part_of(value, x)))


def total_norm(tensors: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """The norm of all tensors together, a scalar; where some are divided, by one collective."""
    alone = torch.nn.utils.get_total_norm([local(x) for x in tensors if not is_divided(x)])
    divided = [local(x) for x in tensors if is_divided(x)]
    if not divided:
        return alone
    here = torch.nn.utils.get_total_norm(divided)
    return (alone.to(here).square() + ranks.mean(here.square()) * ranks.count).sqrt()
