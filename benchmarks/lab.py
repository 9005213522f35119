"""The claims of the matching family and of AMD, in the exact laboratory: three seeds each, exact samples beside them.

    python benchmarks/lab.py                  # everything, about half an hour of CPU time; experiments that are there are not repeated
    python benchmarks/lab.py --only selective sweep
    make results                              # docs/results.md from what was measured

Each experiment is a set of recipes from the same start in the same world, kept as benchmarks/results/lab/NAME.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from instep.cli.lab import LabArgs
from instep.core.files import write_json
from instep.lab.networks import VelocityMLP
from instep.lab.run import LabRun, common, ensemble_state, train, train_particles
from instep.lab.spec import build
from instep.lab.table import as_json
from instep.lab.world import StartName, World, flow_start

RESULTS = Path(__file__).parent / "results" / "lab"
ITERATIONS = 1500


@dataclass(frozen=True)
class Experiment:
    """Recipes side by side: the world's options are those of `instep lab`."""

    specs: Sequence[str]
    options: LabArgs
    snapshots: int = 1


def world(**changed) -> LabArgs:
    return LabArgs(**{"iterations": ITERATIONS, **changed})


GEOMETRIES = ("grid9", "moons", "rings")
EXPERIMENTS = {
    "one-step": Experiment(("dmd2", "dmd", "dmd2:gan=0.03", "magic"), world()),
    "one-step-guided": Experiment(("dmd2", "decoupled-dmd", "amd:sensitivity=0,tilt=0"), world(guidance=1.5, reward="half")),
    "four-steps": Experiment(("dmd2", "dmd2:condition_on_exit=False", "dmd2:reuse=False", "dmd2:gan=0.03"), world(steps=4)),
    "four-steps-guided": Experiment(("dmd2", "decoupled-dmd"), world(steps=4, guidance=1.5)),
    **{f"one-step-{name}": Experiment(("dmd2", "amd"), world(geometry=name, reward="half")) for name in GEOMETRIES},
    **{f"four-steps-{name}": Experiment(("dmd2", "dmd2:condition_on_exit=False"), world(geometry=name, steps=4)) for name in GEOMETRIES},
    "far": Experiment(("dmd2", "dmd", "dmd2:gan=0.03", "decoupled-dmd", "magic"), world(start="far"), 15),
    "far-learned": Experiment(("dmd2", "dmd", "dmd2:gan=0.03", "decoupled-dmd", "magic"), world(start="far", teacher="learned"), 15),
    "far-dynamic": Experiment(
        ("dmd2", *(f"dmdr:tilt=none,warm={ITERATIONS},iterations=0,{part}" for part in ("dyna_dg=0", "dyna_rs=False", "dyna_rs=True"))),
        world(start="far", teacher="learned"),
        30,
    ),
    "far-guided": Experiment(("dmd2", "decoupled-dmd"), world(start="far", guidance=1.5), 15),
    "far-reward": Experiment(("dmd2", "amd", "refl:weight=0.3"), world(start="far", reward="right"), 15),
    "selective": Experiment(("dmd2", "refl:weight=0.03", "refl:weight=0.1", "refl:weight=0.3", "amd", "amd:tilt=2"), world(reward="half"), 10),
    "selective-gradient": Experiment(("refl:weight=0.6", "refl:weight=1", "refl:weight=2"), world(reward="half"), 10),
    "global": Experiment(("dmd2", "amd"), world(reward="on-mode"), 10),
    "naive": Experiment(("amd", "naive-adaptive", "naive-adaptive:sensitivity=0.25"), world(reward="half"), 10),
    "ablation": Experiment(("amd:sensitivity=0,tilt=0", "amd:tilt=0", "amd:sensitivity=0", "amd"), world(reward="half", guidance=1.5)),
    "sweep-sensitivity": Experiment(("amd:sensitivity=0.25", "amd:sensitivity=1", "amd:sensitivity=2"), world(reward="half", guidance=1.5)),
    "sweep-group": Experiment(("amd:group=2", "amd:group=4", "amd:group=16", "amd:group=64"), world(reward="half", guidance=1.5)),
    "sweep-guidance": Experiment(("amd:guidance=1", "amd:guidance=2", "amd:guidance=3.5", "dmd2:guidance=2", "dmd2:guidance=3.5"), world(reward="half")),
    "sweep-tilt": Experiment(("amd:tilt=0.5", "amd:tilt=2", "amd:tilt=4"), world(reward="half", guidance=1.5)),
    "two-stage": Experiment(("dmd2", "amd:distil=1000", "refl:distil=1000,weight=0.1", "dm-align-group:weight=0.05,spread=group"), world(reward="half")),
    "consistency": Experiment(
        (
            "dmd2",
            "dollar:weight=0,matching=0,cd=1",
            "dollar:weight=0,cd_steps=1",
            "dollar:weight=0",
            "dollar:weight=0,cd=2",
            "dollar:weight=0,prediction_type=x0",
        ),
        world(),
    ),
    "consistency-four": Experiment(("dmd2", "dollar:weight=0,matching=0,cd=1", "dollar:weight=0,cd_steps=1", "dollar:weight=0"), world(steps=4)),
    "consistency-far": Experiment(("dmd2", "dollar:weight=0,cd_steps=1", "dollar:weight=0"), world(start="far"), 15),
    "latent": Experiment(
        ("dmd2", "refl:weight=0.1", *(f"dollar:kind=image,{part}" for part in ("cd=0,weight=0.1", "cd=0,weight=0.3", "weight=0.1", "fit=0,cd=0,weight=0.1"))),
        world(reward="half"),
        10,
    ),
    "particles": Experiment(
        ("dmd2", "amd:tilt=0", "amd:sensitivity=0", "amd", "naive-adaptive", "refl:weight=0.1"), world(reward="half", student="particles", iterations=800)
    ),
}


