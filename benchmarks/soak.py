"""Long runs that are killed at random moments: does anything grow with the iterations, and do they end like a run that nobody killed?

    python benchmarks/soak.py lab      # 2,000 iterations in the exact laboratory
    python benchmarks/soak.py world    # 300 iterations on moving-digits, in small batches
    make results

Each case trains twice in processes of its own, once undisturbed and once under SIGKILL and SIGTERM, and is started again after each signal. After every
iteration the process notes its resident memory, its open files, its threads, and the size of its log.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from instep.core.files import append_text, write_json
from instep.core.json_lines import read_rows
from instep.diffusion.prediction import Denoiser
from instep.diffusion.sampling import Sampling, sample_ode
from instep.lab.mixture import labels
from instep.lab.run import common, ensemble_state
from instep.lab.world import ODE_STEPS, World, flow_start
from instep.methods.recipe import Recipe, Stage
from instep.methods.term import Batch
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.training import checkpoint
from instep.training.loop import Interrupted, Loop
from instep.training.options import RunOptions
from instep.training.state import TrainState
from instep.training.state_files import split

RESULTS = Path(__file__).parent / "results" / "soak"
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
HELD = ("memory", "files", "threads")
# rows at the beginning of a process that are left out: libraries are imported, and pools filled, by the first iterations
WARM = 20
# what a figure may grow by, as a part of it
TOLERANCE = 0.03


@dataclass(frozen=True)
class Case:
    """How long a run is, how often it saves, and how often it is killed."""

    iterations: int
    save_every: int
    kills: int


CASES: Mapping[str, Case] = {"lab": Case(2000, 25, 12), "world": Case(300, 10, 8)}


# ---------------------------------------------------------------------------------------------------------------------- the process that trains


class Measure:
    """A tracker (`training/log.py`) that appends what this process holds to a file, a row an iteration."""

    def __init__(self, file: Path, log: Path) -> None:
        self.file, self.log = file, log

    def __call__(self, step: int, scalars: Mapping[str, float]) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        row = {
            "process": os.getpid(),
            "step": step,
            "memory": pages * os.sysconf("SC_PAGE_SIZE"),
            "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "log": self.log.stat().st_size,
        }
        append_text(self.file, json.dumps(row) + "\n")


class Draws:
    """The laboratory's batches: drawn from the generator of the run, which its checkpoints hold, so there is no cursor."""

    def __init__(self, world: World, recipe: Recipe, state: TrainState) -> None:
        self.world, self.recipe, self.given = world, recipe, state

    def next(self, stage: Stage) -> list[Batch]:
        return [self.world.batch(stage, self.recipe.guidance, self.given.rng) for _ in range(stage.accumulate)]

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


class PointsProbe:
    """What a probe of a run measures, of points: how far they lie from the origin, and from each other."""

    reward = None
    prompts = ()

    def __init__(self, world: World) -> None:
        self.world = world

    def student(self, denoiser: Denoiser, sampling: Sampling) -> dict[str, float]:
        return self._measured(lambda noise, cond, null, rng: sampling(denoiser, cond, null, noise, self.world.path, rng))

    def teacher(self, denoiser: Denoiser, guidance: Any) -> dict[str, float]:
        return self._measured(lambda noise, cond, null, rng: sample_ode(denoiser, cond, null, noise, steps=ODE_STEPS, path=self.world.path))

    @torch.no_grad()
    def _measured(self, draw: Callable[..., Tensor]) -> dict[str, float]:
        rng = torch.Generator().manual_seed(1234)
        names = [str(i % self.world.mixture.label_count) for i in range(200)]
        x = draw(torch.randn(len(names), 2, generator=rng), labels(names), labels([""] * len(names)), rng)
        return {"mean_brightness": float(x.norm(dim=1).mean()), "diversity": float(torch.pdist(x).mean())}


class PointsLoop(Loop):
    """The loop of a run in the laboratory, where nothing is to be seen but the figure."""

    def _show(self, stage: Stage) -> None:
        pass


def train_lab(out: Path, case: Case, measure: Measure) -> None:
    """A run in the laboratory through the loop of every other run: its log, its checkpoints, its signals."""
    world = World.named("ring8", members=1)
    recipe = dmd2(replace(common(2, critic_updates=1), batch=32), iterations=case.iterations)
    state = ensemble_state(recipe, world, flow_start(world, 0, steps=200), 0)
    options = RunOptions(save_every=case.save_every, probe_every=100)
    family: Any = SimpleNamespace(boundary=None)
    source, probe = (Draws(world, recipe, state), PointsProbe(world))
    out.mkdir(parents=True, exist_ok=True)
    loop = PointsLoop(recipe, family, out, options, state, source, probe, measure)  # type: ignore[arg-type]
    loop.restore(None)
    loop.run()


def train_world(out: Path, case: Case, measure: Measure) -> None:
    """A run on the bundled world, export included."""
    from instep.bundled import find
    from instep.training.run import train

    own = find("moving-digits").ready()
    recipe = dmd2(Common(steps=2, batch=2, critic_updates=1), iterations=case.iterations)
    options = RunOptions(save_every=case.save_every, probe_every=100)
    train(recipe, own.family, out=out, prompts=own.prompts[:8], options=options, tracker=measure, known_teacher=own.known_teacher)


