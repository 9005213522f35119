"""A second device on a machine that has none: torch's meta device, and a mode that looks at every operation.

Tensors of the run are on `meta` and have no values. An operation that mixes them with tensors of the host raises, as it would with a GPU, and so does whatever
waits for the device: reading a value, choosing rows by a mask, copying back, a copy to the device that blocks. So does a float64 tensor on it, which MPS
does not have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from instep.models.borrow import tensors_of
from instep.models.residency import Residency
from instep.training.state import TrainedParams, TrainState

COPIES = ("aten.copy_", "aten._to_copy")


class NoMixing(TorchDispatchMode):
    """Raises for an operation on tensors of two devices, but for scalars of the host; for a copy to the device that blocks; and for float64 on the device.

    Indices on the host of a tensor on the device count as mixed: torch copies them, and waits. `torch.tensor(values, device=...)` copies unseen here.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = self._checked(func, args, kwargs or {})
        wide = [tuple(x.shape) for x in tree_leaves(made) if isinstance(x, torch.Tensor) and x.is_meta and x.dtype == torch.float64]
        if wide:
            raise RuntimeError(f"{func} makes float64 tensors on the device: {wide}")
        return made

    def _checked(self, func: Any, args: Any, kwargs: Any) -> Any:
        if str(func).startswith(COPIES) and _blocks(str(func), args, kwargs):
            raise RuntimeError(f"{func} blocks: {tuple(args[0].shape)} comes to the device without non_blocking")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        kinds = {tensor.device.type for tensor in tensors if tensor.ndim or tensor.device.type != "cpu"}
        if len(kinds) > 1 and not str(func).startswith(COPIES):
            raise RuntimeError(f"{func} mixes devices: {[(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]}")
        return func(*args, **kwargs)


def _blocks(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a copy goes from the host to the device and waits."""
    if name.startswith("aten._to_copy"):
        to = kwargs.get("device")
        return args[0].device.type == "cpu" and to is not None and torch.device(to).type == "meta" and not kwargs.get("non_blocking", False)
    waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    return args[0].is_meta and args[1].device.type == "cpu" and waits


def without_steps(state: TrainState) -> TrainState:
    """The state with optimisers that clear the gradients and leave weights as they are: torch has no AdamW kernel for meta."""

    def step(self: TrainedParams) -> Any:
        def clear(lr: float, optim: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
            missing = [key for key, p in self.masters.items() if p.grad is not None and p.grad.device != p.device]
            assert not missing, missing
            self.optimizer.zero_grad()
            return torch.zeros((), device="meta"), torch.ones((), device="meta", dtype=torch.bool)

        return clear

    for trained in state.trained.values():
        trained.step = step(trained)  # type: ignore[method-assign]
    return state


class Poisoned(Residency):
    """A device with memory of its own, in the host's: its copies are others, and whatever is stale is NaN.

    While a network is on the device its trained weights are NaN on the host; once it left, its copies there are NaN. Frozen weights are the same in both
    places and may be read in either.
    """

    def use(self, module: nn.Module) -> None:
        if module is self._here:
            return
        super().use(module)
        for p, home in zip(tensors_of(module).values(), self._home, strict=True):
            if p.requires_grad:
                home.fill_(torch.nan)

    def moved(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    def clear(self) -> None:
        there = [] if self._here is None else [p.data for p in tensors_of(self._here).values()]
        super().clear()
        for x in there:
            x.fill_(torch.nan if x.is_floating_point() else 0)
