"""The tokens of a sample divided among several processes: diffusers' context parallelism (Ulysses attention), with the gradient of one process.

Between its first block and its last layer a network has a part of each sample's tokens in each process; in attention each process has all tokens of some of the
heads (`ContextParallelConfig`, Jacobs et al. 2023). Outputs are gathered, so everything outside the network has whole samples, the same on each process of a
group. diffusers' own hooks are for inference: its gather passes on a process's part of the gradient, and each process is left with a part of the sum. Here the
part is multiplied by the number of processes, so that the mean over all processes, which a run takes anyway, is the gradient of one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from instep.core.ranks import Ranks

if TYPE_CHECKING:
    from instep.models.family import Family


def check_context(family: Family, count: int) -> None:
    """Raises ValueError for a model whose tokens, or whose heads, `count` processes cannot divide evenly."""
    if count == 1:
        return
    if not family.divides_tokens:
        raise ValueError(f"context_parallel: {count} is not allowed; the samples of {family.name} are not divided among processes (Wan's are); leave it out")
    for name, part in family.parts(family.pretrained).items():
        config: Any = part.config
        tokens = math.prod(n // p for n, p in zip(family.latent_shape[1:], config.patch_size, strict=True))
        for what, number in (("tokens of a sample", tokens), ("heads", config.num_attention_heads)):
            if number % count:
                raise ValueError(f"context_parallel: {count} is not allowed; the {name} of {family.name} has {number} {what}; give a number that divides it")


class ContextParallel:
    """The processes that share each sample of a run: `ranks.context` consecutive ones, on devices of one type."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

        self.ranks, self.count = ranks, ranks.context
        self.config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=self.count))
        mesh = init_device_mesh(device.type, (ranks.parts, 1, self.count), mesh_dim_names=("part", "ring", "ulysses"))
        # diffusers' enable_parallelism asks for an accelerator
        self.config.setup(ranks.rank, ranks.count, device, mesh=mesh)
        self.group, self.place = mesh.get_group("ulysses"), mesh.get_local_rank("ulysses")
        self.on = False
        self._processors: list[Any] = []
        # what rank 0 does alone it does with whole samples: the others are told when it begins and ends
        ranks.led.register(lambda: None)

    def attach(self, network: Any) -> None:
        """Has a network divide its tokens, as its plan in diffusers says."""
        for name, plan in network._cp_plan.items():
            module = network.get_submodule(name)
            if not isinstance(plan, Mapping):
                module.register_forward_hook(partial(self._gather, plan.gather_dim))
                continue
            outputs = {key: one for key, one in plan.items() if one.split_output}
            if outputs:
                module.register_forward_hook(partial(self._split_outputs, outputs))
            inputs = {key: one for key, one in plan.items() if not one.split_output}
            if inputs:
                names = list(inspect.signature(type(module).forward).parameters)[1:]
                module.register_forward_pre_hook(partial(self._split_inputs, inputs, names), with_kwargs=True)
        self._processors += [module.processor for module in network.modules() if hasattr(getattr(module, "processor", None), "_parallel_config")]

    def entered(self, x: Tensor) -> Tensor:
        """A network's input [B, ...], whose gradient is that of all its tokens. Called before each pass."""
        wanted = not self.ranks.led.active
        if wanted != self.on:
            self.on = wanted
            for processor in self._processors:
                processor._parallel_config = self.config if wanted else None
        return _Entered.apply(x, self.group, self.count) if self.on and x.requires_grad else x

    def gathered(self, x: Tensor, dim: int = 1) -> Tensor:
        """All tokens [B, N, ...] of a part of them."""
        return _Gathered.apply(x, dim, self.group, self.count, self.place) if self.on else x

    def _part(self, x: Any, plan: Any) -> Any:
        if not self.on or not isinstance(x, Tensor) or (plan.expected_dims is not None and x.ndim != plan.expected_dims):
            return x
        return x.chunk(self.count, plan.split_dim)[self.place]

    def _split_inputs(self, plans: Mapping[str, Any], names: list[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = list(args)
        for name, plan in plans.items():
            if name in kwargs:
                kwargs[name] = self._part(kwargs[name], plan)
            elif names.index(name) < len(given):
                given[names.index(name)] = self._part(given[names.index(name)], plan)
        return tuple(given), kwargs

    def _split_outputs(self, plans: Mapping[int, Any], module: nn.Module, args: tuple, output: Any) -> Any:
        found = [output] if isinstance(output, Tensor) else list(output)
        for i, plan in plans.items():
            found[i] = self._part(found[i], plan)
        return found[0] if isinstance(output, Tensor) else tuple(found)

    def _gather(self, dim: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.gathered(output, dim)


class _Entered(torch.autograd.Function):
    """The same tensor; its gradient is the mean of all processes', each of which has that of its tokens times their number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, count: int) -> Tensor:
        ctx.group, ctx.count = group, count
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total / ctx.count, None, None


class _Gathered(torch.autograd.Function):
    """The parts of all processes along a dimension; the gradient of a process's part is multiplied by their number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Any, count: int, place: int) -> Tensor:
        ctx.dim, ctx.count, ctx.place = dim, count, place
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(count)]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].chunk(ctx.count, ctx.dim)[ctx.place] * ctx.count, None, None, None, None
