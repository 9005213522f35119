"""A second device on a machine that has none: torch's meta device, and a mode that looks at every operation.

Tensors of the run are on `meta` and have no values. An operation that mixes them with tensors of the host raises, as it would with a GPU, and so does whatever
waits for the device: reading a value, choosing rows by a mask, copying back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from instep.training.state import TrainedParams, TrainState

# what may take tensors of both: copies, and indices on the host
BOTH = ("aten.copy_", "aten._to_copy", "aten.index.", "aten.index_put")


class NoMixing(TorchDispatchMode):
    """Raises for an operation on tensors of two devices, but for scalars of the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        kinds = {tensor.device.type for tensor in tensors if tensor.ndim or tensor.device.type != "cpu"}
        if len(kinds) > 1 and not str(func).startswith(BOTH):
            raise RuntimeError(f"{func} mixes devices: {[(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]}")
        return func(*args, **(kwargs or {}))


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
