"""DMD2 without its GAN term: distribution matching with backward simulation (Yin et al. 2024; DM-Align Section 3.1)."""

from __future__ import annotations

from instep.levels import Uniform, few_step_levels
from instep.matching.critic import Score
from instep.matching.force import DistributionMatching
from instep.roles import LoRA
from instep.terms import Critic, Force
from instep.train.recipe import FewStep, Optim, Recipe, RoleConfig, Stage

STUDENT = Optim(2e-4)
FAKE = Optim(4e-4)


def roles(student: Optim, fake: Optim, *, lora_rank: int | None, ema: float | None, condition_on_exit: bool) -> dict[str, RoleConfig]:
    """Student and fake are trained, the teacher is frozen; with a LoRA rank all three share one backbone."""
    lora = None if lora_rank is None else LoRA(lora_rank, float(lora_rank))
    return {
        "student": RoleConfig(student, lora, ema=ema),
        "fake": RoleConfig(fake, lora, exits=condition_on_exit),
        "teacher": RoleConfig(),
    }


def matching(guidance: float, shift: float, weight: float = 1.0) -> Force:
    """DMD's force over all levels, shifted as the model's own schedule is."""
    return DistributionMatching(weight=weight, guidance=guidance, levels=Uniform(shift=shift))


def denoising(shift: float, updates: int, *, reuse: bool, condition_on_exit: bool) -> Critic:
    """The fake's training on the student's samples."""
    return Score(updates=updates, reuse=reuse, condition_on_exit=condition_on_exit, levels=Uniform(shift=shift))


def dmd2(
    *,
    steps: int = 4,
    iterations: int = 100,
    batch: int = 32,
    guidance: float = 3.0,
    shift: float = 3.0,
    critic_updates: int = 5,
    reuse: bool = True,
    condition_on_exit: bool = True,
    student: Optim = STUDENT,
    fake: Optim = FAKE,
    ema: float | None = 0.95,
    lora_rank: int | None = None,
    accumulate: int = 1,
) -> Recipe:
    """Distil only: match the teacher's distribution in a few steps.

    Args:
        steps: steps (network evaluations) of the student.
        iterations: student updates.
        batch: samples of a micro-batch.
        guidance: classifier-free guidance of the teacher; 1 is none.
        shift: timestep shift of the student's levels and of the re-noise levels.
        critic_updates: updates of the fake for each of the student.
        reuse: train the fake on the samples of the student's own rollout instead of fresh ones.
        condition_on_exit: tell the fake which step of the rollout a sample comes from.
        student: AdamW of the student.
        fake: AdamW of the fake.
        ema: decay of the averaged student that is exported; None exports the student itself.
        lora_rank: train adapters of this rank on one shared backbone instead of full copies.
        accumulate: micro-batches a student update.
    """
    levels = few_step_levels(steps, shift)
    stage = Stage(
        "distil",
        iterations,
        batch,
        (matching(guidance, shift),),
        (denoising(shift, critic_updates, reuse=reuse, condition_on_exit=condition_on_exit),),
        FewStep(levels),
        accumulate=accumulate,
    )
    made = roles(student, fake, lora_rank=lora_rank, ema=ema, condition_on_exit=condition_on_exit)
    return Recipe("dmd2", levels, made, (stage,), guidance)
