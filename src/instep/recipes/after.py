"""Baselines for joint training: they tune a distilled student afterwards, without matching. They are comparisons only."""

from __future__ import annotations

from typing import Literal, get_args

from instep.diffusion.levels import OneOf
from instep.methods.critics import ErrorOf
from instep.methods.policy import KLUnit
from instep.methods.preference import Preference
from instep.methods.recipe import Recipe, RolloutConfig, Spread, Stage
from instep.methods.regression import Denoising
from instep.recipes.common import Common
from instep.recipes.reinforcement import Branch, Reinforcement

# what loses in offline PSO: the student's own samples, or labelled ones
Rejected = Literal["own", "labelled"]


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


def pso_offline(
    common: Common = Common(),
    *,
    distil: int = 80,
    iterations: int = 40,
    rejected: Rejected = "own",
    beta: float = 5.0,
    target: ErrorOf = "velocity",
) -> Recipe:
    """Baseline for joint training: distil, then prefer given samples at the student's own levels (offline pairwise sample optimisation, PSO).

    The loss is -log sigmoid(beta ((e_lost - e_won) - (e_lost_ref - e_won_ref))) of denoising errors e, the reference being the distilled student (Miao et
    al., ICLR 2025). Its online form, on the student's own trajectories ranked by a reward, is `rl-after --rl pso`.

    Args:
        common: options of every recipe.
        distil: student updates of plain matching.
        iterations: student updates on pairs.
        rejected: own: a preferred sample against a new one of the student for the same prompt, so that preferred samples alone are enough (PSO's reference
            samples); labelled: the rejected sample of each given pair.
        beta: temperature (the released code: 5).
        target: what a denoising error is taken of: velocity (flows), eps (the released code on SDXL; it has no weight at the noisiest level of a flow), or x0.
    """
    if rejected not in get_args(Rejected):
        raise ValueError(f"rejected: {rejected!r} is not known; allowed: {', '.join(get_args(Rejected))}")
    own = rejected == "own"
    # `Preference` has half of its beta there, as DPO has it
    term = Preference(name="pso", beta=2 * beta, levels=OneOf(common.levels), pairs="half-online" if own else "offline", positive=1.0, target=target)
    rollout = RolloutConfig(common.levels) if own else None
    tune = Stage("tune", iterations, common.batch, (term,), rollout=rollout, accumulate=common.accumulate, fresh=True)
    return common.recipe("pso-offline", common.distil(distil), tune)