def start_of(args: LabArgs, start: StartName, kept: dict[tuple[str, StartName], VelocityMLP]) -> VelocityMLP:
    """The network that students begin as in this geometry, trained once."""
    key = args.geometry, start
    if key not in kept:
        kept[key] = flow_start(World.named(args.geometry, members=args.members), args.seed, start=start)
    return kept[key]


def as_measured(spec: str) -> str:
    """A recipe as its results are stored: with the weight of the reward's gradient in its raw unit."""
    return f"{spec},weight_unit=raw" if spec.startswith("refl:") else spec


def run(experiment: Experiment, kept: dict[tuple[str, StartName], VelocityMLP]) -> tuple[list[LabRun], World]:
    """All recipes of an experiment."""
    args, made = experiment.options, []
    place = World.named(args.geometry, members=args.members, reward=args.reward)
    for spec in experiment.specs:
        recipe = build(as_measured(spec), common(args.steps, args.guidance), args.iterations)
        if args.student == "particles":
            runs = [train_particles(spec, recipe, place, seed=seed, steps=args.iterations) for seed in range(args.members)]
            made.append(LabRun(spec, recipe, runs[0].state, place, (_merged(runs),), sum(one.cpu_s for one in runs)))
            continue
        learned = start_of(args, "flow", kept) if args.teacher == "learned" or recipe.roles["teacher"].lora else None
        state = ensemble_state(recipe, place, start_of(args, args.start, kept), args.seed, learned_teacher=learned)
        made.append(train(spec, recipe, place, state, snapshots=experiment.snapshots))
        print(f"  {spec}: {made[-1].cpu_s:.0f} s of CPU", flush=True)
    return made, place


def _merged(runs: Sequence[LabRun]):
    from dataclasses import replace

    ends = [one.snapshots[-1] for one in runs]
    return replace(ends[0], metrics=tuple(end.metrics[0] for end in ends), samples=torch.cat([end.samples for end in ends]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(EXPERIMENTS), choices=list(EXPERIMENTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept: dict[tuple[str, StartName], VelocityMLP] = {}
    for name in args.only:
        file = RESULTS / f"{name}.json"
        if file.is_file():
            continue
        print(name, flush=True)
        experiment = EXPERIMENTS[name]
        runs, place = run(experiment, kept)
        write_json(file, as_json(runs, place, experiment.options))


if __name__ == "__main__":
    main()
