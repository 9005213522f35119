"""About how many bytes a run will write, before it begins. Encoded texts are estimated where they are written (`models/prompt_cache.py`), and the
latents of real files are allocated before the first one is encoded (`data/latent_cache.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from instep.core.disk import free_bytes, gb
from instep.methods.recipe import Recipe, RoleConfig
from instep.models.family import Family
from instep.training.build import trained_parts
from instep.training.options import RunOptions

# of an iteration's row in log.jsonl, and of the same scalars in TensorBoard's file
ROW_BYTES = 6_000


def disk_bytes(recipe: Recipe, family: Family, options: RunOptions, *, sampled: bool = False) -> dict[str, int]:
    """Bytes by what they are. `sampled`: whether samples of the teacher are made and kept."""
    ends = sum(1 for stage in recipe.stages if stage.steps)
    found = {
        # those that are kept, the ends of stages, and the one that is being written
        "checkpoints": (options.keep + ends + 1) * checkpoint_bytes(recipe, family),
        "export": export_bytes(recipe, family),
        "log": recipe.steps * ROW_BYTES,
    }
    if sampled:
        # noise and latents in float32, in parts and then in one file
        found["teacher samples"] = 4 * 4 * options.teacher_samples * math.prod(family.latent_shape)
    return found


def check_disk(out: Path, needed: Mapping[str, int]) -> None:
    """Raises ValueError if less is free where `out` lies."""
    free, total = free_bytes(out), sum(needed.values())
    if free < total:
        parts = ", ".join(f"{what} {gb(count)}" for what, count in needed.items())
        raise ValueError(f"out: {gb(free)} are free where {out} lies, and this run needs about {gb(total)} ({parts}); free some space or choose another disk")


def checkpoint_bytes(recipe: Recipe, family: Family) -> int:
    """Of one checkpoint: weights, two AdamW moments and an average in float32, for each trained role; a reference's weights. Embeddings of exits and heads of
    discriminators are left out, since they are small."""
    return sum(
        4 * parameters_of(config, recipe, family) * ((3 + (config.ema is not None)) if config.optim is not None else 1)
        for config in recipe.roles.values()
        if config.optim is not None or config.copy
    )


def export_bytes(recipe: Recipe, family: Family) -> int:
    """Of the pipeline's networks as they are loaded, and of the student's LoRA file."""
    parts: Mapping[str, Any] = family.parts(family.pretrained) if family.pipe is None else family.pipe.components
    whole = sum(p.numel() * p.element_size() for part in parts.values() if isinstance(part, nn.Module) for p in part.state_dict().values())
    student = recipe.roles["student"]
    return whole + (4 * parameters_of(student, recipe, family) if student.lora is not None else 0)


def parameters_of(config: RoleConfig, recipe: Recipe, family: Family) -> int:
    """Numbers that a role trains: all of the trained parts, or of the adapter on the layers that the family names."""
    parts = [part for name, part in family.parts(family.pretrained).items() if name in trained_parts(recipe, family)]
    if config.lora is None:
        return sum(p.numel() for part in parts for p in part.parameters())
    layers = [layer for part in parts for name, layer in part.named_modules() if f".{name}".endswith(tuple(f".{target}" for target in family.lora_targets))]
    return sum(config.lora.rank * (p.shape[0] + p[0].numel()) for layer in layers for name, p in layer.named_parameters(recurse=False) if name == "weight")
