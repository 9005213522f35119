"""Parses the recipes of a laboratory comparison, written RECIPE or RECIPE:key=value,key=value; RECIPE may be module:function."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from dataclasses import fields, replace
from types import NoneType
from typing import Any, get_args, get_type_hints

from instep.lab.run import common as laboratory
from instep.methods.recipe import Recipe
from instep.recipes import NAMES, as_recipe, find
from instep.recipes.common import Common

# options that have no meaning here: networks are small and whole, and the student itself is measured
ELSEWHERE = ("lora_rank", "ema")

# learning rate of a many-step student
MANY_STEP_LR = 3e-4

# the option with the length of a recipe's first stage, and its part of all iterations
FIRST_STAGE = {"distil": 2 / 3, "warm": 1 / 2}


def build(spec: str, common: Common, iterations: int) -> Recipe:
    """The recipe of `spec` with the laboratory's options, `iterations` student updates in all.

    Keys are the recipe's own options or common ones (steps, guidance, condition_on_exit, ...). A recipe that has a first stage by default
    gets its part of the iterations for it (`FIRST_STAGE`). ValueError for unknown recipes, keys and values.
    """
    name, rest = parts_of(spec)
    function = find(name)
    own = {key: p for key, p in inspect.signature(function).parameters.items() if key != "common"}
    types = inspect.get_annotations(function, eval_str=True)
    kind = types["common"]
    shared = {f.name: f.type for f in fields(kind) if f.name not in ELSEWHERE}
    types = get_type_hints(kind) | types
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in own | shared:
            raise ValueError(f"recipe {spec!r}: {part!r} is not key=value with a key of {name}; allowed keys: {', '.join([*own, *shared])}")
        default = own[key].default if key in own else getattr(common, key)
        given[key] = _value(spec, key, value, default, NoneType in get_args(types.get(key)))
    if "steps" in given:
        common = replace(common, student=laboratory(given["steps"]).student)
    common = replace(common, **{key: value for key, value in given.items() if key in shared})
    if kind is not Common:  # a many-step student shares some of the options
        theirs = {f.name: getattr(common, f.name) for f in fields(kind)}
        # a policy gradient moves a network that is trained already: at the rate of distillation it leaves every mode within some dozens of updates
        common = kind(**{**theirs, "student": replace(common.student, lr=MANY_STEP_LR)})
    mine = {key: value for key, value in given.items() if key in own}
    first = next((key for key in FIRST_STAGE if key in own), None)
    if first is not None:
        before = mine.setdefault(first, round(iterations * FIRST_STAGE[first]) if own[first].default else 0)
        mine.setdefault("iterations", iterations - before)
    if "iterations" in own:
        mine.setdefault("iterations", iterations)
    if missing := [key for key, p in own.items() if p.default is p.empty and key not in mine]:
        raise ValueError(f"recipe {spec!r}: {missing[0]} has no default; write {name}:{missing[0]}=VALUE")
    return as_recipe(function(common=common, **mine), function, name if ":" in name else None)


def parts_of(spec: str) -> tuple[str, str]:
    """Split RECIPE:key=value,... into the recipe and its overrides; RECIPE may be module:function."""
    name, _, rest = spec.partition(":")
    if name in NAMES or not rest or "=" in rest.partition(":")[0]:
        return name, rest
    function, _, rest = rest.partition(":")
    return f"{name}:{function}", rest


def _value(spec: str, key: str, text: str, default: Any, optional: bool) -> Any:
    """Parses the value of an option, by the type of its default; `optional`: it may be None."""
    words = {"true": True, "false": False, "none": None}
    try:
        value = words[text.lower()] if text.lower() in words and not isinstance(default, str) else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {bool: isinstance(value, bool), int: isinstance(value, int) and number, float: number, str: isinstance(value, str) and text.isidentifier()}
    if not (value is None and optional) and not fits.get(type(default), not isinstance(value, str)):
        raise ValueError(f"recipe {spec!r}: {text!r} is not allowed for {key}; it takes a value like {default!r}{' or None' * optional}")
    return value


def check_names(specs: Sequence[str]) -> None:
    """Raises ValueError if there are none, or one is given twice."""
    if not specs:
        raise ValueError("recipe: none was given; write for example `instep lab dmd2 amd amd:tilt=0`")
    twice = [spec for i, spec in enumerate(specs) if spec in specs[:i]]
    if twice:
        raise ValueError(f"recipe: {twice[0]!r} was given twice; each is run once, seeds are --members")
