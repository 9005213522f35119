"""The options that few-step recipes share, and the parts that they are built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from instep.core.numbers import check_number, check_whole
from instep.diffusion.levels import LevelSampler, Uniform, few_step_levels
from instep.diffusion.prediction import PredictionType
from instep.methods.adapted_teacher import Annealed
from instep.methods.critics import ErrorOf, FakeScoreGANLoss, FakeScoreLoss
from instep.methods.matching import DistributionMatching
from instep.methods.operators import Operator, Standard
from instep.methods.recipe import Advantage, Experts, Recipe, RolloutConfig, Stage
from instep.methods.role_config import AdamWConfig, LatentRewardConfig, LoRA, RoleConfig
from instep.methods.term import Critic, Term

# a student of more steps is no shorter than its teacher's own sampler
MOST_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every recipe that distils a few-step student by distribution matching."""

    steps: int = 4
    """Steps (network evaluations) of the student."""
    batch: int = 32
    """Samples of a micro-batch; with groups, a multiple of their size. Several processes (torchrun) share them."""
    guidance: float = 3.0
    """Classifier-free guidance of the teacher; 1 is none."""
    shift: float = 3.0
    """Timestep shift of the student's levels and of the re-noise levels."""
    critic_updates: int = 5
    """Updates of the fake for each of the student."""
    reuse: bool = True
    """Train the fake on the samples of the student's own rollout instead of fresh ones."""
    condition_on_exit: bool = True
    """Condition the fake on the step of the rollout that a sample comes from."""
    fake_target: ErrorOf = "velocity"
    """What the fake's squared error is taken of: velocity (flows) weighs all levels alike, eps (the noise: DMD2 on SDXL) the clean ones more, x0 the noisy
    ones."""
    student: AdamWConfig = AdamWConfig(2e-4)
    """AdamW of the student."""
    fake: AdamWConfig = AdamWConfig(4e-4)
    """AdamW of the fake."""
    ema: float | None = 0.95
    """Decay of the averaged student that is exported; None exports the student itself."""
    lora_rank: int | None = None
    """Train adapters of this rank on one shared backbone instead of full copies."""
    accumulate: int = 1
    """Micro-batches a student update."""
    guidance_2: float | None = None
    """Guidance of the teacher's second, low-noise expert (Wan 2.2); default: the same as guidance."""
    experts: Experts = "both"
    """Which experts of a model of two (Wan 2.2) student and fake train: both, or the high-noise or the low-noise one with the other frozen."""

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, 1, MOST_STEPS, what=f"a few-step student has 1 to {MOST_STEPS}")
        for name in ("batch", "accumulate", "critic_updates"):
            check_whole(name, getattr(self, name), 1)
        for name, value in (("guidance", self.guidance), ("guidance_2", self.guidance_2)):
            if value is not None:
                check_number(name, value, 0, what="it is a finite scale, 0 or more; 1 is none")
        check_number("shift", self.shift, 0, open_below=True)

    @property
    def levels(self) -> tuple[float, ...]:
        """The student's few-step levels."""
        return few_step_levels(self.steps, self.shift)

    @property
    def renoise(self) -> LevelSampler:
        """The re-noise levels: uniform, with the timestep shift of the model's own schedule."""
        return Uniform(shift=self.shift)

    def matching(
        self,
        weight: float = 1.0,
        *,
        operator: Operator | None = None,
        levels: LevelSampler | None = None,
        ca_levels: LevelSampler | None = None,
        adapter: Annealed | None = None,
    ) -> DistributionMatching:
        """The matching force: DMD's, except for the given arguments."""
        return DistributionMatching(
            weight=weight,
            guidance=self.guidance,
            guidance_2=self.guidance_2,
            levels=levels or self.renoise,
            operator=operator or Standard(),
            ca_levels=ca_levels,
            adapter=adapter,
        )

    def critic(self, *, tilt: float = 0.0, gan: float = 0.0, levels: LevelSampler | None = None) -> Critic:
        """The fake's training on the student's samples; `tilt` is AMD's weight, `gan` that of the discriminator's loss."""
        levels = levels or self.renoise
        if gan:
            return FakeScoreGANLoss(
                updates=self.critic_updates,
                reuse=self.reuse,
                condition_on_exit=self.condition_on_exit,
                levels=levels,
                target=self.fake_target,
                tilt=tilt,
                gan_weight=gan,
                gan_levels=levels,
            )
        return FakeScoreLoss(
            updates=self.critic_updates,
            reuse=self.reuse,
            condition_on_exit=self.condition_on_exit,
            levels=levels,
            target=self.fake_target,
            tilt=tilt,
        )

    def stage(
        self,
        name: str,
        steps: int,
        terms: tuple[Term, ...],
        critics: tuple[Critic, ...],
        *,
        group: int = 1,
        advantage: Advantage | None = None,
        rollout: RolloutConfig | None = None,
    ) -> Stage:
        """A stage of this batch size on the student's own rollout."""
        return Stage(
            name,
            steps,
            self.batch,
            terms,
            critics,
            rollout or RolloutConfig(self.levels),
            group=group,
            accumulate=self.accumulate,
            advantage=advantage or Advantage(),
        )

    def distil(self, steps: int) -> Stage:
        """A stage of plain matching: a first stage for other methods, or a control."""
        return self.stage("distil", steps, (self.matching(),), (self.critic(),))

    def recipe(
        self,
        name: str,
        *stages: Stage,
        head: bool = False,
        teacher: RoleConfig | None = None,
        latent_reward: LatentRewardConfig | None = None,
        prediction_type: PredictionType | None = None,
    ) -> Recipe:
        """Builds a recipe: student and fake are trained, and the teacher is frozen unless one is given. With a LoRA rank all three share one backbone.

        Stages without steps are left out.
        """
        stages = tuple(stage for stage in stages if stage.steps) or stages
        lora = adapter(self.lora_rank)
        roles = {
            "student": RoleConfig(self.student, lora, ema=self.ema, prediction_type=prediction_type),
            "fake": RoleConfig(self.fake, lora, exits=self.condition_on_exit, head=head),
            "teacher": teacher or RoleConfig(),
        }
        return Recipe(
            name, self.levels, with_copies(roles, stages), stages, self.guidance, latent_reward=latent_reward, guidance_2=self.guidance_2, experts=self.experts
        )


def adapter(rank: int | None) -> LoRA | None:
    """The adapter of a trained role: scale 1 at every rank; None where roles are full copies."""
    return None if rank is None else LoRA(rank, float(rank))


def with_copies(roles: Mapping[str, RoleConfig], stages: Sequence[Stage]) -> Mapping[str, RoleConfig]:
    """Adds the roles `reference` and `average`, built like the student, if a stage compares with them."""
    needs = frozenset().union(*(stage.needs for stage in stages))
    student = roles["student"]
    copied = RoleConfig(lora=student.lora, copy=student.lora is None, prediction_type=student.prediction_type, guidance_range=student.guidance_range)
    return {**roles, **{name: copied for name in ("reference", "average") if name in needs}}
