"""The defaults of the options that recipes share on a given model: its published settings in place of the library's own."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any, TypeVar

from instep.models.preset import Distillation, ModelSettings
from instep.recipes.common import Common
from instep.recipes.many_step import ManySteps

C = TypeVar("C")


def with_settings(common: C, settings: ModelSettings | None) -> C:
    """The shared options of a recipe with a model's published settings as their values, `common` being the recipe's own defaults.

    A value that is not published stays as it is, and so does one that the recipe itself sets apart from the library's default. None: all stay.
    """
    return common if settings is None else _replaced(common, chosen_options(common, settings))


def chosen_options(common: Any, settings: ModelSettings) -> dict[str, Any]:
    """The options that `with_settings` sets, by their names on the command line (student.lr), with their values."""
    kind = next((kind for kind in (Common, ManySteps) if isinstance(common, kind)), None)
    if kind is None or not settings.preset.for_recipes:
        return {}
    library, own = flat(kind()), flat(common)
    kept = {name for name, value in library.items() if own[name] != value}
    if kept & {"batch", "accumulate"}:
        kept |= {"batch", "accumulate"}  # their product is the published batch
    published = few_step_options(settings) if kind is Common else many_step_options(settings)
    return {name: value for name, value in published.items() if name not in kept}


def few_step_options(settings: ModelSettings) -> dict[str, Any]:
    """The published values of the options in `Common`. Without a published distillation, guidance and shift are those of the model's own sampler."""
    preset, found = settings.preset, settings.preset.distillation or Distillation(settings.preset.source)
    sampled = found.guidance is None
    values = {
        "steps": None if found.levels is None else len(found.levels),
        **_batch(found.batch),
        "guidance": preset.guidance if sampled else found.guidance,
        "guidance_2": preset.guidance_2 if sampled else found.guidance_2,
        "shift": settings.shift if found.shift is None else found.shift,
        "critic_updates": found.critic_updates,
        "student.lr": found.student_lr,
        "student.betas": found.betas,
        "student.weight_decay": found.student_weight_decay,
        "fake.lr": found.fake_lr,
        "fake_target": found.fake_target,
        "fake.betas": found.betas,
        "fake.weight_decay": found.fake_weight_decay,
        "ema": found.ema,
        "lora_rank": found.lora_rank,
    }
    return {name: value for name, value in values.items() if value is not None}


def many_step_options(settings: ModelSettings) -> dict[str, Any]:
    """The published values of the options in `ManySteps`: guidance and shift of the model's own sampler."""
    values = {"guidance": settings.preset.guidance, "shift": settings.shift}
    return {name: value for name, value in values.items() if value is not None}


def _batch(total: int | None) -> dict[str, int]:
    """A published batch as micro-batches: none is larger than the library's, since the published one was spread over many devices."""
    if total is None:
        return {}
    micro = math.gcd(total, Common().batch)
    return {"batch": micro, "accumulate": total // micro}


def flat(config: Any) -> dict[str, Any]:
    """The values in a dataclass by their names on the command line: `student.lr` is a field of the field `student`."""
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        inner = flat(value) if is_dataclass(value) else None
        found |= {field.name: value} if inner is None else {f"{field.name}.{name}": each for name, each in inner.items()}
    return found


def _replaced(config: Any, values: Mapping[str, Any]) -> Any:
    """The dataclass with `values` in place of its own, named as in `flat`."""
    changed: dict[str, Any] = {name: value for name, value in values.items() if "." not in name}
    for outer in dict.fromkeys(name.partition(".")[0] for name in values if "." in name):
        inner = {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{outer}.")}
        changed[outer] = replace(getattr(config, outer), **inner)
    return replace(config, **changed)


def common_of(function: Callable[..., Any]) -> Any:
    """The default of a recipe function's parameter `common`, or what its type makes without arguments.

    None for a function without that parameter, and for one that its caller has given a `common` already (`functools.partial`).
    """
    parameter = inspect.signature(function).parameters.get("common")
    if parameter is None or (isinstance(function, functools.partial) and "common" in function.keywords):
        return None
    if parameter.default is not parameter.empty:
        return parameter.default
    kind = inspect.get_annotations(function, eval_str=True).get("common")
    if not (inspect.isclass(kind) and is_dataclass(kind)) or any(f.default is MISSING and f.default_factory is MISSING for f in fields(kind)):
        return None
    return kind()
