"""A short run whose process kills itself, for `test_ranks_faults.py`; by hand: FAULT=rollout RANK=0 WORLD_SIZE=1 python tests/faulty_ranks.py OUT."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import every_recipe
import torch
from torch import Tensor

from instep.cli import main as command_line
from instep.core import elsewhere
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


def run(out: Path, stops_at: int | None = None) -> Run:
    """A run that ends in a student; this process gets SIGTERM in its iteration to the step `stops_at`."""
    recipe = find("dm-align-group")(Common(steps=2, batch=4, critic_updates=1, ema=0.9), distil=0, iterations=STEPS, group=2, top_n=1)
    options = RunOptions(save_every=1, keep=9, probe_every=STEPS, terms_every=0, execution=Execution(device="cpu"))
    if stops_at is not None:
        real = loop.iteration

        def stopping(state: Any, *args: Any) -> Any:
            if state.step + 1 == stops_at:
                os.kill(os.getpid(), signal.SIGTERM)
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
}


def main(out: str) -> int:
    torch.set_num_threads(1)
    elsewhere.LATER, elsewhere.LAST = 0.1, 0.2
    who, break_it = FAULTS.get(os.environ.get("FAULT", ""), (None, None))
    if break_it is not None and who == int(os.environ["RANK"]):
        break_it()

    def command(args: object) -> int:
        try:
            run(Path(out), int(os.environ["STOPS_AT"]) if "STOPS_AT" in os.environ else None)
        except Interrupted:
            return 130
        return 0

    command_line._train = command
    return command_line.main(["train"])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
