"""Recipes: one file a paper, plain functions that return a `Recipe` and whose parameters are the command line's options. They may import `methods`, `diffusion`
and `core`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from instep.methods.recipe import Recipe

# name on the command line -> module and function; a recipe is imported when it is asked for
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
    "flow-grpo": ("instep.recipes.many_step", "flow_grpo"),
    "dance-grpo": ("instep.recipes.many_step", "dance_grpo"),
    "flow-dpo": ("instep.recipes.many_step", "flow_dpo"),
    "apo": ("instep.recipes.apo", "apo"),
    "naive-adaptive": ("instep.recipes.amd", "naive_adaptive"),
}


def find(name: str) -> Callable[..., Recipe]:
    """The recipe function called `name`; ValueError with the list of names otherwise."""
    if name not in NAMES:
        raise ValueError(f"recipe: {name!r} is not known; allowed: {', '.join(NAMES)} (`instep recipes` describes them)")
    module, function = NAMES[name]
    return getattr(import_module(module), function)
