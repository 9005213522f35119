"""Rows that train: a reward that fails in the middle, and signals to the program. All are slow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from faults.identity import PROMPTS, family
from faults.sandbox import Fault, Outcome
from instep.recipes.common import Common
from instep.recipes.dm_align import dm_align_group
from instep.rewards.base import RewardError
from instep.training import checkpoint
from instep.training.options import RunOptions
from instep.training.run import train

RECIPE = dm_align_group(Common(batch=4, critic_updates=1, steps=2), distil=1, iterations=4, group=2, top_n=1)
RARELY = RunOptions(save_every=100, probe_every=100)


class Failing:
    """A reward that fails, once, in the given call; the same reward otherwise."""

    name, differentiable, space = "failing", False, "pixel"

    def __init__(self, at: int | None, exits: bool) -> None:
        self.at, self.exits, self.calls = at, exits, 0

    def score(self, media, prompts):
        self.calls += 1
        if self.calls == self.at:
            if self.exits:
                sys.exit(3)
            raise ConnectionError("gone")
        return media.mean((1, 2, 3, 4))


def weights(out: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.load(checkpoint.latest(out / "checkpoints"))
    return {f"{role}/{key}": value for role, state in saved["roles"].items() for key, value in state.items()}


def fails(exits: bool, folder: Path) -> Outcome:
    """Fails in iteration 4 of 5, is repeated with a reward that works, and is compared with a run that was never interrupted."""
    start = time.perf_counter()
    reward = Failing(None, exits)
    train(RECIPE, family(), out=folder / "whole", prompts=PROMPTS, reward=reward, options=RARELY)
    count, message = reward.calls, ""
    # calls: the check, the probe at the start, that of stage ends, one an iteration
    for at in range(count - 3, 0, -1):
        try:
            train(RECIPE, family(), out=folder / f"{at}", prompts=PROMPTS, reward=Failing(at, exits), options=RARELY)
        except RewardError as error:
            message = str(error)
            if "of 5; saved at step" in message:
                break
    step = checkpoint.step_of(checkpoint.latest(folder / f"{at}" / "checkpoints"))
    train(RECIPE, family(), out=folder / f"{at}", prompts=PROMPTS, reward=Failing(None, exits), options=RARELY)
    one, other = weights(folder / "whole"), weights(folder / f"{at}")
    good = all(torch.equal(one[key], other[key]) for key in one) and one.keys() == other.keys() and step > 1 and "runs.py, line" in message
    return Outcome(good, f"saved at step {step}; the repeated run ends with identical weights: {good}", time.perf_counter() - start)


def twice(folder: Path) -> Outcome:
    """Two SIGINT to `instep train`, as fast as a hand sends them."""
    start = time.perf_counter()
    line = [sys.executable, "-m", "instep", "train", "dmd2", "--iterations", "500", "--batch", "2", "--out", "run", "--threads", "1"]
    process = subprocess.Popen(line, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment(), preexec_fn=hears)
    while not (folder / "run" / "log.jsonl").is_file() and process.poll() is None and time.perf_counter() - start < 200:
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=120)[1]
    good = process.returncode == 130 and "Traceback" not in err
    return Outcome(good, f"status {process.returncode}: {' '.join(err.split())[-120:]}", time.perf_counter() - start)


def at_start(seconds: float, folder: Path) -> Outcome:
    start = time.perf_counter()
    line = [sys.executable, "-m", "instep", "train", "dmd2"]
    process = subprocess.Popen(line, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=hears)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=120)[1]
    good = process.returncode in (130, -signal.SIGINT) and "Traceback" not in err
    return Outcome(good, f"status {process.returncode}: {' '.join(err.split())[-120:] or 'nothing printed'}", time.perf_counter() - start)


def hears() -> None:
    """SIGINT ends this process, as it does one that a terminal starts: a shell has what it starts in the background ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}


FAULTS = (
    Fault(
        7, "a reward raises in the middle of a run", "the last whole iteration is saved; the run that is repeated ends alike", partial(fails, False), slow=True
    ),
    Fault(7, "a reward calls sys.exit in the middle of a run", "the same", partial(fails, True), slow=True),
    Fault(8, "Ctrl-C twice in training", "status 130, no traceback", twice, slow=True),
    Fault(8, "Ctrl-C 2 seconds after the start", "status 130, no traceback", partial(at_start, 2.0), slow=True),
)
