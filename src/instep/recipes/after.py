"""Baselines for joint training: they tune a distilled student afterwards, without matching. They are comparisons only."""

from __future__ import annotations

from instep.diffusion.levels import OneOf
from instep.methods.policy import KLUnit
from instep.methods.recipe import Recipe, Spread, Stage
from instep.methods.regression import Denoising
from instep.recipes.common import Common
from instep.recipes.reinforcement import Branch, Reinforcement


def rl_after(
    common: Common = Common(),
    *,
    distil: int = 80,
    iterations: int = 40,
    group: int = 8,
    rl: Branch = "refl",
    weight: float = 1.0,
    through: int = 0,
    clip: float | None = None,
    kl: float = 0.0,
    kl_unit: KLUnit = "mean",
    spread: Spread = "group",
    advantage_clip: float | None = 5.0,
    beta: float | None = None,
    inner_epochs: int = 1,
) -> Recipe:
    """Baseline for joint training: distil, then reinforcement learning alone. It hacks the reward; for comparison only.

    Args:
        common: options of every recipe.
        distil: student updates of plain matching.
        iterations: student updates of reinforcement learning alone.
        group: samples a prompt, compared with each other.
        rl: the reinforcement-learning branch: refl, grpo, dpo, pso or ddpo (see `dmdr`).
        weight: weight of that branch.
        through: of refl, how many of the student's last steps the gradient of the final sample's reward reaches; 0: the supervised step alone.
        clip: bound of the ratio (default of grpo: 1e-3, of pso: 0.1).
        kl: weight of grpo's penalty for leaving the distilled student.
        kl_unit: unit of that penalty: mean over elements (Flow-GRPO's released code), or sum.
        spread: divisor of a group's rewards: its own deviation (group), that of the whole run, or none.
        advantage_clip: bound of an advantage.
        beta: temperature of dpo (default: 500) and of pso (default: 50).
        inner_epochs: student updates on one rollout.
    """
    branch = Reinforcement(
        kind=rl,
        weight=weight,
        group=group,
        through=through,
        clip=clip,
        kl=kl,
        kl_unit=kl_unit,
        spread=spread,
        advantage_clip=advantage_clip,
        beta=beta,
        inner_epochs=inner_epochs,
    )
    return common.recipe("rl-after", common.distil(distil), branch.stage(common, "reinforce", iterations))


def sft_after(common: Common = Common(), *, distil: int = 80, iterations: int = 40) -> Recipe:
    """Baseline for joint training: distil, then fine-tune on real samples alone. The samples blur; for comparison only.

    Args:
        common: options of every recipe.
        distil: student updates of plain matching.
        iterations: student updates of denoising real samples at the student's own levels.
    """
    tune = Stage("tune", iterations, common.batch, (Denoising(levels=OneOf(common.levels)),), accumulate=common.accumulate)
    return common.recipe("sft-after", common.distil(distil), tune)
