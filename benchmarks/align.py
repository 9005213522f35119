"""DM-Align's readings in the exact laboratory. On a bundled world they stand beside other methods: benchmarks/methods_on.py.

    python benchmarks/align.py         # about half an hour of CPU time
    make results                       # docs/results.md from what was measured

A reading is kept as benchmarks/results/align/lab-STEPS-NAME.json; what is there is not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from instep.cli.lab import LabArgs
from instep.core.files import write_json
from instep.lab.networks import VelocityMLP
from instep.lab.run import common, ensemble_state, train
from instep.lab.spec import build
from instep.lab.table import as_json
from instep.lab.world import World, flow_start

RESULTS = Path(__file__).parent / "results" / "align"
# all Group readings differ from this one in what they say
GROUP, PAIR = "dm-align-group:group=8,weight=0.5,matching=0.5", "dm-align-pair"
LETTER = "reach=last,toward=mean,normaliser=own,sign=signed,spread=group,top_n=2"

# the name of a reading: its recipe and options, and what is different from `default`
READINGS = {
    "control": ("dmd2", "control: distillation alone"),
    "amd": ("amd", "AMD, for comparison"),
    "amd-exit": ("amd:reward_on=exit", "AMD, with the reward of the exit"),
    "default": (GROUP, "Group: groups of 8, weights .5 and .5, exit, nearest of the best half, pull, distance to the target"),
    "letter": (f"{GROUP},{LETTER}", "Group, the paper's letter, after a first stage"),
    "signed": (f"{GROUP},sign=signed", "Group, signed"),
    "signed-2": (f"{GROUP},sign=signed,top_n=2", "Group, signed, nearest of the best two"),
    "mean": (f"{GROUP},toward=mean", "Group, toward the mean of the best half"),
    "kernel": (f"{GROUP},toward=kernel", "Group, toward the posterior mean of the best half"),
    "last": (f"{GROUP},reach=last", "Group, from the final sample, through the last step"),
    "trajectory": (f"{GROUP},reach=trajectory", "Group, from the final sample, through all steps"),
    "own": ("dm-align-group:group=8,normaliser=own,weight=0.05,matching=0.95", "Group, divided by the distance to its own estimate, weights .05 and .95"),
    "gentle": ("dm-align-group:group=8,weight=0.3,matching=0.7", "Group, weights .3 and .7"),
    "joint": (f"{GROUP},distil=0", "Group, joint from the first step"),
    "pair": (f"{PAIR}:within=None", "Pair, nearest of four preferred samples, all samples move"),
    "pair-near": (PAIR, "Pair, default: nearest of four preferred samples, samples move that are near it"),
    "pair-1": (f"{PAIR}:candidates=1,within=None", "Pair, one preferred sample"),
    "pair-kernel": (f"{PAIR}:toward=kernel,within=None", "Pair, toward the posterior mean of four preferred samples"),
    "teacher": (f"{GROUP},estimate_by=teacher", "Group, estimated by the teacher"),
    "student": (f"{GROUP},estimate_by=student", "Group, estimated by the student"),
    "samples": (f"{GROUP},estimate_by=samples", "Group, without noise"),
}
LAB_STEPS = (4, 1)
LAB_ITERATIONS = 1500


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readings", nargs="+", default=list(READINGS), choices=list(READINGS))
    parser.add_argument("--steps", type=int, nargs="+", default=list(LAB_STEPS), help="of the students")
    args = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    starts: dict[str, VelocityMLP] = {}
    for steps in args.steps:
        for name in args.readings:
            run_reading(name, steps, starts)


if __name__ == "__main__":
    main()
