"""Diffusion-APO's claims, three seeds a cell in the exact laboratory (on the bundled model: apo_bundled.py).

    python benchmarks/apo.py                       # the laboratory: some minutes of CPU time; what is there is not repeated
    python benchmarks/apo.py --only sequence --seeds 0

Every cell starts from the same many-step network and is kept as benchmarks/results/apo/NAME-SEED.json: win rate against the start on the same noise, and
the laboratory's metrics, before and after guidance distillation.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instep.core.files import write_json
from instep.lab.networks import VelocityMLP
from instep.lab.run import Snapshot, ensemble_state, snapshot
from instep.lab.world import World, flow_start
from instep.methods.recipe import Recipe
from instep.methods.role_config import AdamWConfig
from instep.recipes.apo import apo
from instep.recipes.many_step import ManySteps
from instep.training.state import TrainState
from instep.training.step import iteration

RESULTS = Path(__file__).parent / "results" / "apo"
# Of one network each: nothing is shared between seeds but the world. Guided, so that there is something to distil.
LAB = ManySteps(steps=10, batch=256, guidance=1.5, student=AdamWConfig(3e-4, betas=(0.5, 0.99), clip=1e9, decay=0.6), ema=None)
# scores within this of each other are a tie
MARGIN = 0.1
# gradient evaluations (levels of a pair) of a cell's preferences; a window of five makes a fifth as many updates
EVALUATIONS = 300
DISTILL_UPDATES = 300
NONE = {"online": 0, "half_online": 0, "offline": 0, "distill_guidance": 0, "post_distillation": 0}


@dataclass(frozen=True)
class Cell:
    """Options of the recipe before guidance distillation, and what it shows. Every cell is then distilled, and distilled alike."""

    options: dict[str, Any]
    what: str


def window(**changed) -> dict[str, Any]:
    return {"offline": EVALUATIONS // 5, **changed}


CELLS = {
    "dpo": Cell({"offline": EVALUATIONS, "uniform": 1}, "Diffusion-DPO: one level of all an update"),
    "no-window": Cell(window(uniform=5), "five levels of all an update"),
    "apo": Cell(window(), "Diffusion-APO: a window of four high levels and a low one, near the sampler's"),
    "no-shift": Cell(window(random_shift=False), "without the random shift"),
    "no-offset": Cell(window(offset=0.0), "without the random offset"),
    "neither": Cell(window(random_shift=False, offset=0.0), "without random shift and offset"),
    "high-only": Cell(window(high=5, low=0), "five high levels"),
    "low-only": Cell(window(high=0, low=5), "five low levels"),
    "dpo-online": Cell({"online": EVALUATIONS, "uniform": 1}, "Diffusion-DPO on pairs of the model's own"),
    "apo-online": Cell({"online": EVALUATIONS // 5}, "Diffusion-APO on pairs of the model's own"),
    "apo-half": Cell({"half_online": EVALUATIONS // 5}, "Diffusion-APO, a labelled sample against one of the model's own"),
    "dpo-beta-5": Cell({"offline": EVALUATIONS, "uniform": 1, "beta": 5.0}, "Diffusion-DPO, beta 5"),
    "dpo-beta-10": Cell({"offline": EVALUATIONS, "uniform": 1, "beta": 10.0}, "Diffusion-DPO, beta 10"),
    "dpo-beta-20": Cell({"offline": EVALUATIONS, "uniform": 1, "beta": 20.0}, "Diffusion-DPO, beta 20"),
    "dpo-fewer": Cell({"offline": EVALUATIONS // 5, "uniform": 1}, "Diffusion-DPO, as many updates as APO and a fifth of the levels"),
    "apo-beta-0.5": Cell(window(beta=0.5), "Diffusion-APO, beta .5"),
}
SEQUENCE = {"online": 30, "half_online": 30, "offline": 30, "distill_guidance": DISTILL_UPDATES, "post_distillation": 20}
BETA = 2.0


def win_rate(world: World, before: Tensor, after: Tensor) -> float:
    """Share of the same noises whose sample scores higher than before, ties as half."""
    a, b = (world.score(x.flatten(0, 1), [""] * len(x.flatten(0, 1))) for x in (after, before))
    return float(0.5 + 0.5 * ((a > b + MARGIN).float() - (a < b - MARGIN).float()).mean())


def jump(losses: list[float]) -> float:
    """Deviation of the logged loss from one update to the next: the root of half the mean squared difference, which a slow fall does not enter."""
    squares = [(b - a) ** 2 for a, b in zip(losses, losses[1:], strict=False)]
    return (sum(squares) / len(squares) / 2) ** 0.5 if squares else 0.0


def stages(recipe: Recipe, state: TrainState, world: World) -> tuple[dict[str, Snapshot], dict[str, list[float]]]:
    """Trains the recipe; what it is after each stage, and the logged loss of each update."""
    after, losses = {}, {}
    while state.step < recipe.steps:
        stage, progress = recipe.at(state.step)
        log = iteration(state, stage, [world.batch(stage, recipe.guidance, state.rng)], progress)
        losses.setdefault(stage.name, []).append(log.get("objective/dpo", log.get("objective/guidance", 0.0)))
        if state.step in recipe.stage_ends():
            after[stage.name] = snapshot(state, replace(recipe, stages=tuple(s for s in recipe.stages if s.steps)[: len(after) + 1]), world)
    return after, losses


def run_lab(name: str, options: dict[str, Any], what: str, seed: int) -> None:
    """One cell and seed."""
    file = RESULTS / f"{name}-{seed}.json"
    if file.is_file():
        return
    world, began = World.named("ring8", members=1, reward="half"), time.process_time()
    net = start_of(world, seed)
    recipe = apo(LAB, **{**NONE, "distill_guidance": DISTILL_UPDATES, "distill_guidance_optim": LAB.student, "beta": BETA, **options})
    state = ensemble_state(recipe, world, net, seed)
    start = snapshot(state, replace(recipe, stages=recipe.stages[:1]), world)
    after, losses = stages(recipe, state, world)
    rows = {stage: {**seen.metrics[0], "win": win_rate(world, start.samples, seen.samples), "loss_jump": jump(losses[stage])} for stage, seen in after.items()}
    write_json(file, {"what": what, "seed": seed, "start": start.metrics[0], "after": rows, "cpu_s": round(time.process_time() - began, 1)})
    said = ", ".join(f"{stage} win {row['win']:.3f} share {row['share']:.2f} quality {row['quality']:.2f}" for stage, row in rows.items())
    print(f"{name} seed {seed}: start share {start.metrics[0]['share']:.2f} quality {start.metrics[0]['quality']:.2f}; {said}", flush=True)


KEPT: dict[int, VelocityMLP] = {}


def start_of(world: World, seed: int) -> VelocityMLP:
    if seed not in KEPT:
        KEPT[seed] = flow_start(world, seed, steps=3000)
    return KEPT[seed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[*CELLS, "sequence"], choices=[*CELLS, "sequence"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.only:
            cell = Cell(SEQUENCE, "the five stages in sequence") if name == "sequence" else CELLS[name]
            run_lab(name, cell.options, cell.what, seed)


if __name__ == "__main__":
    main()
