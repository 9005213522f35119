"""Matching together with the gradient of a reward: the external force of DMDR in AMD's Table 1, and the second stage of DMDR with ReFL."""

from __future__ import annotations

from instep.methods.recipe import Recipe
from instep.methods.reward_gradient import RewardGradient
from instep.methods.term import WeightUnit
from instep.recipes.common import Common


def refl(
    common: Common = Common(),
    *,
    distil: int = 0,
    iterations: int = 100,
    weight: float = 0.5,
    weight_unit: WeightUnit = "share",
    matching: float = 1.0,
) -> Recipe:
    """Distil and climb a differentiable reward through the decoder: matching plus ReFL.

    Args:
        common: options of every recipe.
        distil: student updates of matching alone before; 0 leaves the stage out.
        iterations: student updates of both together.
        weight: weight of the reward's gradient.
        weight_unit: unit of that weight. share: the norm of the reward's gradient as a part of matching's, so that 0.5 is half as long. raw: a factor on the
            gradient itself (DMDR's lambda_rl: 0.5), whose effect depends on the reward's unit; without matching it is always raw.
        matching: weight of the matching force beside it; 0 trains on the reward alone, which collapses.
    """
    reward = RewardGradient(weight=weight, unit=weight_unit if matching else "raw")
    terms = (common.matching(matching), reward)
    return common.recipe("refl", common.distil(distil), common.stage("climb", iterations, terms, (common.critic(),)))
