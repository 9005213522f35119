"""The experiments on the embedded default: every student against naive sampling, the teacher and its controls.

    python benchmarks/moving_digits.py --seeds 0 1 2 --jobs 2     # everything; hours of CPU time, resumes
    make results                                                   # docs/results.md from what was measured

Each cell is one `train` run and one evaluation with the `full` protocol, kept as benchmarks/results/NAME-SEED.json; a cell that is
there is not run again. Cells that continue another one (the aligned students and their control) start from its roles.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from stored import row_of

from instep.bundled.baselines import Baselines, noise_for
from instep.bundled.evaluation import DigitsEvaluation, evaluate, evaluation_set, load_classifiers, real_vs_real_row
from instep.bundled.worlds import MovingDigits, moving_digits
from instep.cli.evaluate import sampler_of
from instep.core.files import write_json
from instep.core.json_lines import read_rows
from instep.diffusion.levels import Uniform
from instep.methods.recipe import Recipe
from instep.metrics.compare import Row
from instep.recipes.amd import amd
from instep.recipes.common import Common
from instep.recipes.decoupled_dmd import decoupled_dmd
from instep.recipes.dm_align import dm_align_group, dm_align_pair
from instep.recipes.dmd import dmd2
from instep.recipes.refl import refl
from instep.rewards.base import Reward
from instep.training.build import averaged
from instep.training.health import examine
from instep.training.history import number, probes
from instep.training.options import RunOptions
from instep.training.run import train

RESULTS = Path(__file__).parent / "results"
BASE, MORE, FEW = 80, 40, 80  # iterations: the common start, what is added to it, students of 1 and 2 steps


@dataclass(frozen=True)
class Cell:
    """A student to train: its recipe, the cell whose roles it starts from, and its reward if it is not the training classifier's."""

    recipe: Callable[[], Recipe]
    start: str | None = None
    what: str = ""
    reward: Callable[[MovingDigits], Reward] | None = None
    probe_every: int = 40


HIGH = Uniform(low=0.8, high=0.98)
TWO = Common(steps=2)
# the reading of DM-Align that these cells and those of reinforce.py were measured with: the last step, the mean of two, units of the own estimate
OLD = partial(dm_align_group, distil=0, reach="last", toward="mean", top_n=2, normaliser="own", weight=0.3, matching=0.7, levels=Uniform(low=0.3, high=0.98))
OLD_PAIR = partial(dm_align_pair, distil=0, iterations=MORE, reach="last", candidates=1, within=None, normaliser="own", levels=HIGH)
CELLS = {
    "dmd2-4": Cell(lambda: dmd2(iterations=BASE), what="4 steps, fake told the exit, rollout re-used"),
    "dmd2-4-more": Cell(lambda: dmd2(iterations=MORE), "dmd2-4", "control: as many further iterations of DMD2"),
    "group-signed": Cell(lambda: OLD(iterations=MORE, sign="signed"), "dmd2-4", "DM-Align (Group), signed as the text says"),
    "dmd2-2": Cell(lambda: dmd2(TWO, iterations=FEW), what="2 steps"),
    "dmd2-1": Cell(lambda: dmd2(Common(steps=1), iterations=FEW), what="1 step"),
    "dmd2-4-one-fake": Cell(lambda: dmd2(Common(condition_on_exit=False), iterations=BASE), what="4 steps, one fake for all exits"),
    "dmd2-4-fresh": Cell(lambda: dmd2(Common(reuse=False), iterations=BASE), what="4 steps, a fresh rollout for every fake update"),
    "group-printed": Cell(lambda: OLD(iterations=MORE, sign="printed"), "dmd2-4", "DM-Align (Group), Eq. 7's sign as printed"),
    "pair": Cell(lambda: OLD_PAIR(weight=0.1, matching=0.9), "dmd2-4", "DM-Align (Pair), weight .1"),
    "amd": Cell(lambda: amd(iterations=MORE), "dmd2-4", "AMD"),
    "amd-weight": Cell(lambda: amd(iterations=MORE, sensitivity=0.0), "dmd2-4", "AMD's critic weight alone"),
    "refl": Cell(lambda: refl(iterations=MORE, weight=0.01, weight_unit="raw"), "dmd2-4", "DMD2 and the training reward's gradient (ReFL), weight .01"),
    "dmd2-4-gan": Cell(lambda: dmd2(gan=1e-2, iterations=BASE), what="4 steps, with a discriminator on real videos"),
    "decoupled-4": Cell(lambda: decoupled_dmd(iterations=BASE), what="4 steps, Decoupled-DMD"),
    "group-pull": Cell(lambda: OLD(iterations=MORE, sign="pull"), "dmd2-4", "DM-Align (Group), pull-only"),
    "group-high": Cell(
        lambda: OLD(iterations=MORE, sign="signed", weight=0.7, matching=0.3, levels=HIGH), "dmd2-4", "Group at levels above .8 alone, weight .7"
    ),
    "pair-half": Cell(lambda: OLD_PAIR(), "dmd2-4", "DM-Align (Pair), the paper's weight"),
}