def run_process(name: str, case: Case, out: Path) -> int:
    """What a process of the case does; 130 where a signal interrupted it."""
    torch.set_num_threads(1)
    measure = Measure(out.with_suffix(".jsonl"), out / "log.jsonl")
    try:
        (train_lab if name == "lab" else train_world)(out, case, measure)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 130
    return 0


# -------------------------------------------------------------------------------------------------------------------- the process that kills it


def soak(name: str, case: Case, folder: Path, seed: int) -> dict[str, Any]:
    """Trains the case twice, once with signals, and compares."""
    whole, killed = folder / "whole", folder / "killed"
    process = start(name, case, whole)
    if process.wait() != 0:
        raise RuntimeError(f"the undisturbed run ended with status {process.returncode}")
    sent = disturbed(name, case, killed, random.Random(seed))
    return {
        "case": name,
        "iterations": case.iterations,
        "save_every": case.save_every,
        "seed": seed,
        "signals": {s.name: sent.count(s) for s in SIGNALS},
        "same_weights": digests(whole) == digests(killed),
        "same_log": rows(whole) == rows(killed),
        "left": left(killed),
        "undisturbed": measured(read_rows(whole.with_suffix(".jsonl"))),
        "killed": measured(read_rows(killed.with_suffix(".jsonl"))),
    }


def start(name: str, case: Case, out: Path) -> subprocess.Popen[bytes]:
    numbers = map(str, (case.iterations, case.save_every, case.kills))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, name, "--process", str(out), "--case", *numbers], env=environment, stderr=subprocess.DEVNULL)


def disturbed(name: str, case: Case, out: Path, rng: random.Random) -> list[signal.Signals]:
    """Runs the case to its end, and ends its process at random moments on the way; the signals that were sent."""
    sent: list[signal.Signals] = []
    while True:
        process, before = start(name, case, out), count(out)
        # a life lasts so many iterations that the run sees about as many signals as it shall
        iterations, wait = rng.randint(1, 2 * case.iterations // case.kills), rng.random() * 0.1
        while process.poll() is None:
            if len(sent) < case.kills and count(out) - before >= iterations:
                time.sleep(wait)
                number = rng.choice(SIGNALS)
                if process.poll() is None:
                    process.send_signal(number)
                    sent.append(number)
                process.wait()
            time.sleep(0.01)
        if process.returncode == 0:
            return sent
        if process.returncode not in (130, -signal.SIGKILL, -signal.SIGTERM):
            raise RuntimeError(f"after {len(sent)} signals the run ended with status {process.returncode}")


def count(out: Path) -> int:
    file = out.with_suffix(".jsonl")
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def digests(out: Path) -> dict[str, str]:
    """A digest of each trained tensor and moment at the end."""
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    saved = checkpoint.load(newest)
    _, tensors = split({part: saved[part] for part in ("roles", "optim", "ema")})
    return {key: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for key, value in tensors.items()}


def rows(out: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    return [{key: value for key, value in row.items() if key not in ("cpu_s", "wall_s")} for row in read_rows(out / "log.jsonl")]


def left(out: Path) -> list[str]:
    """Temporary files that nobody removed."""
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.name.startswith(".") and path.name != ".lock")


def measured(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the processes held: the most of each of them; the means of the quarters of the longest one, without its first rows; and the bytes of a row of the
    log in both halves of the run."""
    lives = [list(life) for _, life in groupby(found, lambda row: row["process"])]
    longest = max(lives, key=len)[WARM:]
    ends = [len(longest) * i // 4 for i in range(5)]
    # a row of the log belongs to one iteration; those before a restart are cut off and written again
    sizes = [(b["step"], b["log"] - a["log"]) for a, b in pairwise(found) if b["process"] == a["process"] and b["step"] == a["step"] + 1]
    half = max(step for step, _ in sizes) / 2
    return {
        "most": {key: [max(row[key] for row in life) for life in lives] for key in HELD},
        "quarters": {key: [mean(row[key] for row in longest[a:b]) for a, b in pairwise(ends)] for key in HELD},
        "log": [mean(size for step, size in sizes if (step > half) == late) for late in (False, True)],
    }


def growth(result: Mapping[str, Any], name: str) -> dict[str, float]:
    """How much each figure grew, as a part of it. In the undisturbed run from the first quarter of its process to the last one; in the killed one, whose
    processes are short, from the most that one of the first half of them held to the most of the second half. The first one is left out, since it loads no
    checkpoint. (The most, because a process that probes or exports holds more than one that is killed before it comes to that.)"""
    one = result[name]
    found = {"log": one["log"][1] / one["log"][0] - 1}
    for key in HELD:
        if name == "undisturbed":
            first, last = one["quarters"][key][0], one["quarters"][key][-1]
        else:
            later = one["most"][key][1:]
            first, last = max(later[: len(later) // 2]), max(later[len(later) // 2 :])
        found[key] = last / first - 1
    return found


def flat(result: Mapping[str, Any]) -> bool:
    """Whether nothing grew by more than `TOLERANCE`."""
    return all(value <= TOLERANCE for name in ("undisturbed", "killed") for value in growth(result, name).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", dest="numbers", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process is not None:
        sys.exit(run_process(args.case, Case(*args.numbers), args.process))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(args.case, CASES[args.case], Path(folder), args.seed)
    write_json(RESULTS / f"{args.case}.json", {**result, "seconds": time.perf_counter() - began})
    print(json.dumps(result, indent=2), flush=True)


if __name__ == "__main__":
    main()
