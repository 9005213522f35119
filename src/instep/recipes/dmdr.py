"""DMDR: matching with a reward-tilted force first, then matching and reinforcement learning as one loss (Jiang et al. 2025)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from instep.diffusion.levels import AnnealedBeta
from instep.methods.adapted_teacher import Annealed
from instep.methods.critics import FakeScoreLoss
from instep.methods.operators import AdvantageGuided, MatchingOnly, Operator, RewardTilted
from instep.methods.policy import KLUnit
from instep.methods.recipe import Recipe, Spread, Stage
from instep.methods.role_config import AdamWConfig, LoRA, RoleConfig
from instep.methods.term import Critic, WeightUnit
from instep.recipes.common import Common
from instep.recipes.reinforcement import Branch, Reinforcement

Tilt = Literal["none", "literal", "zscore", "weight"]
Beside = Literal["matching", "dm", "advantage"]


def dmdr(
    common: Common = Common(),
    *,
    warm: int = 60,
    iterations: int = 60,
    group: int = 8,
    tilt: Tilt = "zscore",
    dyna_rs: bool = True,
    dyna_dg: float = 0.375,
    rl: Branch = "refl",
    weight: float = 0.5,
    weight_unit: WeightUnit = "share",
    beside: Beside = "matching",
    through: int = 0,
    clip: float | None = None,
    kl: float = 0.0,
    kl_unit: KLUnit = "mean",
    spread: Spread = "group",
    advantage_clip: float | None = 5.0,
    beta: float | None = None,
    inner_epochs: int = 1,
) -> Recipe:
    """Distil with a reward-tilted force, then distil and reinforce as one loss: DMDR.

    Args:
        common: options of every recipe.
        warm: student updates of reward-tilted matching (stage 1).
        iterations: student updates of matching and reinforcement learning together (stage 2).
        group: samples a prompt, compared with each other.
        tilt: how stage 1 uses the reward: a factor on the force (zscore: exp of the advantage; literal: exp of the reward over its root mean square, after
            Eq. 4, which does almost nothing where rewards differ little beside their size), the fake's weight (weight: the exact tilt), or none.
        dyna_rs: draw re-noise levels from high noise at first, annealed over stage 1 to those of stage 2: uniform, with the timestep shift of the model
            (DynaRS).
        dyna_dg: scale at which an adapter moves the teacher at the start of stage 1, as a part of the scale that the adapter is trained at, annealed to zero
            (DynaDG; the released code: 0.75 beside a fake at 2, which is 0.375). The adapter is the fake's own with lora_rank, else one of its own;
            0 leaves it out.
        rl: the reinforcement-learning branch: refl (gradient of a differentiable reward), dpo (best against worst of a group by their denoising errors, any
            reward), grpo, ddpo, or pso (best against worst by the probabilities of the student's own steps); these three take any reward and a student
            of 2 steps or more.
        weight: weight of that branch.
        weight_unit: unit of that weight. share: the norm of the branch's gradient as a part of matching's, so that 0.5 is half as long for every branch. raw: a
            factor on the published loss (the paper's lambda: 0.5), whose gradients differ by a factor of thousands between branches.
        beside: the term beside it in stage 2: matching, its dm part alone, or matching with guidance weighted by the advantage.
        through: of refl, how far the reward's gradient reaches: 0, the supervised step alone, whose own estimate is scored (the paper); K, the last K steps
            of the student, whose final sample is scored (DRaFT-K: Clark et al. 2024; memory times K).
        clip: bound of the ratio, of grpo (default: 1e-3; Flow-GRPO and DanceGRPO: 1e-4 for images, Flow-GRPO 1e-3 for video) and of pso (default: 0.1, its
            released code).
        kl: weight of grpo's penalty for leaving the student of stage 1; 0 by default, since matching takes its place.
        kl_unit: unit of that penalty, the divergence of two Gaussians: its mean over elements (Flow-GRPO's released code, whose weights are 0.01 to 0.04), or
            their sum (the divergence itself, larger by the number of elements).
        spread: what a group's rewards are divided by to become advantages: each group's own deviation (GRPO), that of the whole run, or none: advantages in
            the reward's own unit (Dr. GRPO).
        advantage_clip: bound of an advantage (Flow-GRPO's and DanceGRPO's released code: 5, which a group of up to 26 cannot reach under its own deviation).
        beta: temperature of dpo (default: 500) and of pso (default: 50, its released code).
        inner_epochs: student updates on one rollout in stage 2; grpo's clip has an effect from 2 on.
    """
    first, teacher = _warm(common, warm, group, tilt, dyna_rs, dyna_dg if warm else 0.0)
    operators: dict[Beside, Operator | None] = {"matching": None, "dm": MatchingOnly(), "advantage": AdvantageGuided()}
    branch = Reinforcement(
        kind=rl,
        weight=weight,
        unit=weight_unit,
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
    joint = branch.stage(common, "joint", iterations, beside=(common.matching(operator=operators[beside]),), critics=(common.critic(),))
    return common.recipe("dmdr", first, joint, teacher=teacher)


def _warm(common: Common, steps: int, group: int, tilt: Tilt, dyna_rs: bool, dyna_dg: float) -> tuple[Stage, RoleConfig]:
    """Returns stage 1 and the teacher's role for it."""
    levels = AnnealedBeta(shift=common.shift) if dyna_rs else common.renoise
    operator = RewardTilted(tilt) if tilt in ("literal", "zscore") else None
    force = common.matching(operator=operator, levels=levels, adapter=Annealed(dyna_dg, 1.0) if dyna_dg else None)
    fake = common.critic(tilt=1.0 if tilt == "weight" else 0.0, levels=levels)
    critics: tuple[Critic, ...] = (fake,)
    teacher = RoleConfig()
    if dyna_dg and common.lora_rank is not None:
        force = replace(force, adapter_of="fake")
    elif dyna_dg:
        critics = (fake, FakeScoreLoss(role="teacher", updates=1, reuse=common.reuse, levels=levels, adapter_scale=1.0))
        teacher = RoleConfig(AdamWConfig(common.fake.lr), LoRA(8, 8.0), scale=0.0)
    return common.stage("tilt", steps, (force,), critics, group=1 if tilt == "none" else group), teacher
