"""DMDR: matching with a reward-tilted force first, then matching and reinforcement learning as one loss (Jiang et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from instep.diffusion.levels import AnnealedBeta, OneOf
from instep.methods.adapted_teacher import Annealed
from instep.methods.critics import FakeScoreLoss
from instep.methods.operators import AdvantageGuided, MatchingOnly, Operator, RewardTilted
from instep.methods.policy import DDPO, GRPO
from instep.methods.preference import Preference
from instep.methods.recipe import AdamWConfig, LoRA, Recipe, RoleConfig, Stage
from instep.methods.reward_gradient import RewardGradient
from instep.methods.term import Critic, Term, WeightUnit
from instep.recipes.common import Common

Branch = Literal["refl", "grpo", "dpo", "ddpo"]
Tilt = Literal["none", "literal", "zscore", "weight"]
Beside = Literal["matching", "dm", "advantage"]


def reinforce(
    common: Common,
    name: str,
    steps: int,
    kind: Branch,
    weight: float,
    *,
    unit: WeightUnit = "raw",
    group: int,
    clip: float,
    kl: float,
    beta: float,
    beside: Sequence[Term],
    critics: Sequence[Critic],
    inner_epochs: int,
) -> Stage:
    """Builds a stage of reinforcement learning, with the terms in `beside`."""
    if kind == "ddpo" and inner_epochs > 1:
        raise ValueError(f"inner_epochs: {inner_epochs} is not allowed with ddpo, which has no ratio to the student that rolled out; use 1, or grpo")
    branches: dict[Branch, Term] = {
        "refl": RewardGradient(weight=weight, unit=unit),
        "grpo": GRPO(weight=weight, unit=unit, clip=clip, kl=kl),
        "ddpo": DDPO(weight=weight, unit=unit),
        "dpo": Preference(weight=weight, unit=unit, beta=beta, levels=OneOf(common.levels)),
    }
    terms = (*beside, branches[kind])
    parts: tuple[Term | Critic, ...] = (*terms, *critics)
    alone = not any("reward" in part.needs for part in parts)
    stage = common.stage(name, steps, terms, tuple(critics), group=1 if alone else group)
    return replace(stage, inner_epochs=inner_epochs)


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
    clip: float = 1e-3,
    kl: float = 0.0,
    beta: float = 500.0,
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
        rl: the reinforcement-learning branch: refl (gradient of a differentiable reward), dpo (best against worst of a group, any reward), grpo or
            ddpo (any reward, a student of 2 steps or more).
        weight: weight of that branch.
        weight_unit: unit of that weight. share: the norm of the branch's gradient as a part of matching's, so that 0.5 is half as long for every branch. raw: a
            factor on the published loss (the paper's lambda: 0.5), whose gradients differ by a factor of thousands between branches.
        beside: the term beside it in stage 2: matching, its dm part alone, or matching with guidance weighted by the advantage.
        clip: bound of GRPO's ratio.
        kl: weight of GRPO's penalty for leaving the student of stage 1; 0 by default, since matching takes its place.
        beta: temperature of dpo.
        inner_epochs: student updates on one rollout in stage 2; GRPO's clip has an effect from 2 on.
    """
    first, teacher = _warm(common, warm, group, tilt, dyna_rs, dyna_dg if warm else 0.0)
    operators: dict[Beside, Operator | None] = {"matching": None, "dm": MatchingOnly(), "advantage": AdvantageGuided()}
    joint = reinforce(
        common,
        "joint",
        iterations,
        rl,
        weight,
        unit=weight_unit,
        group=group,
        clip=clip,
        kl=kl,
        beta=beta,
        beside=(common.matching(operator=operators[beside]),),
        critics=(common.critic(),),
        inner_epochs=inner_epochs,
    )
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
