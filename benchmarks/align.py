"""DM-Align's readings: each in the exact laboratory, the best of them on a bundled world whose teacher leaves room.

    python benchmarks/align.py lab                                     # about half an hour of CPU time
    python benchmarks/align.py world --seeds 0 1 2                     # about 8 minutes a seed
    python benchmarks/align.py world --world moving-digits --cells control default
    make results                                                       # docs/results.md from what was measured

A laboratory reading is kept as benchmarks/results/align/lab-STEPS-NAME.json, a cell of a world as WORLD-NAME-SEED.json; what is there is not
run again. Another world needs its name in OPTIONS and what ships with every bundled world: `instep.bundled.find`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measured import store

from instep.bundled import find
from instep.cli.lab import LabArgs
from instep.core.files import write_json
from instep.lab.networks import VelocityMLP
from instep.lab.run import common, ensemble_state, train
from instep.lab.spec import build
from instep.lab.table import as_json
from instep.lab.world import World, flow_start
from instep.methods.recipe import Recipe
from instep.recipes.amd import amd
from instep.recipes.common import Common
from instep.recipes.dm_align import dm_align_group, dm_align_pair
from instep.recipes.dmd import dmd2
from instep.training.options import RunOptions
from instep.training.run import train as train_model

RESULTS = Path(__file__).parent / "results" / "align"
GROUP, PAIR = "dm-align-group", "dm-align-pair"
LETTER = "reach=last,toward=mean,normaliser=own,sign=signed,spread=group,top_n=2"

# the name of a reading: its recipe and options, and what is different from the default
READINGS = {
    "control": ("dmd2", "control: distillation alone"),
    "amd": ("amd", "AMD, for comparison"),
    "amd-exit": ("amd:reward_on=exit", "AMD, with the reward of the exit"),
    "default": (GROUP, "Group, default: exit, nearest of the best half, pull, distance to the target"),
    "letter": (f"{GROUP}:{LETTER}", "Group, the paper's letter, after a first stage"),
    "signed": (f"{GROUP}:sign=signed", "Group, signed"),
    "signed-2": (f"{GROUP}:sign=signed,top_n=2", "Group, signed, nearest of the best two"),
    "mean": (f"{GROUP}:toward=mean", "Group, toward the mean of the best half"),
    "kernel": (f"{GROUP}:toward=kernel", "Group, toward the posterior mean of the best half"),
    "last": (f"{GROUP}:reach=last", "Group, from the final sample, through the last step"),
    "trajectory": (f"{GROUP}:reach=trajectory", "Group, from the final sample, through all steps"),
    "own": (f"{GROUP}:normaliser=own,weight=0.05,matching=0.95", "Group, divided by the distance to its own estimate, weights .05 and .95"),
    "gentle": (f"{GROUP}:weight=0.3,matching=0.7", "Group, weights .3 and .7"),
    "joint": (f"{GROUP}:distil=0", "Group, joint from the first step"),
    "pair": (PAIR, "Pair, default: nearest of four preferred samples"),
    "pair-1": (f"{PAIR}:candidates=1", "Pair, one preferred sample"),
    "pair-kernel": (f"{PAIR}:toward=kernel", "Pair, toward the posterior mean of four preferred samples"),
    "teacher": (f"{GROUP}:estimate_by=teacher", "Group, estimated by the teacher"),
    "student": (f"{GROUP}:estimate_by=student", "Group, estimated by the student"),
    "samples": (f"{GROUP}:estimate_by=samples", "Group, without noise"),
}
LAB_STEPS = (4, 1)
LAB_ITERATIONS = 1500


@dataclass(frozen=True)
class Cell:
    """A student of a world: its recipe with the world's options, the cell whose roles it goes on from, and what it is."""

    recipe: Callable[[Common], Recipe]
    start: str | None
    what: str


# options of each world under which its unguided teacher leaves room for alignment
OPTIONS = {"moving-digits": Common(guidance=1.0)}
BASE, MORE = 120, 60
CELLS = {
    "start": Cell(lambda c: dmd2(c, iterations=BASE), None, "start: DMD2"),
    "control": Cell(lambda c: dmd2(c, iterations=MORE), "start", "control: DMD2 goes on"),
    "default": Cell(lambda c: dm_align_group(c, distil=0, iterations=MORE), "start", "Group, default"),
    "signed-2": Cell(lambda c: dm_align_group(c, distil=0, iterations=MORE, sign="signed", top_n=2), "start", "Group, signed, nearest of the best two"),
    "letter": Cell(
        lambda c: dm_align_group(c, distil=0, iterations=MORE, reach="last", toward="mean", normaliser="own", sign="signed", spread="group", top_n=2),
        "start",
        "Group, the paper's letter, after a first stage",
    ),
    "pair": Cell(lambda c: dm_align_pair(c, distil=0, iterations=MORE), "start", "Pair, default"),
    "amd": Cell(lambda c: amd(c, iterations=MORE), "start", "AMD, for comparison"),
}


def run_reading(name: str, steps: int, starts: dict[str, VelocityMLP]) -> None:
    """Trains and measures one reading in the laboratory (ring8, half of the modes rewarded, three members) unless its result is there."""
    file = RESULTS / f"lab-{steps}-{name}.json"
    if file.is_file():
        return
    args = LabArgs(reward="half", steps=steps, iterations=LAB_ITERATIONS)
    place = World.named(args.geometry, members=args.members, reward=args.reward)
    if args.geometry not in starts:
        starts[args.geometry] = flow_start(place, args.seed)
    start = starts[args.geometry]
    spec = READINGS[name][0]
    recipe = build(spec, common(steps), args.iterations)
    run = train(spec, recipe, place, ensemble_state(recipe, place, start, args.seed))
    write_json(file, as_json([run], place, args))
    print(f"{file.name}: {run.cpu_s:.0f} s of CPU", flush=True)


def run_cell(world: str, name: str, seed: int, runs: Path) -> None:
    """Trains and measures one cell, and before it the one that it goes on from, unless its result is there."""
    file, cell = RESULTS / f"{world}-{name}-{seed}.json", CELLS[name]
    if file.is_file():
        return
    if cell.start is not None:
        run_cell(world, cell.start, seed, runs)
    place, began = find(world), time.process_time()
    ready, recipe = place.ready(), cell.recipe(OPTIONS[world])
    run = train_model(
        recipe,
        ready.family,
        out=runs / f"{world}-{name}-{seed}",
        prompts=ready.prompts,
        reward=ready.reward,
        monitor=ready.monitor,
        real=ready.real() if recipe.needs & {"real", "preferred"} else None,
        start_from=runs / f"{world}-{cell.start}-{seed}" if cell.start else None,
        options=RunOptions(seed=seed, probe_every=MORE, save_every=MORE, keep=1),
    )
    store(file, run, recipe, place, name, seed=seed, began=began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("lab", "world"))
    parser.add_argument("--readings", nargs="+", default=list(READINGS), choices=list(READINGS), help="of the laboratory")
    parser.add_argument("--steps", type=int, nargs="+", default=list(LAB_STEPS), help="students of the laboratory")
    parser.add_argument("--world", default="moving-digits", choices=list(OPTIONS))
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS), help="of the world")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/align"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.part == "lab":
        starts: dict[str, VelocityMLP] = {}
        for steps in args.steps:
            for name in args.readings:
                run_reading(name, steps, starts)
        return
    for seed in args.seeds:
        for name in args.cells:
            run_cell(args.world, name, seed, args.runs)


if __name__ == "__main__":
    main()
