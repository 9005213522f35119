"""The processes that share a run, by torch.distributed: which of them this is, and what they compute together. One process is the case of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from instep.core.elsewhere import Elsewhere, Lost
from instep.core.led import END, Led

T = TypeVar("T")
# bytes of gradients that are sent in one collective
BUCKET = 2**26
# how long a process waits for another one within an iteration, and for rank 0 where that works alone: it probes, saves and exports
PATIENCE, WORK = timedelta(minutes=10), timedelta(minutes=60)


@dataclass(frozen=True)
class Ranks:
    """This process's `rank` among the `count` that share a run, `local` of them on this machine.

    Every rank calls every method that has a collective, in the same order. `work` is the process group in which they wait for what rank 0 does alone, up to
    `WORK`; None: that of all other collectives, whose time-out is the run's patience. `led` are the steps that rank 0 cannot take alone (sharded networks),
    while it does something alone. Each `context` consecutive ranks compute the same samples together (`models/context.py`); `peers` is their process group.
    """

    rank: int = 0
    count: int = 1
    local: int = 1
    work: dist.ProcessGroup | None = None
    led: Led = field(default_factory=Led, compare=False)
    context: int = 1
    peers: dist.ProcessGroup | None = None

    @property
    def parts(self) -> int:
        """In how many shares a batch is divided."""
        return self.count // self.context

    @property
    def part(self) -> int:
        """Which of them is this process's."""
        return self.rank // self.context

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, prints and probes."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This rank's consecutive share of n rows, a multiple of the number of shares."""
        each, left = divmod(n, self.parts)
        assert not left, f"{n} rows are no multiple of {self.parts} shares"
        return slice(self.part * each, (self.part + 1) * each)

    def alike(self, x: Tensor) -> Tensor:
        """What the first of the ranks that compute the same samples has, of a tensor that each of them has: scores may differ from call to call."""
        if self.context > 1 and not self.led.active:
            x = x.detach().clone()
            with _together():
                dist.broadcast(x, self.part * self.context, group=self.peers)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """The mean over ranks of a tensor of any shape, on its device."""
        if self.count == 1:
            return x
        total = x.detach().clone()
        with _together():
            dist.all_reduce(total)
        return total / self.count

    def most(self, x: int) -> int:
        """The largest of the ranks' numbers, once rank 0 has done what it does alone."""
        if self.count == 1:
            return x
        found = torch.tensor(x)
        with _together():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.work)
        return int(found)

    def any_of(self, flags: Tensor) -> Tensor:
        """Which of the flags [n], on the host, are true on any rank."""
        if self.count == 1:
            return flags
        found = flags.to(torch.uint8)
        with _together():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.bool()

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
                with self.leading():
                    answer = {"value": make()}
            except Exception as raised:
                error, answer = raised, {"error": f"{raised}"}
        else:
            self.follow()
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
                with self.leading():
                    yield
            except Exception as error:
                self._tell(error)
                raise
            self._tell(None)
        else:
            self.of_first(lambda: None)
            yield

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Rank 0 does what is inside alone, and the others `follow` meanwhile; without steps that need them nothing is sent."""
        led = self.led
        if self.count == 1 or not led.steps or led.active:
            yield
            return
        led.active, led.send = True, self._announce
        try:
            yield
        finally:
            led.active = False
            self._announce(END)

    def follow(self) -> None:
        """Takes part in what rank 0 announces, until it is done with what it does alone."""
        if self.count == 1 or not self.led.steps:
            return
        while (number := self._announced(0)) != END:
            self.led.steps[number]()

    def _announce(self, number: int) -> None:
        self._announced(number)

    def _announced(self, number: int) -> int:
        told = torch.tensor(number)
        with _together():
            dist.broadcast(told, 0, group=self.work)
        return int(told)

    def of_each(self, what: str) -> list[str]:
        """What each rank gives, in up to 200 characters."""
        data = torch.zeros(800, dtype=torch.uint8)
        text = what[:200].encode()
        data[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        found = [torch.empty_like(data) for _ in range(self.count)]
        with _together():
            dist.all_gather(found, data)
        return [bytes(x.numpy()).rstrip(b"\0").decode() for x in found]

    def _tell(self, error: Exception | None) -> None:
        if self.count > 1:
            self._sent(json.dumps({"value": None} if error is None else {"error": f"{error}"}).encode())

    def _sent(self, data: bytes) -> bytes:
        """Rank 0's bytes."""
        with _together():
            size = torch.tensor(len(data))
            dist.broadcast(size, 0, group=self.work)
            sent = torch.empty(int(size), dtype=torch.uint8)
            if self.first:
                sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(sent, 0, group=self.work)
        return sent.numpy().tobytes()


ALONE = Ranks()


@contextmanager
def joined(patience: timedelta = PATIENCE, context: int = 1) -> Iterator[Ranks]:
    """The ranks of this process, as torchrun starts them (its environment), and their process group for as long as the block runs; `ALONE` without torchrun.

    Each process is on the accelerator of its local rank, if there are enough; tensors there are sent by NCCL, those in host memory by gloo. `patience` is the
    time after which a process that waits for another one raises Lost; where rank 0 works alone it is `WORK`, if that is longer. A group that the caller
    made is used as it is, with its own time-out. Each `context` processes compute the same samples; raises ValueError unless it divides their number.
    """
    local, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if dist.is_available() and dist.is_initialized():
        with _of_group(here, patience, context) as ranks:
            yield ranks
        return
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        _check_context(1, context)
        yield ALONE
        return
    fits = torch.accelerator.is_available() and torch.accelerator.device_count() >= here
    if fits:
        torch.accelerator.set_device_index(local)
    with _together():
        backend = "cpu:gloo,cuda:nccl" if fits and torch.cuda.is_available() else "gloo"
        store, rank, count = _met(patience)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=patience)
    try:
        with _of_group(here, patience, context) as ranks:
            yield ranks
    finally:
        dist.destroy_process_group()


@contextmanager
def _of_group(local: int, patience: timedelta, context: int) -> Iterator[Ranks]:
    """The ranks of the process group that there is."""
    rank, count = dist.get_rank(), dist.get_world_size()
    _check_context(count, context)
    with _waiting(patience) as work:
        peers = None
        if context > 1:
            with _together():
                peers, _ = dist.new_subgroups(context, timeout=patience)
        yield Ranks(rank, count, local, work, context=context, peers=peers)


def _check_context(count: int, context: int) -> None:
    if count % context:
        raise ValueError(
            f"context_parallel: {context} is not allowed for {count} {'processes' if count > 1 else 'process'}; give a divisor, or start more (torchrun)"
        )


def _met(patience: timedelta) -> tuple[dist.Store, int, int]:
    """The store in which the processes of this start find each other, the rank and the number of ranks.

    With --max-restarts on one machine torchrun starts processes again beside one store, in which torch 2.13 would find the addresses of those that have
    ended. So each start has keys of its own. On several machines the starts are not counted alike.
    """
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://", timeout=patience))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store, rank, count


@contextmanager
def _waiting(patience: timedelta) -> Iterator[dist.ProcessGroup]:
    """The process group of the waits for rank 0. It ends with the group of all ranks: what a caller does with the ranks of a finished run waits in it too."""
    with _together():
        group = dist.new_group(backend="gloo", timeout=max(WORK, patience))
    yield group


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
