"""A network whose weights are divided among the processes of a run, by PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`).

Each block, and the rest of the network, is a unit: its weights are gathered for its forward and for its backward pass, and freed after each. Gradients are
averaged over the processes as they are divided. Adapters, heads and embeddings of exits stay whole on every process: they are small, and gathering them for
each pass would send more than one average a step does.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from instep.core.ranks import Ranks


class Mismatch(ValueError):
    """The processes of a run called different networks, or the same one with other rows."""


def mesh_of(ranks: Ranks, device: torch.device) -> DeviceMesh:
    """All processes of the run, on their devices."""
    return init_device_mesh(device.type, (ranks.count,))


@dataclass(frozen=True)
class Sharded:
    """The network of a backbone, `name`, on `ranks`. With `guarded` each call is compared across ranks before it is made.

    A call of a sharded network is a collective, which all ranks make alike. Ranks that call two networks of equal shapes, each another one, get wrong numbers
    and no error, so debug runs (TORCH_DISTRIBUTED_DEBUG=INFO or DETAIL) and the tests are guarded. Of two experts all ranks call those that any of them needs.
    """

    name: str
    ranks: Ranks
    guarded: bool = False

    def needed(self, experts: Tensor) -> Tensor:
        """Which experts [2] are called, where this rank's samples need these."""
        return experts if self.ranks.led.active else self.ranks.any_of(experts)

    def check(self, role: str, rows: int) -> None:
        """Raises Mismatch unless all ranks call the same role of the same network with as many rows."""
        if not self.guarded or self.ranks.led.active:
            return
        graph = "with" if torch.is_grad_enabled() else "without"
        calls = self.ranks.of_each(f"{role} (network {self.name}), {rows} rows, {graph} a graph")
        if len(set(calls)) > 1:
            told = "; ".join(f"rank {i}: {call}" for i, call in enumerate(calls))
            raise Mismatch(
                f"the processes called different networks at once, which gives wrong numbers: {told}; a force, objective or reward of your own must "
                "call the same roles with as many rows on every rank"
            )


def shard(
    parts: Mapping[str, nn.Module],
    trained: Mapping[str, bool],
    apart: Collection[nn.Module],
    dtype: torch.dtype,
    mesh: DeviceMesh,
    ranks: Ranks,
    device: torch.device,
) -> None:
    """Divides the parts of a network in place, a block at a time, and leaves each process's share on `device`.

    The precision is that of one device: networks compute in `dtype`, gradients are averaged in float32 or better, and what diffusers keeps in float32 stays
    so and is whole on every process. So are the modules in `apart`, which are called outside of their blocks too, where nothing gathers them. Trained weights
    are divided in float32 and rounded where they are gathered, so that the optimiser needs no other copy of them. The tensors of the parts are not changed:
    others may hold them.
    """
    # of a root whose output is a view, which a family reads and does not write into
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    whole = {p for module in apart for p in module.parameters()}
    for name, part in parts.items():
        _shard_part(part, trained[name], whole, dtype, mesh, device)
        for unit in [*units(part), part]:
            number = len(ranks.led.steps)
            ranks.led.register(partial(_pass, unit))
            unit.register_forward_pre_hook(partial(_announce, ranks, number), prepend=True)
            unit.register_forward_hook(partial(_after, unit is part))
        part._get_fsdp_state()._lazy_init()  # type: ignore[operator]


def _shard_part(part: nn.Module, trained: bool, whole: Collection[nn.Parameter], dtype: torch.dtype, mesh: DeviceMesh, device: torch.device) -> None:
    rounded = dtype in (torch.bfloat16, torch.float16)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if rounded and trained else None, reduce_dtype=torch.float32 if rounded else None, cast_forward_inputs=False
    )
    apart = {p for key, p in part.named_parameters() if p.dtype != dtype or ".lora_" in key or p in whole}
    for p in apart:
        p.data = p.data.to(device, copy=True)
    for unit in [*units(part), part]:
        if rounded and trained:
            for p in unit.parameters():
                if p not in apart and not isinstance(p, DTensor):
                    p.data = p.data.float()
        fully_shard(unit, mesh=mesh, reshard_after_forward=unit is not part, mp_policy=policy, ignored_params=apart)


def units(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network: those that diffusers names as repeated, else the members of its lists."""
    names = getattr(network, "_repeated_blocks", None) or ()
    named = [module for module in network.modules() if type(module).__name__.removeprefix("FSDP") in names]
    return named or [block for blocks in network.children() if isinstance(blocks, nn.ModuleList) for block in blocks]


def _announce(ranks: Ranks, number: int, module: nn.Module, args: Any) -> None:
    ranks.led.announce(number)


def _pass(unit: Any) -> None:
    """A unit's part in a forward pass of rank 0."""
    unit.unshard()
    unit.reshard()


def free(parts: Iterable[Any]) -> None:
    """Frees what is still whole of networks whose weights are about to change: the next call gathers the new ones."""
    for part in parts:
        part.reshard()


def _after(outermost: bool, unit: Any, args: Any, output: Any) -> None:
    """Frees a unit's weights after a pass where FSDP2 keeps them.

    - In a forward pass that is computed again within a backward pass, of a micro-batched network: all blocks would be whole at once. Those of a block that is
      in its own backward pass stay.
    - The outermost unit's, after a pass without a graph: the weights would stay whole while their parts are stepped. With a graph they stay for the backward
      pass, which may begin inside (a discriminator's features) where no hook of FSDP2 gathers them again.

    Also drops the order of passes without a graph, which FSDP2 would keep for a backward pass that never comes.
    """
    state = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch before 2.13
    if torch._C._current_graph_task_id() != -1:
        if not outermost and all(group._training_state.name != "PRE_BACKWARD" for group in groups):
            unit.reshard()
    elif not any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(output)):
        unit.reshard()
        for group in groups:
            if group._post_forward_indices:
                group._post_forward_indices.pop()
                group.comm_ctx.post_forward_order.pop()
