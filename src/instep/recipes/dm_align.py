"""DM-Align: distillation and alignment as two forces of one loop (paper Eq. 8, Algorithm 1)."""

from __future__ import annotations

from typing import Literal

from instep.forces.dm_align import Group, Pair, Sign
from instep.levels import Uniform, few_step_levels
from instep.recipes.dmd2 import FAKE, STUDENT, denoising, matching, roles
from instep.terms import Force
from instep.train.recipe import FewStep, Optim, Recipe, Stage

# Near t = 0 the estimates are the samples themselves and their difference is divided by almost nothing: two samples of one
# prompt that lie apart are blended, and pictures fade. At high levels the estimates differ in what the samples show.
LEVELS = Uniform(low=0.8, high=0.98)


def _joint(
    name: str,
    align: Force,
    *,
    group: int,
    steps: int,
    distil: int,
    iterations: int,
    batch: int,
    weight: float,
    spread: Literal["group", "run"],
    guidance: float,
    shift: float,
    critic_updates: int,
    reuse: bool,
    condition_on_exit: bool,
    through: Literal["last", "trajectory"],
    student: Optim,
    fake: Optim,
    ema: float | None,
    lora_rank: int | None,
    accumulate: int,
) -> Recipe:
    """A distillation-only stage, then matching and alignment together with weights that sum to one."""
    levels = few_step_levels(steps, shift)
    critics = (denoising(shift, critic_updates, reuse=reuse, condition_on_exit=condition_on_exit),)
    first = Stage("distil", distil, batch, (matching(guidance, shift),), critics, FewStep(levels), accumulate=accumulate)
    terms = (matching(guidance, shift, 1 - weight), align)
    second = Stage("align", iterations, batch, terms, critics, FewStep(levels, through), group=group, accumulate=accumulate, spread=spread)
    made = roles(student, fake, lora_rank=lora_rank, ema=ema, condition_on_exit=condition_on_exit)
    return Recipe(name, levels, made, (first, second), guidance)


def dm_align_group(
    *,
    steps: int = 4,
    distil: int = 80,
    iterations: int = 40,
    batch: int = 32,
    group: int = 8,
    top_n: int = 2,
    sign: Sign = "signed",
    spread: Literal["group", "run"] = "run",
    weight: float = 0.7,
    levels: Uniform = LEVELS,
    guidance: float = 3.0,
    shift: float = 3.0,
    critic_updates: int = 5,
    reuse: bool = True,
    condition_on_exit: bool = True,
    through: Literal["last", "trajectory"] = "last",
    student: Optim = STUDENT,
    fake: Optim = FAKE,
    ema: float | None = 0.95,
    lora_rank: int | None = None,
    accumulate: int = 1,
) -> Recipe:
    """Distil and align with a reward: DM-Align (Group), from prompts alone.

    Args:
        steps: steps (network evaluations) of the student.
        distil: student updates of distribution matching alone, before the reward joins.
        iterations: student updates of matching and alignment together.
        batch: samples of a micro-batch; a multiple of group.
        group: samples a prompt, compared with each other.
        top_n: how many of a group's best make the preferred mean.
        sign: signed (the paper's text: high samples move away from the mean), pull (only low ones move), printed (Eq. 7 to the letter).
        spread: what advantages are divided by: each group's own deviation of rewards, or that of the whole run, with which groups of
            equally good samples add little noise.
        weight: weight of the alignment force; matching gets the rest (paper: .5).
        levels: noise levels of the alignment force; at low ones it would blend samples that show different things.
        guidance: classifier-free guidance of the teacher; 1 is none.
        shift: timestep shift of the student's levels and of the re-noise levels.
        critic_updates: updates of the fake for each of the student.
        reuse: train the fake on the samples of the student's own rollout instead of fresh ones.
        condition_on_exit: tell the fake which step of the rollout a sample comes from.
        through: how far the alignment force reaches back: the last step, or the whole trajectory (more memory).
        student: AdamW of the student.
        fake: AdamW of the fake.
        ema: decay of the averaged student that is exported; None exports the student itself.
        lora_rank: train adapters of this rank on one shared backbone instead of full copies.
        accumulate: micro-batches a student update.
    """
    align = Group(weight=weight, top_n=top_n, sign=sign, levels=levels)
    return _joint(
        "dm-align-group", align, group=group, steps=steps, distil=distil, iterations=iterations, batch=batch, weight=weight,
        spread=spread, guidance=guidance, shift=shift, critic_updates=critic_updates, reuse=reuse, condition_on_exit=condition_on_exit,
        through=through, student=student, fake=fake, ema=ema, lora_rank=lora_rank, accumulate=accumulate,
    )  # fmt: skip


def dm_align_pair(
    *,
    steps: int = 4,
    distil: int = 80,
    iterations: int = 40,
    batch: int = 32,
    weight: float = 0.5,
    levels: Uniform = LEVELS,
    guidance: float = 3.0,
    shift: float = 3.0,
    critic_updates: int = 5,
    reuse: bool = True,
    condition_on_exit: bool = True,
    through: Literal["last", "trajectory"] = "last",
    student: Optim = STUDENT,
    fake: Optim = FAKE,
    ema: float | None = 0.95,
    lora_rank: int | None = None,
    accumulate: int = 1,
) -> Recipe:
    """Distil and align with preferred real samples: DM-Align (Pair).

    Args:
        steps: steps (network evaluations) of the student.
        distil: student updates of distribution matching alone, before the preferred samples join.
        iterations: student updates of matching and alignment together.
        batch: samples of a micro-batch.
        weight: weight of the alignment force; matching gets the rest (paper: .5).
        levels: noise levels of the alignment force; at low ones it would blend samples that show different things.
        guidance: classifier-free guidance of the teacher; 1 is none.
        shift: timestep shift of the student's levels and of the re-noise levels.
        critic_updates: updates of the fake for each of the student.
        reuse: train the fake on the samples of the student's own rollout instead of fresh ones.
        condition_on_exit: tell the fake which step of the rollout a sample comes from.
        through: how far the alignment force reaches back: the last step, or the whole trajectory (more memory).
        student: AdamW of the student.
        fake: AdamW of the fake.
        ema: decay of the averaged student that is exported; None exports the student itself.
        lora_rank: train adapters of this rank on one shared backbone instead of full copies.
        accumulate: micro-batches a student update.
    """
    align = Pair(weight=weight, levels=levels)
    return _joint(
        "dm-align-pair", align, group=1, steps=steps, distil=distil, iterations=iterations, batch=batch, weight=weight, spread="group",
        guidance=guidance, shift=shift, critic_updates=critic_updates, reuse=reuse, condition_on_exit=condition_on_exit,
        through=through, student=student, fake=fake, ema=ema, lora_rank=lora_rank, accumulate=accumulate,
    )  # fmt: skip
