"""A held figure against fixed weights, in the exact laboratory: does the controller reach the reward of the best fixed weight that stays in the band?

    python benchmarks/hold.py                 # all seeds; skips what is stored
    python benchmarks/hold.py --seeds 4       # the one that nothing was tuned on
    python benchmarks/hold.py --branches grpo --seeds 4 --weights 0.5 0.7 1 --iterations 1200 --results benchmarks/results/hold_long
    make results

A student of two steps is distilled. Then matching and a reward branch train together: with each of several fixed weights (shares of matching's gradient), and
once with the controller of `instep train --hold`. The held figure is the diversity, the mean distance between samples of one class on fixed noise, relative to
the distilled student's.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instep.core.files import write_json
from instep.diffusion.sampling import sample_few_step
from instep.lab.mixture import labels
from instep.lab.networks import VelocityMLP
from instep.lab.run import common, ensemble_state, train
from instep.lab.world import World, flow_start
from instep.methods.recipe import Recipe
from instep.recipes.dmd import dmd2
from instep.recipes.dmdr import dmdr
from instep.recipes.reinforcement import Branch
from instep.training.build import averaged
from instep.training.hold import HOLD_EVERY, Bound, Controller, Held
from instep.training.state import TrainState
from instep.training.step import iteration

RESULTS = Path(__file__).parent / "results" / "hold"
BRANCHES: tuple[Branch, ...] = ("refl", "grpo")
# fixed shares of matching's gradient
WEIGHTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0)
# the controller's steps were tuned on the first, its largest weight on the next three; the last is fresh
SEEDS = (0, 1, 2, 3, 4)
# the controller's largest: of ReFL one that leaves the band, of GRPO the largest fixed one that stays inside it on every seed
SHARES: dict[Branch, float] = {"refl": 0.5, "grpo": 1.0}
HOLD = Bound("diversity", 0.9)
STEPS, DISTIL, ITERATIONS = 2, 600, 400
SAMPLES = 600  # a class and probe
WORLD = World.named("ring8", members=1, reward="half")


def recipe_of(rl: Branch, weight: float, iterations: int) -> Recipe:
    """Matching and the branch, with the average that probes look at, and at a constant learning rate: one that falls to zero leaves nothing to steer with."""
    options = common(STEPS)
    options = replace(options, ema=0.95, student=replace(options.student, decay=0.0))
    return dmdr(options, warm=0, iterations=iterations, rl=rl, weight=weight)


@torch.no_grad()
def probe(state: TrainState, recipe: Recipe) -> dict[str, float]:
    """Diversity and mean reward of samples of the student's average, as a run's probe takes them, on fixed noise."""
    rng, classes = torch.Generator().manual_seed(1234), WORLD.mixture.label_count
    names = [str(c) for c in range(classes) for _ in range(SAMPLES)]
    noise = torch.randn(len(names), 2, generator=rng)
    with averaged(state.trained["student"]):
        x = sample_few_step(state.roles["student"], labels(names), noise, recipe.levels, WORLD.path, rng)
    return {"diversity": sum(_spread(part) for part in x.split(SAMPLES)) / classes, "reward": float(WORLD.score(x, names).mean())}


def _spread(x: Tensor) -> float:
    return float(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)))


def run(rl: Branch, weight: float, start: VelocityMLP, hold: Bound | None, seed: int, iterations: int = ITERATIONS) -> dict[str, Any]:
    """One run from the distilled student; a row a probe."""
    recipe = recipe_of(rl, weight, iterations)
    state, stage = ensemble_state(recipe, WORLD, start, seed), recipe.stages[0]
    controller = Controller((hold,)) if hold else None
    first = probe(state, recipe)
    if controller:
        state.hold, _ = controller.probed(Held(), stage, first)
    rows = [{"step": 0, "reward": first["reward"], "diversity": 1.0, "multiplier": state.multiplier}]
    for step in range(1, iterations + 1):
        iteration(state, stage, [WORLD.batch(stage, 1.0, state.rng)], (step - 1) / iterations)
        if step % HOLD_EVERY == 0:
            now = probe(state, recipe)
            if controller:
                state.hold, _ = controller.probed(state.hold, stage, now)
            rows.append({"step": step, "reward": now["reward"], "diversity": now["diversity"] / first["diversity"], "multiplier": state.multiplier})
    return {"branch": rl, "weight": weight, "held": hold is not None, "seed": seed, "rows": rows}


def distilled(seed: int) -> VelocityMLP:
    """The student of two steps that every run of a seed begins as."""
    recipe = dmd2(common(STEPS), iterations=DISTIL)
    state = ensemble_state(recipe, WORLD, flow_start(WORLD, seed), seed)
    return train("dmd2", recipe, WORLD, state).state.roles["student"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--branches", nargs="+", default=list(BRANCHES), choices=list(BRANCHES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--weights", type=float, nargs="+", default=list(WEIGHTS), help="fixed shares of matching's gradient")
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder a number of iterations")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.results.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        start = None
        for rl in args.branches:
            for name, weight, hold in (("held", SHARES[rl], HOLD), *((f"{w:g}", w, None) for w in args.weights)):
                file = args.results / f"{rl}-{name}-{seed}.json"
                if not file.is_file():
                    start = start or distilled(seed)
                    found = run(rl, weight, start, hold, seed, args.iterations)
                    write_json(file, {"bound": HOLD.fraction, **found})
                    last = found["rows"][-1]
                    low = min(row["diversity"] for row in found["rows"])
                    print(f"{file.stem}: reward {last['reward']:.3f}, diversity {last['diversity']:.3f} (least {low:.3f})", flush=True)


if __name__ == "__main__":
    main()
