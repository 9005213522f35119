"""Decoded inputs and output of the matching force (DM-Align, Fig. 5), and samples for the report; all are stored as uint8 videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instep.core.files import write_json, write_tensors
from instep.core.rows import slices
from instep.data.prompt import Prompt
from instep.diffusion.guidance import GuidanceByLevel, by_level
from instep.diffusion.noise import randn
from instep.diffusion.rollout import rollout_few_step
from instep.diffusion.sampling import sample_ode
from instep.methods.matching import DistributionMatching
from instep.methods.recipe import Recipe, Stage
from instep.methods.term import Batch, View
from instep.models.family import Family
from instep.models.role import shift_of
from instep.training.state import TrainState


def to_uint8(media: Tensor) -> Tensor:
    """Converts media [N, 3, F, H, W] (or images [N, 3, H, W], one frame) in [0, 1] to uint8 [N, F, H, W, 3]."""
    media = media if media.ndim == 5 else media[:, :, None]
    return (media.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().contiguous()


def decoded_uint8(family: Family, x: Tensor) -> Tensor:
    """Latents as uint8 videos on the host, decoded a few rows at a time: decoded videos in float32 are large."""
    return torch.cat([to_uint8(family.decode(x[rows])) for rows in slices(len(x), family.micro_batch)])


def decoded_views(family: Family, latents: Mapping[str, Tensor], forces: Mapping[str, str]) -> dict[str, Tensor]:
    """Latents of equal length as uint8 videos on the host, and `forces` by the names of their targets: each is the change of the image, decoded target less
    decoded `generator` around grey, which is grey where there is no force. Every latent is decoded once, a few rows at a time."""
    parts = []
    for rows in slices(len(latents["generator"]), family.micro_batch):
        media = {name: family.decode(x[rows]).cpu() for name, x in latents.items()}
        changes = {name: 0.5 + (media[target] - media["generator"]) for name, target in forces.items()}
        parts.append({name: to_uint8(x) for name, x in (media | changes).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def matching_views(state: TrainState, stage: Stage, recipe: Recipe, family: Family, prompts: Sequence[Prompt], seed: int) -> dict[str, Tensor]:
    """Generator, fake and real prediction, force and implied target of the stage's matching force, one sample a prompt."""
    force = next((term for term in stage.forces if isinstance(term, DistributionMatching)), None)
    if force is None:
        return {}
    rng = torch.Generator().manual_seed(seed)
    n, levels = len(prompts), recipe.levels
    batch = Batch(tuple(prompts), family.encode(prompts), family.unconditional(prompts))
    exits = torch.arange(n) % len(levels)
    rollout = rollout_few_step(state.roles["student"], batch.cond, levels, state.path, state.shape, exits, rng, device=state.device)
    # no rewards are computed here: all are equal, and the teacher is that of the end of the stage
    alike = torch.zeros(n, device=state.device)
    rollout = replace(rollout, reward=alike, advantage=alike)
    seen = force.explain(View(state.roles, state.path, batch, 1.0, rng, rollout))
    views = decoded_views(family, {"generator": seen.x, "fake": seen.fake, "real": seen.real, "target": seen.target}, {"force": "target"})
    return views | {"levels": seen.level.cpu().float(), "exits": exits.cpu()}


def save_views(folder: Path, step: int, views: Mapping[str, Tensor], prompts: Sequence[Prompt | str], kind: str = "step") -> None:
    """Writes `KIND-STEP.safetensors` and the JSON file that describes it: kind `step` of the matching force, `align` of the alignment force beside it."""
    if views:
        write_tensors(folder / f"{kind}-{step:06d}.safetensors", dict(views))
        write_json(folder / f"{kind}-{step:06d}.json", {"step": step, "prompts": list(map(str, prompts))})


@torch.no_grad()
def samples(state: TrainState, recipe: Recipe, family: Family, prompts: Sequence[Prompt], seed: int, teacher_steps: int = 50) -> dict[str, Tensor]:
    """Samples teacher and student from the same prompts and noise; the teacher with many guided steps, and naively with as many steps as the student."""
    n = len(prompts)
    cond, null = family.encode(prompts), family.unconditional(prompts)
    noise = randn((n, *state.shape), torch.Generator().manual_seed(seed), state.device)

    def teacher(steps: int, guidance: float | GuidanceByLevel) -> Tensor:
        role = state.roles["teacher"]
        ode = sample_ode(role, cond, null, noise, steps=steps, path=family.path, shift=shift_of(role, family), guidance=guidance)
        return decoded_uint8(family, ode)

    rng = torch.Generator().manual_seed(seed + 1)
    q = len(recipe.levels)
    student = recipe.sampling_at(state.step)(state.roles["student"], cond, null, noise, family.path, rng)
    return {
        f"teacher_{teacher_steps}": teacher(teacher_steps, by_level(recipe.guidance, recipe.guidance_2, family.boundary)),
        f"naive_{q}": teacher(q, 1.0),
        "student": decoded_uint8(family, student),
    }


def save_samples(out: Path, videos: dict[str, Tensor], prompts: Sequence[Prompt], seed: int) -> None:
    """Writes `samples.safetensors`, N videos for each model in turn, and `samples.json`, which describes them."""
    names = list(videos)
    write_tensors(out / "samples.safetensors", {"samples": torch.cat([videos[name] for name in names])})
    rows: list[dict[str, Any]] = [{"name": name, "prompt": str(prompt)} for name in names for prompt in prompts]
    write_json(out / "samples.json", {"models": names, "prompts": list(map(str, prompts)), "seed": seed, "rows": rows})
