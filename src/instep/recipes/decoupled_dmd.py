"""Decoupled-DMD (Liu et al. 2025): guidance and matching, each at its own levels; AMD Table 1, third column."""

from __future__ import annotations

from instep.diffusion.levels import AboveExit
from instep.methods.operators import Decoupled
from instep.methods.recipe import Recipe
from instep.recipes.common import Common


def decoupled_dmd(common: Common = Common(), *, distil: int = 0, iterations: int = 100) -> Recipe:
    """Distil only: the guidance term at levels above the exit, the matching term at all levels (Decoupled-DMD).

    Args:
        common: options of every recipe.
        distil: student updates of plain matching before; 0 leaves the stage out.
        iterations: student updates.
    """
    force = common.matching(operator=Decoupled(), ca_levels=AboveExit(shift=common.shift))
    return common.recipe("decoupled-dmd", common.distil(distil), common.stage("decouple", iterations, (force,), (common.critic(),)))
