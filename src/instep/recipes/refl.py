"""Matching together with the gradient of a reward: the external force of DMDR in AMD's Table 1, and the second stage of DMDR with ReFL."""

from __future__ import annotations

from instep.methods.recipe import Recipe, RolloutConfig
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
    through: int = 0,
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
        through: how far the reward's gradient reaches: 0, the supervised step alone, whose own estimate is scored (DMDR); K, the last K steps of the
            student, whose final sample is scored (DRaFT-K: Clark et al. 2024; memory times K).
    """
    reward = RewardGradient(weight=weight, unit=weight_unit if matching else "raw", on="final" if through else "exit")
    rollout = RolloutConfig(common.levels, max(through, 1))
    climb = common.stage("climb", iterations, (common.matching(matching), reward), (common.critic(),), rollout=rollout)
    return common.recipe("refl", common.distil(distil), climb)
