"""Checks before a run begins: everything that would otherwise fail only after minutes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from instep.data.prompt import Prompt
from instep.data.samples import PairSamples, RealSamples
from instep.diffusion.bands import in_band
from instep.diffusion.levels import few_step_levels
from instep.diffusion.sampling import Sampling
from instep.methods.matching import DistributionMatching
from instep.methods.recipe import Recipe
from instep.models.family import Family
from instep.recipes.common import Common
from instep.rewards.base import Reward, check_prompts
from instep.rewards.decoded import make_reward_fn, make_reward_grad_fn
from instep.rewards.ranker import relative
from instep.rewards.several import Several
from instep.training.build import trained_bands


def check_ranks(recipe: Recipe, count: int) -> None:
    """Raises ValueError unless the groups of every stage's batch are a multiple of the processes."""
    for stage in recipe.stages:
        groups = stage.batch // stage.group
        if stage.steps and groups % count:
            raise ValueError(
                f"batch: {stage.batch} samples in groups of {stage.group} are {groups} groups in stage {stage.name!r}, which {count} processes cannot share "
                f"evenly; give a multiple of {stage.group * count} samples, or start fewer processes"
            )


def check_inputs(
    recipe: Recipe,
    family: Family,
    reward: Reward | None,
    real: RealSamples | None,
    prompts: Sequence[Prompt],
    pairs: PairSamples | None = None,
    start_from: Path | str | None = None,
    *,
    export_to: Path,
    teacher: Family | None = None,
) -> None:
    """Raises ValueError for everything that would otherwise fail after minutes: missing inputs, a reward that fails on one small batch, and an export of the
    student, to the folder `export_to`, that would be refused.
    """
    if not prompts:
        raise ValueError("prompts: the list is empty; give at least one prompt")
    for names in (prompts, real.prompts if real else (), pairs.prompts if pairs else ()):
        family.check_prompts(names)
    _check_experts(recipe, family)
    if teacher is not None:
        _check_teacher(recipe, teacher)
    _check_export(recipe, family, export_to)
    first = next((stage for stage in recipe.stages if stage.steps), None)
    if first and recipe.sampler == "ode" and not first.uses_guidance and (first.guidance_scales or recipe.guidance != 1) and start_from is None:
        raise ValueError(
            f"start_from: none was given, and stage {first.name!r} goes on with a student that has learned its guidance; give the run in which it did"
            + ("" if first.guidance_scales else ", or guidance 1 for a model that never needed any")
        )
    for stage in recipe.stages:
        if not stage.steps:
            continue
        if "preferred" in stage.needs and real is None:
            raise ValueError(
                f"real: stage {stage.name!r} of {recipe.name} needs preferred samples; pass real=RealSamples(prompts, latents), or --pairs FILE on the "
                "command line"
            )
        if "pairs" in stage.needs and pairs is None:
            raise ValueError(
                f"pairs: stage {stage.name!r} of {recipe.name} needs labelled pairs; pass pairs=PairSamples(prompts, chosen, rejected), --pairs FILE on the "
                "command line, or give the stage 0 steps"
            )
        for term in stage.terms:
            if term.skips:
                skipped = teacher or family  # guidance skips blocks of the teacher
                with skipped.skip(skipped.pretrained, term.skips):  # raises ValueError for an index that is no block
                    pass
        if "gradient" in stage.needs and (reward is None or not reward.differentiable):
            raise ValueError(
                f"reward: stage {stage.name!r} of {recipe.name} climbs its gradient and "
                + ("none was given" if reward is None else f"{_blunt(reward).name!r} is not differentiable")
                + "; give one that is (a Reward with differentiable = True, or --reward 'gradient=yes module:function'), or choose a recipe that needs scores "
                "alone, like amd or dm-align-group"
            )
        if "labels" in stage.needs and reward is not None and relative(reward):
            raise ValueError(f"reward: {reward.name!r} compares samples with each other, and stage {stage.name!r} needs the score of each; give it a reward")
        if stage.needs & {"reward", "labels"} and reward is None:
            raise ValueError(f"reward: stage {stage.name!r} of {recipe.name} needs one; pass reward=, for example a function (media, prompts) -> scores")
    if real is not None and tuple(real.latents.shape[1:]) != family.latent_shape:
        raise ValueError(
            f"real: latents of shape {tuple(real.latents.shape[1:])} do not fit the model's {family.latent_shape}; encode them with family.encode_media"
        )
    if pairs is not None and tuple(pairs.chosen.shape[1:]) != family.latent_shape:
        raise ValueError(
            f"pairs: latents of shape {tuple(pairs.chosen.shape[1:])} do not fit the model's {family.latent_shape}; encode them with family.encode_media"
        )
    if reward is not None:
        check_prompts(reward, prompts)
        # a reward that compares samples needs at least two
        pair = [prompts[0], prompts[0] if relative(reward) else prompts[-1]]
        trial = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
        trial = trial.to(family.device)
        score = make_reward_fn(family, reward)
        assert score is not None
        score(trial, pair)
        if "gradient" in recipe.needs:
            for part in reward.parts if isinstance(reward, Several) else (reward,):
                _check_gradient(family, part, trial, pair)


