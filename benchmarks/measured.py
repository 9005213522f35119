"""The student of a run on a bundled world, measured by the world's protocol and stored."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instep.bundled.world import EvalSize, World
from instep.cli.evaluate import sampler_of
from instep.core.files import write_json
from instep.methods.recipe import Recipe
from instep.training.build import averaged
from instep.training.run import Run


def store(
    file: Path,
    run: Run,
    recipe: Recipe,
    place: World,
    name: str,
    *,
    seed: int,
    began: float,
    size: EvalSize = "full",
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes the row of a run's averaged student, and the processor time since `began` (`time.process_time`) as that of its training; `about`: what else."""
    seconds, evaluation = time.process_time() - began, place.evaluation
    assert evaluation is not None, f"{place.name} is not measured by instep eval"
    with averaged(run.state.trained["student"]):
        generate = sampler_of(run.state.roles["student"], run.family, recipe.sampling)
        row = evaluation.row(name, "student", generate, evaluation.prompts(size, 0), steps=len(recipe.levels), guidance=recipe.sampling.guidance)
    write_json(file, {"row": row.json(), "iterations": recipe.steps, "train_cpu_s": seconds, "seed": seed, **(about or {})})
    print(f"{file.name}: {time.process_time() - began:.0f} s of CPU", flush=True)
