"""Reinforcement learning on the many-step model itself: Flow-GRPO, DanceGRPO, Flow-DPO and DRaFT, the baselines for joint training.

The student stays a many-step model with guidance and is exported with its own scheduler; `instep train dmd2 --model FOLDER/student` distils
it into a few-step student afterwards, which is the two-stage pipeline of DMDR's Table 1 (reinforcement learning, then distillation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from instep.core.numbers import check_number, check_whole
from instep.diffusion.guidance_scales import GuidanceRange
from instep.diffusion.levels import Uniform, few_step_levels
from instep.diffusion.transitions import CPS, DanceSDE, Deterministic, FlowSDE, Posterior, Transition
from instep.methods.policy import GRPO, KLUnit
from instep.methods.preference import Preference
from instep.methods.recipe import Advantage, Recipe, RolloutConfig, Spread, Stage
from instep.methods.reward_gradient import RewardGradient
from instep.methods.role_config import AdamWConfig, RoleConfig
from instep.methods.term import Term
from instep.recipes.common import adapter, with_copies

# steps of a sampler of published models end here
MOST_STEPS = 1000

Kind = Literal["flow", "dance", "cps", "ddpm"]


@dataclass(frozen=True, kw_only=True)
class ManySteps:
    """Options of recipes that train the many-step model itself."""

    steps: int = 10
    """Sampling steps of a rollout; two evaluations each with guidance."""
    batch: int = 32
    """Samples of a micro-batch, a multiple of the group's size. Several processes (torchrun) share them."""
    guidance: float = 3.0
    """Classifier-free guidance of the model, in rollouts and in use; 1 is none."""
    shift: float = 3.0
    """Timestep shift of the levels."""
    student: AdamWConfig = AdamWConfig(1e-4)
    """AdamW of the model."""
    ema: float | None = 0.95
    """Decay of the averaged model that is exported; None exports the model itself."""
    lora_rank: int | None = None
    """Train an adapter of this rank instead of a full copy."""
    accumulate: int = 1
    """Micro-batches an update."""

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, 2, MOST_STEPS, what=f"a many-step model has 2 to {MOST_STEPS}, 10 is usual (in the laboratory RECIPE:steps=10)")
        for name in ("batch", "accumulate"):
            check_whole(name, getattr(self, name), 1)
        check_number("guidance", self.guidance, 0, what="it is a finite scale, 0 or more; 1 is none")
        check_number("shift", self.shift, 0, open_below=True)

    @property
    def levels(self) -> tuple[float, ...]:
        """Levels of the sampler."""
        return few_step_levels(self.steps, self.shift)

    def recipe(
        self,
        name: str,
        iterations: int,
        group: int,
        term: Term,
        transition: Transition,
        inner_epochs: int = 1,
        advantage: Advantage = Advantage(),
        shared_noise: float = 0.0,
    ) -> Recipe:
        """One stage of one objective on the model's own rollouts."""
        stage = Stage(
            "reinforce",
            iterations,
            self.batch,
            (term,),
            rollout=RolloutConfig(self.levels, transition=transition, guidance=self.guidance, shared_noise=shared_noise),
            group=group,
            accumulate=self.accumulate,
            inner_epochs=inner_epochs,
            advantage=advantage,
        )
        return self.stages(name, stage)

    def stages(self, name: str, *stages: Stage, sampler: Literal["few-step", "ode"] = "ode", guidance_range: GuidanceRange | None = None) -> Recipe:
        """A recipe of these stages; those without steps are left out. `guidance_range`: the guidance scales that the student is conditioned on."""
        stages = tuple(stage for stage in stages if stage.steps) or stages
        roles = {"student": RoleConfig(self.student, adapter(self.lora_rank), ema=self.ema, guidance_range=guidance_range), "teacher": RoleConfig()}
        return Recipe(name, self.levels, with_copies(roles, stages), stages, self.guidance, sampler=sampler)


def stochastic(kind: Kind, noise: float) -> Transition:
    """Returns the stochastic transition of a policy gradient's rollout."""
    kinds: dict[Kind, type[FlowSDE] | type[DanceSDE] | type[CPS] | type[Posterior]] = {"flow": FlowSDE, "dance": DanceSDE, "cps": CPS, "ddpm": Posterior}
    return kinds[kind](noise)


