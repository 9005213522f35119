"""Writes a run's checkpoints. On an accelerator the state is copied to host memory, and a thread writes it while the loop goes on."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path

import torch

from instep.core.ranks import ALONE, Ranks
from instep.core.shards import whole
from instep.training import checkpoint
from instep.training.execution import Execution
from instep.training.state_files import State, sharded, split


def in_background(device: torch.device, execution: Execution) -> bool:
    """Whether a run's checkpoints are written by a thread: where the state is on an accelerator, so that host memory has room for one copy.

    A thread would take the processor from a run on a CPU. Under offload the state is in host memory already, and a copy would double it.
    """
    return device.type not in ("cpu", "meta") and not execution.offload


class CheckpointWriter:
    """Writes checkpoints into `folder`, the newest `keep` of which stay; in the background at most one at a time. Of several `ranks` the first one writes.

    The files are the same either way. A checkpoint in flight appears whole or not at all, whatever ends the process; a normal exit waits for it, because
    the thread is no daemon. What went wrong in the thread is raised by the next `check`, `wait` or `save`.
    """

    def __init__(self, folder: Path, keep: int, *, background: bool, ranks: Ranks = ALONE) -> None:
        self.folder, self.keep, self.background, self.ranks = folder, keep, background, ranks
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: State, protect: Collection[int] = ()) -> None:
        """Saves the state of `step` as it is now (`checkpoint.save`); in the background it returns once the state is copied.

        Every rank calls it. A state in shards becomes whole one tensor at a time, which rank 0 writes at once: a copy would need host memory for all of it.
        """
        self.wait()
        values, tensors = split(state)
        shared = self.ranks.of_first(lambda: sharded(tensors))
        if not self.ranks.first:
            for name in shared:
                whole(tensors[name])
            return
        if shared or not self.background:
            checkpoint.write_state(self.folder, step, values, tensors, keep=self.keep, protect=protect)
            return
        copied = {name: x.to("cpu", copy=True) for name, x in tensors.items()}

        def write() -> None:
            try:
                checkpoint.write_state(self.folder, step, values, copied, keep=self.keep, protect=protect)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name=f"checkpoint of step {step}")
        self._thread.start()

    def check(self) -> None:
        """Raises what went wrong in a write that has ended; does not wait."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        """Waits for the checkpoint in flight, whether it succeeds or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Waits for the checkpoint in flight, and raises what went wrong."""
        self.join()
        self.check()
