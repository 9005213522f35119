"""The end of a run: exports its student in a form that stock diffusers loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from instep.core.version import __version__
from instep.data.prompt import Prompt
from instep.diffusion.guidance_scales import GuidanceScales
from instep.diffusion.sampling import Sampling
from instep.models.embeddings import fold_guidance
from instep.models.family import Family
from instep.models.role import Role

if TYPE_CHECKING:
    from instep.export import ExportReport


def fits_stock(student: Role) -> bool:
    """Whether the student's prediction type is the one that the family's stock pipeline expects."""
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
    """Exports a student role as a stock pipeline folder, or as its parts where no stock pipeline exists, and compares it with the sampler that trained it.

    A many-step student keeps its model's scheduler. Raises ValueError if the student's prediction type is not the stock pipeline's.
    """
    if not fits_stock(student):
        raise ValueError(
            f"student: it predicts {student.prediction_type}, and a stock pipeline of {family.name} reads {family.prediction_type}; it cannot be exported"
        )
    from instep.export import ExportInfo, export_many_step, export_parts, export_student  # diffusers' exporters are slow to import
    from instep.export.verify import sample_as_stock

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
    network, adapter = student.backbone.module, student.adapter
    if sampling.kind == "ode":
        if sampling.guidance_scales is not None:
            network, adapter = with_folded_guidance(student, sampling.guidance_scales), None
        return export_many_step(family, network, sampling, to, info, adapter=adapter, dtype=dtype)

    def ours(names: Sequence[Prompt], rng: torch.Generator) -> Tensor:
        return sample_as_stock(student, family.encode(names), family.latent_shape, sampling.levels, family.path, rng, family.axes)

    if family.pipe is None:
        return export_parts(family, network, sampling.levels, to, info, adapter=adapter, dtype=dtype, ours=ours)
    return export_student(family, network, sampling.levels, to, info, adapter=adapter, dtype=dtype, ours=ours)


def with_folded_guidance(student: Role, guidance_scales: GuidanceScales) -> nn.Module:
    """Returns a plain copy of a student's network that predicts, without guidance scales, what the student predicts at `guidance_scales`.

    An adapter is merged: its own file could not hold the bias of the time embedding, so such a student has no adapter file.
    """
    from instep.export.folder import merged_parts

    assert student.guidance_embedding is not None, "only a student that is conditioned on guidance scales has some to fold"
    family = student.backbone.family
    network = family.join(merged_parts(family, student.backbone.module, student.adapter))
    fold_guidance(family.time_embedders(network), student.guidance_embedding, guidance_scales)
    return network
