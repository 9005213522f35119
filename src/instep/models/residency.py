"""Networks that take turns on a device, for runs whose networks do not fit there together."""

from __future__ import annotations

import torch
from torch import nn

from instep.models.borrow import tensors_of


class Residency:
    """Keeps networks in host memory and the one that is used on the device.

    A network is on the device from its forward pass on until another one is used. Whoever writes into weights that are not trained calls `clear` first: only
    trained ones are taken home. A forward pass with a graph is computed again in the backward pass
    (`core/rows.py`), so a network comes back for its own backward pass and needs no place before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._here: nn.Module | None = None
        self._home: list[torch.Tensor] = []

    @torch.no_grad()
    def use(self, module: nn.Module) -> None:
        """Brings a network to the device, and takes the one that is there home: its trained weights are copied, frozen ones are still there."""
        if module is self._here:
            return
        self.clear()
        tensors = tensors_of(module).values()
        self._here, self._home = module, [p.data for p in tensors]
        for p in tensors:
            p.data = self.moved(p.data)

    def moved(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor on the device."""
        return x.to(self.device, non_blocking=self.device.type != "cpu")

    @torch.no_grad()
    def clear(self) -> None:
        """Leaves no network on the device."""
        if self._here is None:
            return
        for p, home in zip(tensors_of(self._here).values(), self._home, strict=True):
            if p.requires_grad:
                home.copy_(p.data)
            p.data = home
        self._here, self._home = None, []
