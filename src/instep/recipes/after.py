"""Baselines for joint training: they tune a distilled student afterwards, without matching. They are comparisons only."""

from __future__ import annotations

from instep.diffusion.levels import OneOf
from instep.methods.recipe import Recipe, Stage
from instep.methods.regression import Denoising
from instep.recipes.common import Common
from instep.recipes.dmdr import Branch, reinforce


def rl_after(
    common: Common = Common(),
    *,
    distil: int = 80,
    iterations: int = 40,
    group: int = 8,
    rl: Branch = "refl",
    weight: float = 1.0,
    clip: float = 1e-3,
    kl: float = 0.0,
    beta: float = 500.0,
    inner_epochs: int = 1,
) -> Recipe:
    """Baseline for joint training: distil, then reinforcement learning alone. It hacks the reward; for comparison only.

    Args:
        common: options of every recipe.
        distil: student updates of plain matching.
        iterations: student updates of reinforcement learning alone.
        group: samples a prompt, compared with each other.
        rl: the reinforcement-learning branch: refl, grpo, dpo or ddpo.
        weight: weight of that branch.
        clip: bound of GRPO's ratio.
        kl: weight of GRPO's penalty for leaving the distilled student.
        beta: temperature of dpo.
        inner_epochs: student updates on one rollout.
    """
    alone = reinforce(common, "reinforce", iterations, rl, weight, group=group, clip=clip, kl=kl, beta=beta, beside=(), critics=(), inner_epochs=inner_epochs)
    return common.recipe("rl-after", common.distil(distil), alone)


def sft_after(common: Common = Common(), *, distil: int = 80, iterations: int = 40) -> Recipe:
    """Baseline for joint training: distil, then fine-tune on real samples alone. The samples blur; for comparison only.

    Args:
        common: options of every recipe.
        distil: student updates of plain matching.
        iterations: student updates of denoising real samples at the student's own levels.
    """
    tune = Stage("tune", iterations, common.batch, (Denoising(levels=OneOf(common.levels)),), accumulate=common.accumulate)
    return common.recipe("sft-after", common.distil(distil), tune)
