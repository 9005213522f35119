"""`instep recipes`: what can be trained; with a model, its published settings and the defaults that recipes have on it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Column, Table

from instep.bundled import DESCRIBED, LISTED, settings_of
from instep.models.preset import Distillation, ModelSettings, Preset
from instep.recipes import NAMES, find
from instep.recipes.common import Common
from instep.recipes.defaults import chosen_options, flat, with_settings
from instep.recipes.many_step import ManySteps

MODEL_HELP = f"A bundled model ({DESCRIBED}) or the path of a diffusers pipeline folder: what is published for it, and the defaults that recipes have on it."
# fields of a preset that are no settings of sampling
ELSEWHERE = ("source", "distillation", "for_recipes", "micro_batch")
LARGE = "not published: 1 for a model above a billion parameters"


@dataclass(frozen=True)
class RecipesArgs:
    """What is listed: the recipes, or what is published for a model."""

    model: Annotated[str | None, tyro.conf.arg(help=MODEL_HELP)] = None


def recipes_command(args: RecipesArgs) -> int:
    """Prints the recipes, or a model's published settings with their sources and the value of every shared option."""
    console = Console()
    if args.model is None:
        console.print(recipes())
        console.print("Options of one: instep train RECIPE --help", highlight=False)
        return 0
    settings = settings_of(args.model)
    if settings is None:
        raise ValueError(
            f"model: {args.model!r} is not a model folder; allowed: {LISTED}, or the path of a diffusers pipeline folder as save_pretrained writes it"
        )
    console.print(published(settings, Path(args.model).name))
    users = {kind: ", ".join(name for name in NAMES if isinstance(shared(name), kind)) for kind in (Common, ManySteps)}
    for kind, names in users.items():
        console.print(defaults(kind(), settings, f"Options of {names}"))
    console.print(f"An option that is given wins: instep train RECIPE --model {args.model} --help", highlight=False, soft_wrap=True)
    return 0


def recipes() -> Table:
    """The recipes, what each does and its stages."""
    table = Table("recipe", "what it does", "stages (default steps)")
    for name in NAMES:
        function = find(name)
        stages = ", ".join(f"{stage.name} ({stage.steps})" for stage in function().stages)
        table.add_row(name, (inspect.getdoc(function) or "").split("\n")[0], stages)
    return table


def shared(name: str) -> Any:
    """The options that a recipe shares with others, at its own defaults."""
    return inspect.signature(find(name)).parameters["common"].default


def published(settings: ModelSettings, name: str) -> Table:
    """The published settings of a model, each with where it stands; a source is printed once, where its values begin."""
    table = Table("published", Column("value", overflow="fold"), Column("source", overflow="fold"), title=f"What is published for {name}")
    last = ""
    for setting, value, source in rows(settings):
        table.add_row(setting, _shown(value), "" if source == last else source)
        last = source
    return table


def rows(settings: ModelSettings) -> Iterator[tuple[str, Any, str]]:
    """Name, value and source of every published setting."""
    preset, distillation = settings.preset, settings.preset.distillation
    yield from (("sampling: " + name, value, preset.source) for name, value in _values(preset))
    if settings.shift is not None:
        yield "sampling: shift", settings.shift, "the model's scheduler"
    if distillation is not None:
        yield from (("distillation: " + name, value, distillation.source) for name, value in _values(distillation))
    if preset.micro_batch is not None:
        yield "training: micro_batch", preset.micro_batch, LARGE if distillation is None else distillation.source


def _values(published: Preset | Distillation) -> list[tuple[str, Any]]:
    found = [(field.name, getattr(published, field.name)) for field in fields(published) if field.name not in ELSEWHERE]
    return [(name, value) for name, value in found if value is not None]


def defaults(common: Any, settings: ModelSettings, title: str) -> Table:
    """The value that each shared option has on the model, and whether it comes from the model or from the library."""
    table, chosen = Table("option", "default", "from", title=title), chosen_options(common, settings)
    for name, value in flat(with_settings(common, settings)).items():
        table.add_row(f"--{name.replace('_', '-')}", _shown(value), "model" if name in chosen else "library")
    return table


def _shown(value: Any) -> str:
    return ", ".join(map(_shown, value)) if isinstance(value, tuple) else str(value)
