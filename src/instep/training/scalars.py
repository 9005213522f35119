"""The scalars of one iteration, and what is decided by them: read from the device in one go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from instep.core.ranks import ALONE, Ranks
from instep.diffusion.transfer import widest
from instep.methods.term import raise_unless


class Scalars:
    """Scalars of one iteration, averaged over micro-batches, epochs and updates, and conditions that are looked at with them.

    They stay on their device until `settle`, which copies them to the host in one go. With several `ranks` a scalar is the mean over them, and a condition is
    true if it is on all of them.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._values: dict[str, list[Tensor]] = {}
        self._waiting: list[tuple[str, Tensor, Tensor]] = []
        self._flags: list[tuple[Tensor, Callable[[bool], None]]] = []
        self._read: list[tuple[Tensor, Callable[[float], None]]] = []

    def add(self, name: str, value: Tensor, there: Tensor | None = None) -> None:
        """Adds a scalar. `there` is the part of the rows at hand that it is the mean of (None: all); where that turns out to be 0, it is left out."""
        self._waiting.append((name, value, torch.ones(()) if there is None else there))

    def after(self, flag: Tensor, then: Callable[[bool], None]) -> None:
        """Calls `then` with the value of a scalar tensor as soon as it is known, in the order in which they were given."""
        self._flags.append((flag, then))

    def read(self, value: Tensor, then: Callable[[float], None]) -> None:
        """Calls `then` with the value of a scalar tensor as soon as it is known, before any condition is looked at."""
        self._read.append((value, then))

    def require(self, true: Tensor, error: Callable[[], Exception]) -> None:
        """Raises `error()` from `settle` unless the scalar tensor is true."""
        self._flags.append((true, partial(raise_unless, error=error)))

    def settle(self) -> None:
        """Waits for the device: what was added becomes numbers, and the flags are known."""
        flags, self._flags = self._flags, []
        waiting, self._waiting = self._waiting, []
        read, self._read = self._read, []
        scalars = (*(flag for flag, _ in flags), *(part for _, value, there in waiting for part in (value, there)), *(value for value, _ in read))
        known = iter(self._of_all(on_host([tensor.to(widest(tensor.device)) for tensor in scalars]), len(flags), len(waiting)))
        answers = [bool(next(known)) for _ in flags]
        for name, _, _ in waiting:
            value, there = next(known), next(known)
            if there:
                self._values.setdefault(name, []).append(value)
        values = [float(next(known)) for _ in read]
        for (_, use), number in zip(read, values, strict=True):
            use(number)
        for (_, then), answer in zip(flags, answers, strict=True):
            then(answer)

    def _of_all(self, known: list[Tensor], flags: int, waiting: int) -> list[Tensor]:
        """Of flags, of values each with whether it is there, and of plain values: those of all ranks."""
        if self._ranks.count == 1 or not known:
            return known
        for i in range(flags, flags + 2 * waiting, 2):
            known[i] = torch.where(known[i + 1] > 0, known[i] * known[i + 1], 0.0)
        means = list(self._ranks.mean(torch.stack([x.double() for x in known])).unbind())
        for i in range(flags, flags + 2 * waiting, 2):
            means[i] = means[i] / means[i + 1]
        return [(x == 1).double() for x in means[:flags]] + means[flags:]

    def means(self) -> dict[str, float]:
        return {name: float(torch.stack(values).mean()) for name, values in self._values.items()}


def on_host(values: Sequence[Tensor]) -> list[Tensor]:
    """Scalar tensors of any device on the host, with one copy a device."""
    found: list[Tensor] = list(values)
    by_device: dict[torch.device, list[int]] = {}
    for i, value in enumerate(found):
        by_device.setdefault(value.device, []).append(i)
    for rows in by_device.values():
        for i, value in zip(rows, torch.stack([found[i].detach().reshape(()) for i in rows]).cpu().unbind(), strict=True):
            found[i] = value
    return found
