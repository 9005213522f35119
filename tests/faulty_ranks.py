"""Runs of several processes that end in faults, for `test_ranks_faults.py`; one after another, as a JSON file lists them: python tests/faulty_ranks.py JOBS.

The processes of a job are forked, so that torch and diffusers are imported once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import every_recipe
import sharded_state
import torch
from little_drawn import shorten
from torch import Tensor

from instep.cli import main as command_line
from instep.core import elsewhere
from instep.core.ranks import joined
from instep.export import weights
from instep.recipes import find
from instep.recipes.common import Common
from instep.rewards.base import FunctionReward
from instep.training import loop, state_files, step
from instep.training.execution import Execution
from instep.training.loop import Interrupted
from instep.training.options import RunOptions
from instep.training.run import Run, train

# iterations of the run, and the one in which a process dies; a checkpoint follows each
STEPS, DIES_AT = 4, 3


def run(out: Path, stops_at: int | None = None, patience: float = 10) -> Run:
    """A run that ends in a student; this process gets SIGUSR1 in its iteration to the step `stops_at`."""
    recipe = find("dm-align-group")(Common(steps=2, batch=4, critic_updates=1, ema=0.9), distil=0, iterations=STEPS, group=2, top_n=1)
    options = RunOptions(save_every=1, keep=9, probe_every=STEPS, terms_every=0, patience=patience, execution=Execution(device="cpu"))
    if stops_at is not None:
        real = loop.iteration

        def stopping(state: Any, *args: Any) -> Any:
            if state.step + 1 == stops_at:
                os.kill(os.getpid(), signal.SIGUSR1)
            return real(state, *args)

        loop.iteration = stopping
    reward = FunctionReward(_brightness, "brightness")
    try:
        return train(recipe, every_recipe.family(), out=out, prompts=every_recipe.PROMPTS, reward=reward, options=options)
    finally:
        if stops_at is not None:
            loop.iteration = real


def _brightness(media: Tensor, prompts: object) -> Tensor:
    return media.mean((1, 2, 3, 4))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _in_rollout() -> None:
    real = step.roll_out

    def dying(state: Any, *args: Any, **options: Any) -> Any:
        return _die() if state.step + 1 == DIES_AT else real(state, *args, **options)

    step.roll_out = dying


def _hangs() -> None:
    real = step.roll_out

    def hanging(state: Any, *args: Any, **options: Any) -> Any:
        if state.step + 1 == DIES_AT:
            time.sleep(3600)
        return real(state, *args, **options)

    step.roll_out = hanging


def _in_critic() -> None:
    real = step.optimizer_step

    def dying(state: Any, name: str, *args: Any) -> Any:
        return _die() if name == "fake" and state.step + 1 == DIES_AT else real(state, name, *args)

    step.optimizer_step = dying


def _after(parts: Iterable[Any], count: int) -> Iterator[Any]:
    """Dies when `count` parts are written, a byte of the next one too."""
    for i, part in enumerate(parts):
        if i == count:
            yield bytes(part)[:1]
            _die()
        yield part


def _in_checkpoint() -> None:
    real = state_files.write

    def dying(path: Path, parts: Iterable[Any]) -> str:
        ours = path.suffix == ".safetensors" and f"step-{DIES_AT:06d}" in str(path)
        return real(path, _after(parts, 20) if ours else parts)

    state_files.write = dying


def _in_export() -> None:
    real = weights.write_parts
    weights.write_parts = lambda path, parts: real(path, _after(parts, 20))


# where a process dies, and which one: only rank 0 writes
FAULTS: dict[str, tuple[int, Callable[[], None]]] = {
    "rollout": (1, _in_rollout),
    "critic": (1, _in_critic),
    "checkpoint": (0, _in_checkpoint),
    "export": (0, _in_export),
    "hangs": (1, _hangs),
}
# seconds in which the others end by themselves, once one has ended
ENDS = 60


def _one(job: Mapping[str, Any], rank: int, port: int) -> int:
    """A process of a job: its exit status. What it writes goes to OUT.RANK.txt."""
    count, out = job["count"], Path(job["out"])
    if count > 1:
        there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in there.items()}
    written = os.open(out.with_name(f"{out.name}.{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    if "steps" in job:
        with joined() as ranks:
            sharded_state.steps(out, ranks, job["steps"], Path(job["to"]) if "to" in job else None)
        return 0
    if "fault" in job and FAULTS[job["fault"]][0] == rank:
        FAULTS[job["fault"]][1]()

    def command(args: object) -> int:
        try:
            run(out, job.get("stops_at"), job.get("patience", 10))
        except Interrupted:
            return 130
        return 0

    command_line._train = command
    return command_line.main(["train"])


def _forked(job: Mapping[str, Any], rank: int, port: int) -> int:
    """The id of a new process of a job."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        torch.set_num_threads(1)
        status = _one(job, rank, port)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def launched(job: Mapping[str, Any]) -> list[int]:
    """The exit status of each process of a job, negative for a signal. Those that do not end soon after the first are killed."""
    if "copy_of" in job:
        shutil.copytree(job["copy_of"], job["out"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = {_forked(job, rank, port): rank for rank in range(job["count"])}
    ended: dict[int, int] = {}
    first = 0.0
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            ended[running.pop(child)] = os.waitstatus_to_exitcode(status)
            first = first or time.monotonic()
        elif first and time.monotonic() > first + job.get("ends", ENDS):
            for other in running:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.05)
    return [ended[rank] for rank in range(job["count"])]


def main(file: str) -> None:
    elsewhere.LATER, elsewhere.LAST = 0.1, 0.2
    shorten()
    jobs = json.loads(Path(file).read_text(encoding="utf-8"))
    Path(f"{file}.ended").write_text(json.dumps([launched(job) for job in jobs]), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
