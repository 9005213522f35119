"""`instep lab`: recipes side by side in the exact laboratory, as a table, a figure and an animation."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from instep.core.files import write_json, write_text
from instep.core.numbers import check_number, check_whole
from instep.core.outputs import check_output

# flow matching of the network that students and fakes start from
START_STEPS = 5000


@dataclass(frozen=True)
class LabArgs:
    """The laboratory: a 2-D mixture with an exact teacher, so that every error is due to the method."""

    out: Path = Path("runs/lab")
    """Folder for lab.json, table.md, figure.png and training.webp; new or empty."""
    geometry: Literal["ring8", "grid9", "moons", "rings"] = "ring8"
    """Where the modes lie."""
    reward: Literal["none", "half", "right", "on-mode"] = "none"
    """half: 1 near the half of each class's modes that lies to the right, else 0; right: the first coordinate; on-mode: 1 on any mode of the class."""
    steps: int = 1
    """Steps of the student."""
    iterations: int = 1500
    """Student updates."""
    members: int = 3
    """Seeds, trained side by side as one batch."""
    seed: int = 0
    """Seed of all of them together."""
    guidance: float = 1.0
    """Guidance of the teacher; 1 is none."""
    start: Literal["flow", "far"] = "flow"
    """Initial student and fake: trained on the mixture, or far off every mode."""
    student: Literal["network", "particles"] = "network"
    """A small network, or free particles with the exact fake: a method's fixed point."""
    teacher: Literal["exact", "learned"] = "exact"
    """The closed form, or a network trained on the mixture."""
    path: Literal["flow", "vp"] = "flow"
    """Rectified flow, or variance preserving with DDPM's betas."""
    figures: bool = True
    """Write the figure and the animation (needs matplotlib)."""

    def __post_init__(self) -> None:
        for name in ("steps", "iterations", "members"):
            check_whole(name, getattr(self, name), 1)
        check_whole("seed", self.seed, 0)
        check_number("guidance", self.guidance, 0, what="it is a finite scale, 0 or more; 1 is none")
        if self.student == "particles" and self.steps != 1:
            raise ValueError(f"steps: {self.steps} is not allowed with particles; they stand for the samples of one step")


def lab_command(specs: Sequence[str], options: LabArgs) -> int:
    """Runs every recipe from the same start, prints the table, writes the files."""
    from rich.console import Console

    from instep.lab.run import common
    from instep.lab.spec import build, check_names
    from instep.lab.world import World

    check_names(specs)
    check_output("out", options.out, empty=True)
    world = World.named(options.geometry, members=options.members, reward=options.reward, path=options.path)
    recipes = {spec: build(spec, common(options.steps, options.guidance), options.iterations) for spec in specs}
    for spec, recipe in recipes.items():
        if recipe.needs & {"reward", "gradient"} and options.reward == "none":
            raise ValueError(f"reward: {spec} needs one; add --reward half (or right, on-mode)")
        if recipe.needs & {"preferred", "pairs"} and world.rewarded is None:
            raise ValueError(f"reward: {spec} needs samples that are preferred; add --reward half (or right)")
    if options.figures and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("figures: matplotlib is not installed; pip install 'instep[lab]', or leave the figures out with --no-figures")
    from instep.lab.table import as_json, markdown, rich_table

    options.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for run in _particles(recipes, world, options) if options.student == "particles" else _networks(recipes, world, options):
        runs.append(run)
        # after each recipe: finished results stay if the next one is interrupted
        write_json(options.out / "lab.json", as_json(runs, world, options))
        write_text(options.out / "table.md", markdown(runs, world))
    console = Console()
    console.print(rich_table(runs, world))
    if options.figures:
        from instep.lab.animation import draw_runs

        for file in draw_runs(options.out, runs, world):
            console.print(f"[bold]{file}[/bold]", highlight=False)
    return 0


@contextmanager
def _bar(label: str, total: int):
    """A progress bar with ETA; yields the function that advances it by one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=bool(os.environ.get("INSTEP_QUIET"))) as progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)


def _networks(recipes, world, options: LabArgs):
    from instep.lab.run import ensemble_state, train
    from instep.lab.world import flow_start

    steps = START_STEPS
    with _bar("start", steps) as advance:
        start = flow_start(world, options.seed, start=options.start, steps=steps, on_step=advance)
    learned = None
    if options.teacher == "learned" or any(recipe.roles["teacher"].lora for recipe in recipes.values()):
        learned = start
        if options.start == "far":
            with _bar("teacher", steps) as advance:
                learned = flow_start(world, options.seed, steps=steps, on_step=advance)
    for spec, recipe in recipes.items():
        adapted = recipe.roles["teacher"].lora is not None
        if adapted and options.teacher == "exact":
            print(f"{spec}: its teacher has an adapter, which only a network can have; this recipe's teacher is the learned one")
        state = ensemble_state(recipe, world, start, options.seed, learned_teacher=learned if options.teacher == "learned" or adapted else None)
        with _bar(spec, recipe.steps) as advance:
            run = train(spec, recipe, world, state, snapshots=10 if options.figures else 1, on_step=advance)
        yield run


def _particles(recipes, world, options: LabArgs):
    from instep.lab.run import train_particles

    for spec, recipe in recipes.items():
        with _bar(spec, options.iterations) as advance:
            run = train_particles(spec, recipe, world, seed=options.seed, steps=options.iterations, on_step=advance)
        yield run
