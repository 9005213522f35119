"""The end of a run: its student as what stock diffusers loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from instep.core.version import __version__
from instep.data.first_frame import read_first_frame
from instep.data.prompt import Prompt
from instep.diffusion.guidance_scales import GuidanceScales
from instep.diffusion.sampling import Sampling
from instep.models.embeddings import fold_guidance
from instep.models.family import Family
from instep.models.role import Role

if TYPE_CHECKING:
    from instep.export import ExportReport


def fits_stock(student: Role) -> bool:
    """Whether a stock pipeline reads the student's output as the student means it."""
    return student.prediction_type == student.backbone.family.prediction_type


def export_role(
    student: Role,
    family: Family,
    sampling: Sampling,
    to: Path,
    *,
    recipe: str,
    seed: int,
    prompts: int,
    example: Prompt,
    command: str,
    dtype: torch.dtype | None = None,
) -> ExportReport:
    """A student role as a stock pipeline folder (or its parts, where there is no stock pipeline), checked there against the sampler that trained it;
    a many-step student keeps its model's scheduler."""
    if not fits_stock(student):
        raise ValueError(
            f"student: it predicts {student.prediction_type}, and a stock pipeline of {family.name} reads {family.prediction_type}; it cannot be exported"
        )
    from instep.export import ExportInfo, export_many_step, export_parts, export_student, merge_lora  # diffusers' exporters are slow to import
    from instep.export.verify import sample_as_stock
    from instep.models.stock import stock

    info = ExportInfo(
        recipe=recipe,
        base_model=family.name,
        seed=seed,
        command=command,
        instep_version=__version__,
        training_prompts=prompts,
        size=family.size,
        example_prompt=example,
    )
    module = student.backbone.module
    if sampling.kind == "ode":
        if sampling.guidance_scales is not None:
            return export_many_step(with_folded_guidance(student, sampling.guidance_scales), sampling, to, info, dtype=dtype)
        lora = None if student.adapter is None else module
        pipe = family.pipe if lora is not None else family.pipeline(module)
        return export_many_step(pipe, sampling, to, info, lora=lora, adapter=student.adapter or "", dtype=dtype)

    axes = tuple(range(1 + len(family.latent_shape))) if family.pipe is None else stock(family.pipe).axes

    def ours(names: Sequence[Prompt], rng: torch.Generator) -> Tensor:
        return sample_as_stock(student, family.encode(names), family.latent_shape, sampling.levels, family.path, rng, axes)

    first_frame = getattr(family, "first_frame", read_first_frame)
    if family.pipe is None:
        plain = module if student.adapter is None else merge_lora(module, student.adapter)
        return export_parts(family, plain, sampling.levels, to, info, dtype=dtype, ours=ours)
    if student.adapter is None:
        return export_student(family.pipeline(module), sampling.levels, to, info, dtype=dtype, ours=ours, first_frame=first_frame)
    return export_student(family.pipe, sampling.levels, to, info, lora=module, adapter=student.adapter, dtype=dtype, ours=ours, first_frame=first_frame)


def with_folded_guidance(student: Role, guidance_scales: GuidanceScales) -> Any:
    """A pipeline around a copy of a told student's network that says untold what the student says when told `guidance_scales`; an adapter is merged.

    An adapter's own file could not hold a bias of the time embedding, so there is none of such a student.
    """
    from instep.export import merge_lora

    assert student.guidance_embedding is not None, "only a student that is told guidance scales has some to fold"
    family, module = student.backbone.family, student.backbone.module
    pipe = family.pipeline(module if student.adapter is None else merge_lora(module, student.adapter))
    fold_guidance(family.time_embedders(pipe.transformer), student.guidance_embedding, guidance_scales)
    return pipe
