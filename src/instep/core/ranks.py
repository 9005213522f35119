"""The processes that share a run, by torch.distributed: which of them this is, and what they compute together. One process is the case of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from instep.core.elsewhere import Elsewhere, Lost

T = TypeVar("T")
# bytes of gradients that are sent in one collective
BUCKET = 2**26
# how long a process waits for the others: rank 0 alone probes and exports
PATIENCE = timedelta(minutes=60)


@dataclass(frozen=True)
class Ranks:
    """This process's `rank` among the `count` that share a run, `local` of them on this machine.

    Every rank calls every method that has a collective, in the same order.
    """

    rank: int = 0
    count: int = 1
    local: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, prints and probes."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This rank's consecutive share of n rows, a multiple of the ranks' number."""
        each, left = divmod(n, self.count)
        assert not left, f"{n} rows are no multiple of {self.count} ranks"
        return slice(self.rank * each, (self.rank + 1) * each)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over ranks of a tensor of any shape, on its device."""
        if self.count == 1:
            return x
        total = x.detach().clone()
        with _together():
            dist.all_reduce(total)
        return total / self.count

    def most(self, x: int) -> int:
        """The largest of the ranks' numbers."""
        if self.count == 1:
            return x
        found = torch.tensor(x)
        with _together():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Puts the mean over ranks in place of each tensor, several in one collective."""
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([x.flatten() for x in bucket])
            with _together():
                dist.all_reduce(flat)
            flat /= self.count
            for x, mean in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
                x.copy_(mean.view_as(x))

    def of_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, a JSON value, on every rank, once it has returned. Raises its error there and `Elsewhere` in the others."""
        if self.count == 1:
            return make()
        answer: dict[str, Any] = {}
        error: Exception | None = None
        if self.first:
            try:
                answer = {"value": make()}
            except Exception as raised:
                error, answer = raised, {"error": f"{raised}"}
        answer = json.loads(self._sent(json.dumps(answer).encode()))
        if error is not None:
            raise error
        if "error" in answer:
            raise Elsewhere(answer["error"])
        return answer["value"]

    def agree(self, error: Exception | None) -> None:
        """Called on every rank with the error of what each did alone, None where it went well. If one failed all raise: rank 0 the first error, the others
        `Elsewhere`."""
        if self.count == 1:
            if error is not None:
                raise error
            return
        found: list[str | None] = [None] * self.count
        with _together():
            dist.all_gather_object(found, None if error is None else str(error))
        text = next((text for text in found if text is not None), None)
        if text is not None:
            raise (error or ValueError(text)) if self.first else Elsewhere(text)

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Rank 0 does what is inside first, and the others follow: they find what it has left on the disk."""
        if self.first:
            try:
                yield
            except Exception as error:
                self._tell(error)
                raise
            self._tell(None)
        else:
            self.of_first(lambda: None)
            yield

    def _tell(self, error: Exception | None) -> None:
        if self.count > 1:
            self._sent(json.dumps({"value": None} if error is None else {"error": f"{error}"}).encode())

    def _sent(self, data: bytes) -> bytes:
        """Rank 0's bytes."""
        with _together():
            size = torch.tensor(len(data))
            dist.broadcast(size, 0)
            sent = torch.empty(int(size), dtype=torch.uint8)
            if self.first:
                sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(sent, 0)
        return sent.numpy().tobytes()


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this process, as torchrun starts them (its environment), and their process group for as long as the block runs; `ALONE` without torchrun.

    Each process is on the accelerator of its local rank, if there are enough; tensors there are sent by NCCL, those in host memory by gloo. A group that the
    caller made is used as it is.
    """
    local, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), here)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield ALONE
        return
    fits = torch.accelerator.is_available() and torch.accelerator.device_count() >= here
    if fits:
        torch.accelerator.set_device_index(local)
    with _together():
        dist.init_process_group("cpu:gloo,cuda:nccl" if fits and torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), here)
    finally:
        dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    """Raises Lost for a collective that failed."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise Lost(f"another process of this run has ended or does not answer ({reason}); the same command goes on from the newest checkpoint") from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one device and dtype, at most `BUCKET` bytes of them unless one is larger."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for x in tensors:
        kinds.setdefault((x.device, x.dtype), []).append(x)
    for same in kinds.values():
        bucket: list[Tensor] = []
        for x in same:
            if bucket and sum(y.nbytes for y in bucket) + x.nbytes > BUCKET:
                yield bucket
                bucket = []
            bucket.append(x)
        yield bucket
