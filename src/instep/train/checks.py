"""What is made sure of before a run begins: everything that would otherwise fail after minutes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from instep import __version__
from instep.data.pictures import digest
from instep.data.prompts import first_frame_of
from instep.files import write_json
from instep.models.base import Family, weights_fingerprint
from instep.rewards.base import Reward, checked_scores
from instep.rewards.ranker import relative
from instep.rewards.several import Several
from instep.train import lock
from instep.train.recipe import Recipe, describe
from instep.train.source import PairSamples, RealSamples

if TYPE_CHECKING:
    from instep.models.base import ImageToVideo
    from instep.train.run import RunOptions

# decoding all samples of a large batch at once would need more memory than the student's own step
DECODE_BATCH = 32


def make_reward_fn(family: Family, reward: Reward | None) -> Callable[[Tensor, Sequence[str]], Tensor] | None:
    """Reward of latents: decoded a few at a time, clamped to what a file would hold."""
    if reward is None:
        return None

    @torch.no_grad()
    def reward_fn(x: Tensor, prompts: Sequence[str]) -> Tensor:
        parts = []
        for rows in chunks(prompts, whole=relative(reward)):
            parts.append(_scores(reward, _media(family, reward, x[rows], clamp=True), prompts[rows]))
        return torch.cat(parts)

    return reward_fn


def chunks(prompts: Sequence[str], *, whole: bool) -> list[slice]:
    """Rows that are decoded together: `DECODE_BATCH` at a time, or with `whole` as many more as keep neighbours of one prompt together."""
    ends, n = [0], len(prompts)
    while ends[-1] < n:
        end = min(n, ends[-1] + DECODE_BATCH)
        while whole and end < n and prompts[end] == prompts[end - 1]:
            end += 1
        ends.append(end)
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def make_reward_grad_fn(family: Family, reward: Reward | None) -> Callable[[Tensor, Sequence[str]], Tensor] | None:
    """Reward of latents with a graph, through the unclamped decoder (a clamped one has no gradient where it saturates); None if it has none."""
    if reward is None or not reward.differentiable:
        return None
    return lambda x, prompts: _scores(reward, _media(family, reward, x), prompts)


def _scores(reward: Reward, media: Tensor, prompts: Sequence[str]) -> Tensor:
    """Checked scores [B], or [B, R] of several rewards."""
    return reward.each(media, prompts) if isinstance(reward, Several) else checked_scores(reward, media, prompts)


def weights_of(reward: Reward | None) -> tuple[float, ...]:
    """What each of several rewards counts with; 1 for a single one."""
    return reward.weights if isinstance(reward, Several) else (1.0,)


def _media(family: Family, reward: Reward, x: Tensor, *, clamp: bool = False) -> Tensor:
    """What a reward looks at: decoded media, or the latents themselves."""
    if reward.space == "latent":
        return x
    return family.decode(x).clamp(0, 1) if clamp else family.decode(x)


def check_inputs(
    recipe: Recipe, family: Family, reward: Reward | None, real: RealSamples | None, prompts: Sequence[str], pairs: PairSamples | None = None,
    start_from: Path | str | None = None,
) -> None:
    """Everything that would otherwise fail after minutes: missing parts, and a reward that does not work on one small batch."""
    if not prompts:
        raise ValueError("prompts: the list is empty; give at least one prompt")
    for names in (prompts, real.prompts if real else (), pairs.prompts if pairs else ()):
        check_prompts(family, names)
    if recipe.sampler == "ode" and family.pipe is None:
        raise ValueError(
            f"model: {family.name} has no stock pipeline, and {recipe.name} leaves a many-step model, which is exported as one; choose a recipe that distils"
        )
    if recipe.sampler == "few-step":
        from instep.export.scheduler import few_step_scheduler
        from instep.models.stock import stock

        # a student of a pipeline that is not known, or whose levels no stock scheduler gives, could not be exported once it is trained
        if family.pipe is not None:
            stock(family.pipe)
        few_step_scheduler(family.path, recipe.levels, family.prediction_type)
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
            raise ValueError(f"real: stage {stage.name!r} of {recipe.name} needs preferred samples; pass real=RealSamples(prompts, latents)")
        if "pairs" in stage.needs and pairs is None:
            raise ValueError(
                f"pairs: stage {stage.name!r} of {recipe.name} needs labelled pairs; pass pairs=PairSamples(prompts, chosen, rejected), --pairs FILE on the "
                "command line, or give the stage 0 steps"
            )
        for term in stage.terms:
            if term.skips:
                with family.skip(family.pretrained, term.skips):  # refuses what is no block
                    pass
        if "gradient" in stage.needs and (reward is None or not reward.differentiable):
            raise ValueError(
                f"reward: stage {stage.name!r} of {recipe.name} climbs its gradient and "
                + ("none was given" if reward is None else f"{_blunt(reward).name!r} is not differentiable")
                + "; give one that is (a Reward with differentiable = True), or choose a recipe that only asks for scores, like amd or dm-align-group"
            )
        if "labels" in stage.needs and reward is not None and relative(reward):
            raise ValueError(f"reward: {reward.name!r} compares samples with each other, and stage {stage.name!r} asks for the score of each; give it a reward")
        if stage.needs & {"reward", "labels"} and reward is None:
            raise ValueError(f"reward: stage {stage.name!r} of {recipe.name} needs one; pass reward=, for example a function (media, prompts) -> scores")
    if real is not None and tuple(real.latents.shape[1:]) != family.latent_shape:
        raise ValueError(
            f"real: latents of shape {tuple(real.latents.shape[1:])} do not fit the model's {family.latent_shape}; encode them "
            "with family.encode_media"
        )
    if pairs is not None and tuple(pairs.chosen.shape[1:]) != family.latent_shape:
        raise ValueError(
            f"pairs: latents of shape {tuple(pairs.chosen.shape[1:])} do not fit the model's {family.latent_shape}; encode them with family.encode_media"
        )
    if reward is not None:
        # one that compares is given something to compare
        pair = [prompts[0], prompts[0] if relative(reward) else prompts[-1]]
        trial = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
        trial = trial.to(next(family.pretrained.parameters()).device)
        with torch.no_grad():
            checked_scores(reward, _media(family, reward, trial, clamp=True), pair)
        if "gradient" in recipe.needs:
            for part in reward.parts if isinstance(reward, Several) else (reward,):
                _check_gradient(family, part, trial, pair)


def check_prompts(family: Family, prompts: Sequence[str]) -> None:
    """ValueError for a prompt without a first frame where the model begins with one, and for one with a first frame where it takes none."""
    if hasattr(family, "check_prompts"):
        cast("ImageToVideo", family).check_prompts(prompts)
    elif named := next((prompt for prompt in prompts if first_frame_of(prompt)), None):
        raise ValueError(f"prompts: {named!r} names a first frame, and {family.name} takes text alone; leave [image: ...] out, or choose another model")


def _blunt(reward: Reward) -> Reward:
    """The reward, or of several the first, that has no gradient."""
    return next(part for part in reward.parts if not part.differentiable) if isinstance(reward, Several) else reward


def _check_gradient(family: Family, reward: Reward, trial: Tensor, prompts: Sequence[str]) -> None:
    """ValueError if a reward that says it is differentiable gives no gradient on trial latents, or one that is not finite."""
    x = trial.detach().requires_grad_()
    with torch.enable_grad():
        scores = checked_scores(reward, _media(family, reward, x), prompts)
        if not scores.requires_grad:
            raise ValueError(
                f"reward: {reward.name!r} says that it is differentiable and its scores have no gradient; leave out no_grad, .item(), numpy and rounding "
                "in it, or give it differentiable=False and choose a recipe that only asks for scores, like amd or dm-align-group"
            )
        (gradient,) = torch.autograd.grad(scores.sum(), x, allow_unused=True)
    if gradient is None or not bool(gradient.isfinite().all()):
        what = "does not depend on the samples" if gradient is None else "is not finite"
        raise ValueError(f"reward: the gradient of {reward.name!r} {what} on trial latents; check it on such a batch by itself")


def write_manifest(
    out: Path, recipe: Recipe, family: Family, options: RunOptions, prompts: Sequence[str], start_from: Path | str | None, command: str,
    *, reward: Reward | None = None, real: RealSamples | None = None, pairs: PairSamples | None = None,
) -> None:  # fmt: skip
    """Writes recipe.json, or makes sure that the folder holds this very run."""
    named = [*prompts, *(real.prompts if real else ()), *(pairs.prompts if pairs else ())]
    identity = {
        "recipe": recipe.name,
        "model": family.name,
        "weights": weights_fingerprint(family.pretrained),
        "seed": options.seed,
        "levels": list(recipe.levels),
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16],
        **({"first_frames": shown} if (shown := digest(named)) else {}),
        "reward": reward and reward.name,
        "real": real and _digest(real.prompts, real.latents),
        "pairs": pairs and _digest(pairs.prompts, pairs.chosen, pairs.rejected),
        "start_from": str(Path(start_from).resolve()) if start_from else None,
        "config": json.loads(json.dumps(describe(recipe))),
    }
    file = out / "recipe.json"
    begun = any((out / name).exists() for name in ("log.jsonl", "checkpoints", "teacher_samples.parts", "teacher_samples.safetensors"))
    there = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    different = [key for key in identity if there.get(key) != identity[key]]
    if "instep" in there and (begun or not different):
        if different:
            raise ValueError(
                f"out: {out} holds another run (its {', '.join(different)} differ; it was {there['recipe']} with seed {there['seed']}); choose "
                "another folder, or repeat that run's command to go on with it"
            )
    # the record of a run that was refused before it began is replaced
    elif "instep" not in there and out.exists() and any(path.name != lock.NAME for path in out.iterdir()):
        raise ValueError(f"out: {out} is not empty and holds no run; choose a new or an empty folder")
    else:
        free = shutil.disk_usage(next(p for p in (out, *out.resolve().parents) if p.exists())).free
        needed = 3 * checkpoint_bytes(recipe, family)
        if free < needed:
            raise ValueError(
                f"out: {free / 1e9:.1f} GB are free where {out} lies, and this run's checkpoints and export need about {needed / 1e9:.1f} GB; "
                "free some space or choose another disk"
            )
        about = {
            "instep": __version__,
            "command": command,
            "model_path": family.source,
            "size": dataclasses.asdict(family.size),
            "prompt_count": len(set(prompts)),
            "example_prompt": prompts[0],
        }
        write_json(file, {**about, **identity})


def _digest(prompts: Sequence[str], *latents: Tensor) -> str:
    """Of samples and their prompts."""
    return hashlib.sha256("\n".join(prompts).encode() + b"".join(x.detach().float().cpu().numpy().tobytes() for x in latents)).hexdigest()[:16]


def checkpoint_bytes(recipe: Recipe, family: Family) -> int:
    """Upper bound of one checkpoint: weights, two AdamW moments and an average in float32, for each trained role; a reference's weights."""
    parameters = sum(p.numel() for p in family.pretrained.parameters())
    return sum(4 * parameters * (3 + (c.ema is not None)) for c in recipe.roles.values() if c.optim is not None) + sum(
        4 * parameters for c in recipe.roles.values() if c.copy
    )
