"""DOLLAR: variational score distillation, consistency distillation and a latent reward model in one loss (Ding et al. 2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from instep.methods.consistency import Consistency, Distance, Target
from instep.methods.latent_reward import LatentFit, LatentGradient
from instep.methods.latent_reward_model import Frames, Kind, LatentRewardShape
from instep.methods.recipe import Recipe
from instep.methods.role_config import AdamWConfig, LatentRewardConfig
from instep.methods.term import Critic, Term
from instep.recipes.common import Common

Heterogeneous = Literal["same", "x0"]


def dollar(
    common: Common = Common(),
    *,
    distil: int = 0,
    fit: int = 40,
    iterations: int = 100,
    matching: float = 1.0,
    cd: float = 0.5,
    cd_steps: int = 5,
    cd_guidance: float | None = None,
    distance: Distance = "mse",
    target: Target = "student",
    weight: float = 0.1,
    kind: Kind = "text-video",
    frames: Frames = "volume",
    latent_reward: AdamWConfig = AdamWConfig(1e-3, betas=(0.9, 0.999)),
    latent_reward_updates: int = 4,
    prediction_type: Heterogeneous = "same",
) -> Recipe:
    """Distil, stay on the teacher's trajectories, and climb a latent copy of any reward, also one without a gradient: DOLLAR.

    Args:
        common: options of every recipe.
        distil: student updates of matching alone before; 0 leaves the stage out.
        fit: iterations in which only the latent reward model learns, on the student's samples and real ones; 0 trains both at once from the start, as
            the paper does.
        iterations: student updates.
        matching: weight of distribution matching (VSD); 0 leaves consistency distillation alone, which blurs.
        cd: weight of consistency distillation (the paper: 0.5); 0 leaves it out.
        cd_steps: steps of the teacher between its two ends (the paper: 5 is better than 1).
        cd_guidance: guidance of these steps; that of matching if it is not given (the paper: 8.5, and 4.5 for matching).
        distance: of consistency distillation: mse, or huber.
        target: the target consistency function: the student's own without gradient, its average's, or the teacher's.
        weight: weight of the latent reward's gradient, in standard deviations of the reward (the paper's 1.0 is in the reward's own unit, whose deviation
            there is 0.01 to 0.03); 0 leaves the latent reward model out.
        kind: inputs of the latent reward model: text-video, video, text-image or image.
        frames: whether it processes a video as a volume, or frame by frame with the mean over frames, as in the paper's experiments.
        latent_reward: AdamW of the latent reward model.
        latent_reward_updates: its updates an iteration (the paper: 1).
        prediction_type: what the student's network predicts: the same as the teacher's, or x0 (a comparison of the paper's; such a student is not exported).
    """
    for name, value in (("matching", matching), ("cd", cd), ("weight", weight)):
        if value < 0:
            raise ValueError(f"{name}: {value} is not allowed; a weight is 0 (leaves it out) or more")
    if not (matching or cd or weight):
        raise ValueError("matching, cd, weight: all three are 0, so nothing would be trained; give one of them a positive weight")
    terms: list[Term] = [common.matching(matching)] if matching else []
    critics: list[Critic] = [common.critic()] if matching else []
    if cd:
        guided = common.guidance if cd_guidance is None else cd_guidance
        terms.append(Consistency(weight=cd, steps=cd_steps, shift=common.shift, guidance=guided, distance=distance, target=target))
    learners = (LatentFit(updates=latent_reward_updates, others=kind.startswith("text")),) if weight else ()
    if weight:
        terms.append(LatentGradient(weight=weight))
    critics += learners
    main = common.stage("dollar", iterations, tuple(terms), tuple(critics))
    if not (matching or weight):
        main = replace(main, rollout=None)  # consistency distillation starts from real samples: no rollout is needed
    recipe = common.recipe(
        "dollar",
        common.distil(distil),
        *([common.stage("fit", fit, (), learners)] if weight else []),
        main,
        latent_reward=LatentRewardConfig(LatentRewardShape(kind, frames), latent_reward) if weight else None,
        prediction_type=None if prediction_type == "same" else prediction_type,
    )
    if matching or distil:
        return recipe
    return replace(recipe, roles={name: role for name, role in recipe.roles.items() if name != "fake"})  # no term needs a fake
