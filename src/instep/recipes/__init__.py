"""Recipes: one file a paper, plain functions that return a `Recipe` and whose parameters are the command line's options. They may import `methods`, `diffusion`
and `core`; `defaults.py` reads the published settings of a model (`models/preset.py`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from instep.core.user_code import load_function, source_identity
from instep.methods.recipe import Recipe

if TYPE_CHECKING:
    from instep.models.preset import ModelSettings

# name on the command line -> module and function; each recipe is imported only when it is used
NAMES: dict[str, tuple[str, str]] = {
    "dmd": ("instep.recipes.dmd", "dmd"),
    "dmd2": ("instep.recipes.dmd", "dmd2"),
    "decoupled-dmd": ("instep.recipes.decoupled_dmd", "decoupled_dmd"),
    "magic": ("instep.recipes.magic", "magic"),
    "dm-align-pair": ("instep.recipes.dm_align", "dm_align_pair"),
    "dm-align-group": ("instep.recipes.dm_align", "dm_align_group"),
    "amd": ("instep.recipes.amd", "amd"),
    "refl": ("instep.recipes.refl", "refl"),
    "dmdr": ("instep.recipes.dmdr", "dmdr"),
    "dollar": ("instep.recipes.dollar", "dollar"),
    "rl-after": ("instep.recipes.after", "rl_after"),
    "sft-after": ("instep.recipes.after", "sft_after"),
    "pso-offline": ("instep.recipes.after", "pso_offline"),
    "flow-grpo": ("instep.recipes.many_step", "flow_grpo"),
    "dance-grpo": ("instep.recipes.many_step", "dance_grpo"),
    "flow-dpo": ("instep.recipes.many_step", "flow_dpo"),
    "draft": ("instep.recipes.many_step", "draft"),
    "apo": ("instep.recipes.apo", "apo"),
    "naive-adaptive": ("instep.recipes.amd", "naive_adaptive"),
}


def find(name: str) -> Callable[..., Recipe]:
    """Return the recipe function called `name`, or the user's own of `module:function`.

    Raises ValueError for a name that is not in the list, and for an object that cannot serve as a recipe: it is a function with a parameter `common`
    (a `Common` or a dataclass derived from it), each of whose parameters has a type.
    """
    if ":" in name:
        return _own(name)
    if name not in NAMES:
        raise ValueError(
            f"recipe: {name!r} is not known; allowed: {', '.join(NAMES)} (`instep recipes` describes them), or module:function for one of your own"
        )
    module, function = NAMES[name]
    return getattr(import_module(module), function)


def _own(name: str) -> Callable[..., Recipe]:
    """Loads the user's recipe function and checks its signature."""
    function = load_function(name, "recipe")
    if not inspect.isfunction(function):
        raise ValueError(f"recipe: {name!r} is {_article(type(function).__name__)}, not a function; write def my_recipe(common: Common = Common()) -> Recipe")
    try:
        hints = inspect.get_annotations(function, eval_str=True)
    except Exception as error:
        raise ValueError(f"recipe: the types of {name!r} cannot be read ({error}); import what they name in its module") from error
    kind = hints.get("common")
    if not (inspect.isclass(kind) and dataclasses.is_dataclass(kind)):
        raise ValueError(f"recipe: {name!r} has no parameter `common` with the type Common; write def {function.__name__}(common: Common = Common(), ...)")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"recipe: {name!r} takes *{parameter.name}; name each parameter, since each is an option")
        if parameter.name not in hints:
            raise ValueError(f"recipe: the parameter {parameter.name!r} of {name!r} has no type; write for example {parameter.name}: float = 1.0")
    return function


def as_recipe(given: Any, function: Callable[..., Any] | None = None, name: str | None = None, settings: ModelSettings | None = None) -> Recipe:
    """Return `given` if it is a recipe; a recipe function is called with its defaults, those that recipes share being the model's published `settings`.

    `function` is the function that returned it; `name` is its `module:function` if it is the user's own, and the recipe then records its `source`. Raises
    ValueError for anything else, and for a function that needs arguments.
    """
    if callable(given) and not isinstance(given, type):
        function = given
        shown = getattr(given, "__name__", type(given).__name__)
        needed = [p.name for p in inspect.signature(given).parameters.values() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if needed:
            raise ValueError(f"recipe: the function {shown} was given, which needs {', '.join(needed)}; call it, {shown}({needed[0]}=...)")
        given = given() if settings is None else _called(given, settings)
    if not isinstance(given, Recipe):
        what = f"{name or function.__name__!r} returned {type(given).__name__}" if function is not None else f"{given!r} is not allowed"
        raise ValueError(f"recipe: {what}; a recipe function returns a Recipe, for example common.recipe(NAME, common.stage(...))")
    return given if name is None or function is None else dataclasses.replace(given, source=source_identity(function))


def _called(function: Callable[..., Any], settings: ModelSettings) -> Any:
    """Calls a recipe function with the model's published settings."""
    from instep.recipes.defaults import common_of, with_settings

    common = common_of(function)
    return function() if common is None else function(common=with_settings(common, settings))


def _article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