def run_cell(name: str, seed: int, runs: Path, cells: Mapping[str, Cell] = CELLS, results: Path = RESULTS) -> None:
    """Trains and measures one cell unless its result is there."""
    file = results / f"{name}-{seed}.json"
    if file.is_file():
        return
    cell, digits = cells[name], moving_digits()
    recipe = cell.recipe()
    start, cpu = runs / f"{cell.start}-{seed}" if cell.start else None, time.process_time()
    real = digits.real() if recipe.needs & {"real", "preferred"} else None
    run = train(
        recipe,
        digits.family,
        out=runs / f"{name}-{seed}",
        prompts=digits.prompts,
        reward=cell.reward(digits) if cell.reward else digits.reward,
        monitor=digits.monitor,
        real=real,
        start_from=start,
        options=RunOptions(seed=seed, probe_every=cell.probe_every, save_every=20, keep=1),
    )
    seconds = time.process_time() - cpu
    with averaged(run.state.trained["student"]):
        generate = sampler_of(run.state.roles["student"], digits.family, recipe.sampling)
        row = evaluate(
            name, "student", generate, evaluation_set("full"), load_classifiers(), steps=len(recipe.levels), guidance=recipe.sampling.guidance, note=cell.what
        )
    observed = {"hacking": hacking(run.out, recipe), "curve": curve(run.out)}
    write_json(file, {"row": row.json(), "iterations": recipe.steps, "train_cpu_s": seconds, "seed": seed, **observed})


def hacking(out: Path, recipe: Recipe) -> int | None:
    """The step at which the health checks, as they are now, call a run's reward hacked: its log read again."""
    rows = read_rows(out / "log.jsonl")
    ends = [i + 1 for i, row in enumerate(rows) if number(row, "probe/mean_brightness") is not None]
    return next((rows[i - 1]["step"] for i in ends if any(found.flag == "hacking" for found in examine(rows[:i], recipe))), None)


def curve(out: Path) -> list[dict[str, float]]:
    """The probes of a run: what training, monitor and variety did meanwhile."""
    keys = ("train_score", "monitor_both", "diversity", "modes", "mean_brightness", "motion")
    return [{"step": row["step"]} | {key: row[f"probe/{key}"] for key in keys if f"probe/{key}" in row} for row in probes(read_rows(out / "log.jsonl"))]


def run_baselines(digits: MovingDigits) -> None:
    """Teacher and naive sampling at every NFE, and real videos against real ones."""
    classifiers, eval_set = load_classifiers(), evaluation_set("full")
    for steps in (50, 4, 2, 1):
        for guidance in (3.0, 1.0):
            file = RESULTS / f"teacher-{steps}-{guidance:g}.json"
            if not file.is_file():
                write_json(file, {"row": Baselines(digits.family, DigitsEvaluation(), eval_set).teacher(steps, guidance).json()})
    if not (RESULTS / "floor.json").is_file():
        write_json(RESULTS / "floor.json", {"row": real_vs_real_row(eval_set, classifiers).json()})
        family = digits.family
        write_json(RESULTS / "floor-vae.json", {"row": real_vs_real_row(eval_set, classifiers, through=lambda x: family.decode(family.encode_media(x))).json()})


def run_export(digits: MovingDigits, runs: Path, seed: int) -> None:
    """The aligned student once more, through its exported folder in stock diffusers, on the same protocol."""
    file = RESULTS / f"exported-{seed}.json"
    if file.is_file():
        return
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(runs / f"group-signed-{seed}" / "student", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    size = digits.family.size

    def generate(prompts, noise_seed):
        # the stock pipeline re-noises from torch's global generator; the starting noise is handed over
        noise, rng = noise_for(digits.family, prompts, noise_seed)
        torch.set_rng_state(rng.get_state())
        x = pipe(
            list(prompts),
            height=size.height,
            width=size.width,
            num_frames=size.frames,
            num_inference_steps=4,
            guidance_scale=1.0,
            latents=noise,
            output_type="latent",
        ).frames
        return digits.family.decode(x)

    row = evaluate("exported", "student", generate, evaluation_set("full"), load_classifiers(), steps=4, note="group-signed in stock diffusers")
    write_json(file, {"row": row.json()})


def rows_of(name: str) -> list[Row]:
    """The measured rows of one cell, all seeds."""
    return [row_of(json.loads(file.read_text())["row"]) for file in sorted(RESULTS.glob(f"{name}-[0-9].json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--jobs", type=int, default=1, help="seeds run side by side, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--no-baselines", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.jobs > 1 and len(args.seeds) > 1:
        waiting, running = list(args.seeds), []
        while waiting or running:
            while waiting and len(running) < args.jobs:
                seed = waiting.pop(0)
                more = [] if seed == args.seeds[0] and not args.no_baselines else ["--no-baselines"]
                command = [sys.executable, __file__, "--seeds", str(seed), "--runs", str(args.runs), "--cells", *args.cells, *more]
                running.append(subprocess.Popen(command))
            running = [child for child in running if child.poll() is None]
            time.sleep(1)
        return
    for seed in args.seeds:
        for name in args.cells:
            run_cell(name, seed, args.runs)
        if "group-signed" in args.cells:
            run_export(moving_digits(), args.runs, seed)
    if not args.no_baselines:
        run_baselines(moving_digits())


if __name__ == "__main__":
    main()
