"""The branch of reinforcement learning of DMDR and of its baselines: which one, and its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from instep.diffusion.levels import OneOf
from instep.methods.policy import DDPO, GRPO, PSO, KLUnit
from instep.methods.preference import Preference
from instep.methods.recipe import Advantage, RolloutConfig, Spread, Stage
from instep.methods.reward_gradient import RewardGradient
from instep.methods.term import Critic, Term, WeightUnit
from instep.recipes.common import Common

Branch = Literal["refl", "grpo", "dpo", "pso", "ddpo"]
# bound of the ratio and temperature where none is given: Flow-GRPO's for video, PSO's released code, ours
CLIP = {"grpo": 1e-3, "pso": 0.1}
BETA = {"dpo": 500.0, "pso": 50.0}


@dataclass(frozen=True, kw_only=True)
class Reinforcement:
    """A branch with its options; `recipes.dmdr.dmdr` describes them."""

    kind: Branch
    weight: float
    unit: WeightUnit = "raw"
    group: int
    through: int
    clip: float | None
    kl: float
    kl_unit: KLUnit
    spread: Spread
    advantage_clip: float | None
    beta: float | None
    inner_epochs: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(Branch):
            raise ValueError(f"rl: {self.kind!r} is not known; allowed: {', '.join(get_args(Branch))}")
        if self.kind == "ddpo" and self.inner_epochs > 1:
            raise ValueError(
                f"inner_epochs: {self.inner_epochs} is not allowed with ddpo, which has no ratio to the student that rolled out; use 1, or grpo or pso"
            )
        if self.through and self.kind != "refl":
            raise ValueError(f"through: {self.through} is not allowed with {self.kind}, which needs no gradient of the reward; leave it out, or use refl")

    def term(self, levels: tuple[float, ...]) -> Term:
        """The term of the branch for a student of these levels."""
        clip, beta = CLIP.get(self.kind, 0.0) if self.clip is None else self.clip, BETA.get(self.kind, 0.0) if self.beta is None else self.beta
        if self.kind == "refl":
            return RewardGradient(weight=self.weight, unit=self.unit, on="final" if self.through else "exit")
        if self.kind == "grpo":
            return GRPO(weight=self.weight, unit=self.unit, clip=clip, kl=self.kl, kl_unit=self.kl_unit)
        if self.kind == "pso":
            return PSO(weight=self.weight, unit=self.unit, clip=clip, beta=beta)
        if self.kind == "ddpo":
            return DDPO(weight=self.weight, unit=self.unit)
        return Preference(weight=self.weight, unit=self.unit, beta=beta, levels=OneOf(levels))

    def stage(self, common: Common, name: str, steps: int, *, beside: Sequence[Term] = (), critics: Sequence[Critic] = ()) -> Stage:
        """A stage of it, with the terms in `beside`."""
        terms = (*beside, self.term(common.levels))
        parts: tuple[Term | Critic, ...] = (*terms, *critics)
        compares = any("reward" in part.needs for part in parts)
        stage = common.stage(
            name,
            steps,
            terms,
            tuple(critics),
            group=self.group if compares else 1,
            advantage=Advantage(self.spread, self.advantage_clip),
            rollout=RolloutConfig(common.levels, max(self.through, 1)),
        )
        return replace(stage, inner_epochs=self.inner_epochs)