def flow_grpo(
    common: ManySteps = ManySteps(),
    *,
    iterations: int = 60,
    group: int = 8,
    sde: Kind = "flow",
    noise: float = 0.7,
    clip: float = 1e-4,
    kl: float = 0.04,
    kl_unit: KLUnit = "mean",
    spread: Spread = "group",
    advantage_clip: float | None = 5.0,
    fraction: float = 1.0,
    inner_epochs: int = 1,
    shared_noise: float = 0.0,
) -> Recipe:
    """Align the many-step model itself by policy gradient on its sampler made stochastic (Flow-GRPO); no distillation.

    Args:
        common: options of recipes that train the many-step model.
        iterations: updates.
        group: samples a prompt, compared with each other.
        sde: how the sampler is made stochastic: flow (Flow-GRPO), dance (DanceGRPO; both on rectified flows), cps or ddpm (as much noise as the path has;
            any path).
        noise: its strength (flow: 0.7; dance: 0.3; cps, ddpm: up to 1, and on any path).
        clip: bound of the ratio (the released code: 1e-4 for images, 1e-3 for video).
        kl: weight of the penalty for leaving the pretrained model (the paper: 0.04 for composition and rendered text, 0.01 for human preference); 0 leaves it
            out, and its passes of the reference.
        kl_unit: unit of that penalty, the divergence of two Gaussians: its mean over elements (the released code, to which its weights belong), or their sum
            (the divergence as the paper writes it).
        spread: what a group's rewards are divided by to become advantages: each group's own deviation (the paper), that of the whole run, or none:
            advantages in the reward's own unit (Dr. GRPO).
        advantage_clip: bound of an advantage (the released code: 5).
        fraction: part of the steps, drawn anew, that an update trains on.
        inner_epochs: updates on one rollout.
        shared_noise: correlation of the initial noise within a group, 0 (the released code) to 1 (DanceGRPO).
    """
    term = GRPO(clip=clip, kl=kl, kl_unit=kl_unit, fraction=fraction)
    return common.recipe("flow-grpo", iterations, group, term, stochastic(sde, noise), inner_epochs, Advantage(spread, advantage_clip), shared_noise)


def dance_grpo(
    common: ManySteps = ManySteps(),
    *,
    iterations: int = 60,
    group: int = 8,
    noise: float = 0.3,
    clip: float = 1e-4,
    spread: Spread = "group",
    advantage_clip: float | None = 5.0,
    fraction: float = 0.6,
    inner_epochs: int = 1,
    shared_noise: float = 1.0,
) -> Recipe:
    """Align the many-step model itself by policy gradient, the same noise at every level, on a part of the steps (DanceGRPO); no distillation.

    Args:
        common: options of recipes that train the many-step model.
        iterations: updates.
        group: samples a prompt, compared with each other.
        noise: strength of the sampler's noise.
        clip: bound of the ratio (the released code: 1e-4).
        spread: what a group's rewards are divided by to become advantages: each group's own deviation (the paper), that of the whole run, or none:
            advantages in the reward's own unit (Dr. GRPO).
        advantage_clip: bound of an advantage (the released code: 5).
        fraction: part of the steps, drawn anew, that an update trains on.
        inner_epochs: updates on one rollout.
        shared_noise: correlation of the initial noise within a group, 0 to 1. The paper begins all samples of a prompt from the same noise, without which
            its video models learned to deceive the reward.
    """
    term = GRPO(clip=clip, fraction=fraction)
    return common.recipe("dance-grpo", iterations, group, term, DanceSDE(noise), inner_epochs, Advantage(spread, advantage_clip), shared_noise)


def flow_dpo(common: ManySteps = ManySteps(), *, iterations: int = 60, group: int = 8, beta: float = 500.0) -> Recipe:
    """Align the many-step model itself by preferences between its own samples (online Flow-DPO); no distillation.

    Args:
        common: options of recipes that train the many-step model.
        iterations: updates.
        group: samples a prompt; the best is preferred to the worst.
        beta: temperature.
    """
    return common.recipe("flow-dpo", iterations, group, Preference(beta=beta, levels=Uniform(shift=common.shift)), Deterministic())


def draft(common: ManySteps = ManySteps(), *, iterations: int = 60, through: int = 1, weight: float = 1.0) -> Recipe:
    """Align the many-step model itself by the gradient of a differentiable reward through its last steps (DRaFT-K, multi-step ReFL); no distillation.

    Nothing holds the model near where it was, so it hacks the reward in time: stop early, or train an adapter of a low rank.

    Args:
        common: options of recipes that train the many-step model.
        iterations: updates.
        through: the number K of last steps, guidance included, that the gradient of the final sample's reward reaches (the paper: 1, and up to all 50; memory
            times K). The last step draws detail; what is drawn is decided in the first ones, which only a K near the number of steps reaches.
        weight: factor on the gradient.
    """
    rollout = RolloutConfig(common.levels, through, Deterministic(), common.guidance)
    stage = Stage("climb", iterations, common.batch, (RewardGradient(weight=weight, on="final"),), rollout=rollout, accumulate=common.accumulate)
    return common.stages("draft", stage)