def shift_note(recipe: Recipe, family: Family) -> str | None:
    """A line where the student's levels are neither those that the model's own scheduler visits in as many steps nor those of its published distillation.

    They are allowed: published distillations have levels of their own. None where they agree, or where the recipe's defaults were not the model's.
    """
    found, count, published = recipe.levels, len(recipe.levels), family.preset.distillation
    known = {family.shift, *(() if published is None or published.shift is None else (published.shift,))}
    if not family.preset.for_recipes:
        known.add(Common().shift)
    if any(max(abs(a - b) for a, b in zip(found, few_step_levels(count, shift), strict=True)) < 1e-4 for shift in known):
        return None
    ours, own = (", ".join(f"{level:.3f}" for level in levels) for levels in (found, few_step_levels(count, family.shift)))
    what = "its exported pipeline samples at the scheduler's" if recipe.sampler == "ode" else "its export has a scheduler of its own"
    return (
        f"shift: the student's levels are {ours}, while the scheduler of {family.name} (shift {family.shift:g}) visits {own}; {what}. Give --shift "
        f"{family.shift:g} unless another one is meant"
    )


def _check_export(recipe: Recipe, family: Family, to: Path) -> None:
    """Raises ValueError for a student that could not be exported after training."""
    from instep.export.rules import check_run  # diffusers' exporters are slow to import

    check_run(family, Sampling(recipe.levels, recipe.sampler), to, adapter=recipe.roles["student"].lora is not None)


def _check_teacher(recipe: Recipe, teacher: Family) -> None:
    """Raises ValueError for another teacher in a recipe that has none, or that moves it by the fake's adapter, which is made for the student's network."""
    if "teacher" not in recipe.roles:
        raise ValueError(f"teacher: {recipe.name} has no teacher; leave it out")
    for stage in recipe.stages:
        for term in stage.terms:
            if isinstance(term, DistributionMatching) and term.adapter is not None and term.adapter_of != "teacher" and stage.steps:
                raise ValueError(
                    f"teacher: stage {stage.name!r} of {recipe.name} moves the teacher by the fake's adapter, which fits the student's network alone; leave "
                    "that out (dyna_dg 0), train full copies (no lora_rank), or leave teacher out"
                )
    from instep.export.rules import check_finite  # diffusers' exporters are slow to import

    check_finite(teacher.parts(teacher.pretrained))


def _check_experts(recipe: Recipe, family: Family) -> None:
    """Raises ValueError if experts are given for a model of one network, or if none of the student's levels belongs to the trained expert."""
    if family.boundary is None:
        if recipe.experts != "both" or recipe.guidance_2 is not None:
            name = "experts" if recipe.experts != "both" else "guidance_2"
            raise ValueError(f"{name}: {getattr(recipe, name)} is not allowed; {family.name} has one network, not two experts; leave it out")
        return
    levels, bands = torch.tensor(recipe.levels), trained_bands(recipe, family)
    if not any(bool(in_band(levels, band).any()) for band in bands):
        raise ValueError(
            f"experts: {recipe.experts} is not allowed; the student's levels {list(recipe.levels)} all lie in the other expert's band (boundary "
            f"{family.boundary:g}); use more steps, another shift, or experts both"
        )
    last = any(bool(in_band(levels[-1], band)) for band in bands)
    if not last and any("final" in stage.live for stage in recipe.stages if stage.steps):
        raise ValueError(f"experts: {recipe.experts} is not allowed; {recipe.name} has forces at the final sample, whose last step the frozen expert makes")


def _blunt(reward: Reward) -> Reward:
    """Returns the reward that has no gradient; of several, the first such one."""
    return next(part for part in reward.parts if not part.differentiable) if isinstance(reward, Several) else reward


def _check_gradient(family: Family, reward: Reward, trial: Tensor, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError if a differentiable reward gives no gradient, or one that is not finite, on trial latents."""
    x, score = trial.detach().requires_grad_(), make_reward_grad_fn(family, reward)
    assert score is not None, "stages that need a gradient are refused a reward without one"
    with torch.enable_grad():
        scores = score(x, prompts)
        if not scores.requires_grad:
            raise ValueError(
                f"reward: {reward.name!r} is declared differentiable, but its scores have no gradient; leave out no_grad, .item(), numpy and rounding "
                "in it, or give it differentiable=False and choose a recipe that needs scores alone, like amd or dm-align-group"
            )
        (gradient,) = torch.autograd.grad(scores.sum(), x, allow_unused=True)
    if gradient is None or not bool(gradient.isfinite().all()):
        what = "does not depend on the samples" if gradient is None else "is not finite"
        raise ValueError(f"reward: the gradient of {reward.name!r} {what} on trial latents; check it on such a batch by itself")
