"""About how many bytes a run will write, before it begins. Encoded texts are estimated where they are written (`models/prompt_cache.py`), and the
latents of real files are allocated before the first one is encoded (`data/latent_cache.py`)."""

from __future__ import annotations

import math

from instep.methods.recipe import Recipe
from instep.methods.role_config import RoleConfig
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


def checkpoint_bytes(recipe: Recipe, family: Family) -> int:
    """Of one checkpoint: weights, two AdamW moments and an average in float32, for each trained role; a reference's weights. Embeddings of exits and heads of
    discriminators are left out, since they are small."""
    return sum(
        4 * parameters_of(config, recipe, family) * ((3 + (config.ema is not None)) if config.optim is not None else 1)
        for config in recipe.roles.values()
        if config.optim is not None or config.copy
    )


def export_bytes(recipe: Recipe, family: Family) -> int:
    """Of the pipeline's networks as they are loaded, and of the student's LoRA file, or of ComfyUI's."""
    from instep.export.room import comfyui_bytes, pipeline_bytes  # diffusers' exporters are slow to import

    student = recipe.roles["student"]
    beside = 4 * parameters_of(student, recipe, family) if student.lora is not None else comfyui_bytes(family, None) if recipe.sampler == "few-step" else 0
    return pipeline_bytes(family, family.parts(family.pretrained), None) + beside


def parameters_of(config: RoleConfig, recipe: Recipe, family: Family) -> int:
    """Numbers that a role trains: all of the trained parts, or of the adapter on the layers that the family names."""
    parts = [part for name, part in family.parts(family.pretrained).items() if name in trained_parts(recipe, family)]
    if config.lora is None:
        return sum(p.numel() for part in parts for p in part.parameters())
    layers = [layer for part in parts for name, layer in part.named_modules() if f".{name}".endswith(tuple(f".{target}" for target in family.lora_targets))]
    return sum(config.lora.rank * (p.shape[0] + p[0].numel()) for layer in layers for name, p in layer.named_parameters(recurse=False) if name == "weight")
