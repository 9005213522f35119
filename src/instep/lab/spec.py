"""What a laboratory comparison is asked for: recipes with their overrides, written RECIPE or RECIPE:key=value,key=value."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from instep.recipes import find
from instep.recipes.common import Common
from instep.train.recipe import Recipe

# the option with the length of a recipe's first stage, and its part of all iterations
FIRST_STAGE = {"distil": 2 / 3, "warm": 1 / 2}


def build(spec: str, common: Common, iterations: int) -> Recipe:
    """The recipe of `spec` with the laboratory's options, `iterations` student updates in all.

    Keys are the recipe's own options or common ones (steps, guidance, condition_on_exit, ...). A recipe that has a first stage by default
    gets its part of the iterations for it (`FIRST_STAGE`). ValueError for unknown recipes, keys and values.
    """
    name, _, rest = spec.partition(":")
    function = find(name)
    own = {key: p for key, p in inspect.signature(function).parameters.items() if key != "common"}
    shared = {f.name: f.type for f in fields(Common)}
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in own | shared:
            raise ValueError(f"recipe {spec!r}: {part!r} is not key=value with a key of {name}; allowed keys: {', '.join([*own, *shared])}")
        given[key] = _value(spec, key, value)
    common = replace(common, **{key: value for key, value in given.items() if key in shared})
    mine = {key: value for key, value in given.items() if key in own}
    first = next((key for key in FIRST_STAGE if key in own), None)
    if first is not None:
        before = mine.setdefault(first, round(iterations * FIRST_STAGE[first]) if own[first].default else 0)
        mine.setdefault("iterations", iterations - before)
    mine.setdefault("iterations", iterations)
    return function(common, **mine)


def _value(spec: str, key: str, text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if text.isidentifier() or text.replace("-", "_").isidentifier():
            return text
        raise ValueError(f"recipe {spec!r}: the value {text!r} of {key} is neither a number, a truth value nor a word") from None


def check_names(specs: Sequence[str]) -> None:
    """ValueError if there are none, or one is given twice."""
    if not specs:
        raise ValueError("recipe: none was given; write for example `instep lab dmd2 amd amd:tilt=0`")
    twice = [spec for i, spec in enumerate(specs) if spec in specs[:i]]
    if twice:
        raise ValueError(f"recipe: {twice[0]!r} was given twice; each is run once, seeds are --members")
