"""What `train` is given, in the forms that people write it in, as the values that a run works with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from instep import models
from instep.data.prompt import Prompt, as_prompts, load_prompts, with_negative
from instep.data.samples import PairSamples, RealSamples
from instep.models import teacher
from instep.models.family import Family
from instep.training.probe import ModeMonitor, Monitor

FILES = (".txt", ".jsonl", ".json", ".csv")


def as_family(given: Any, dtype: torch.dtype = torch.float32) -> Family:
    """Return a family as it is, a diffusers pipeline wrapped in its family, and the family of a model that is named by its folder, loaded in `dtype`.

    Raises ValueError for anything else, and for a pipeline that no family supports.
    """
    if isinstance(given, str | Path):
        return models.load(str(given), dtype=dtype)
    if _is_pipeline(given):
        return models.family_of(given)
    if given is None or isinstance(given, type) or not (hasattr(given, "latent_shape") and hasattr(given, "encode")):
        fix = f"call it, {given.__name__}(pipe, ...)" if isinstance(given, type) else "give a diffusers pipeline, a family, or the path of a model"
        raise ValueError(f"family: {given!r} is not allowed; {fix}")
    return given


def as_taught(given: Any, student: Family, dtype: torch.dtype) -> Family | None:
    """Return the teacher of a student that is named by its folder (loaded in `dtype`), or given as a pipeline or a family; None if none is given.

    Raises ValueError for one whose latents, texts or levels are not the student's (`models/teacher.py`).
    """
    if given is None:
        return None
    if isinstance(given, str | Path):
        return teacher.teacher_in(Path(given), student, dtype)
    return teacher.as_teacher(models.family_of(given, student.size) if _is_pipeline(given) else given, student)


def _is_pipeline(given: Any) -> bool:
    """Whether it is a diffusers pipeline; diffusers is not imported to find out."""
    return any(kind.__name__ == "DiffusionPipeline" and kind.__module__.startswith("diffusers.") for kind in type(given).__mro__)


def as_prompt_list(given: Any) -> tuple[Prompt, ...]:
    """Return prompts as values: of one text or prompt, that one; of a file, what `load_prompts` reads there; of a generator, all it yields.

    Raises ValueError for None, for a text that names a file of prompts (a Path is read), and for items that are no prompts.
    """
    if isinstance(given, Path):
        return tuple(load_prompts(given))
    if isinstance(given, str):
        if given.lower().endswith(FILES):
            raise ValueError(f"prompts: {given!r} names a file; give Path({given!r}), or [{given!r}] if it is a prompt")
        return as_prompts([given])
    if isinstance(given, Prompt):
        return (given,)
    if not isinstance(given, Iterable) or isinstance(given, bytes | dict):
        raise ValueError(f"prompts: {given if given is None else type(given).__name__} is not allowed; give a list of texts")
    return as_prompts(list(given))


def every_prompt(
    prompts: Sequence[Prompt], real: RealSamples | None, pairs: PairSamples | None, monitor: Monitor | None, negative: str | None
) -> tuple[Prompt, ...]:
    """Return the prompts of a run, of its samples and of its monitor (which get the negative prompt `negative`), each once."""
    shown = with_negative(monitor.open_prompts, negative) if isinstance(monitor, ModeMonitor) else ()
    return tuple(dict.fromkeys([*prompts, *(real.prompts if real else ()), *(pairs.prompts if pairs else ()), *shown]))
