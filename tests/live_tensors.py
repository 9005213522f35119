"""Counts the bytes of tensors that are alive while something runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Live:
    """`peak`: most bytes at once of storages that did not exist before, in the block and as long as its operations saw them."""

    peak: int = 0
    now: int = 0
    before: dict[int, StorageWeakRef] = field(default_factory=dict)
    known: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)

    def see(self, x: Tensor) -> None:
        if x.device.type == "meta":
            return
        storage = x.untyped_storage()
        key = storage._cdata
        for ref in (self.before.get(key), self.known.get(key, (None, 0))[0]):
            if ref is not None and not ref.expired():
                return
        for old, (ref, size) in list(self.known.items()):
            if ref.expired():
                self.now -= size
                del self.known[old]
        self.known[key] = (StorageWeakRef(storage), storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)


class _Watch(TorchDispatchMode):
    def __init__(self, live: Live) -> None:
        super().__init__()
        self.live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, Tensor):
                self.live.see(x)
        return result


@contextmanager
def live_bytes(before: Iterable[Tensor]) -> Iterator[Live]:
    """Counts within the block; the storages of `before` are not extra."""
    storages = (x.untyped_storage() for x in before)
    live = Live(before={storage._cdata: StorageWeakRef(storage) for storage in storages})
    with _Watch(live):
        yield live
