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
from instep.models.embeddings import fold_guidance, last_layer
from instep.models.family import Family
from instep.models.role import Role
from instep.models.styles import Style

if TYPE_CHECKING:
    from instep.export import ExportReport
    from instep.export.verify import Sampler


def fits_stock(student: Role) -> bool:
    """Whether the student's prediction type is the one that the family's stock pipeline expects."""
    return student.prediction_type == student.backbone.family.prediction_type


def check_student(student: Role) -> None:
    """Raises ValueError for a student whose weights an export would refuse: an adapter that is not plain LoRA, or a layer without a name in its file."""
    from instep.export.rules import check_adapter

    if fits_stock(student):
        check_adapter(student.backbone.family, student.backbone.module, student.adapter)


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
    styles: Sequence[Style] | None = None,
    teacher: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Exports a student role as a stock pipeline folder, or as its parts where no stock pipeline exists, and compares it with the sampler that trained it.

    A many-step student keeps its model's scheduler. `overwrite`: an earlier export at `to` is replaced. `styles` are the adapters inside the model that it was
    trained on, by default the family's; `teacher` is the model that taught it, if that is another one. Raises ValueError if the student's prediction type is
    not the stock pipeline's.
    """
    if not fits_stock(student):
        raise ValueError(
            f"student: it predicts {student.prediction_type}, and a stock pipeline of {family.name} reads {family.prediction_type}; it cannot be exported"
        )
    from instep.export import ExportInfo, export_many_step, export_parts, export_student  # diffusers' exporters are slow to import
    from instep.export.folder import small_size
    from instep.export.verify import role_sampler

    info = ExportInfo(
        recipe=recipe,
        base_model=family.name,
        seed=seed,
        command=command,
        instep_version=__version__,
        training_prompts=prompts,
        size=family.size,
        example_prompt=example,
        styles=tuple(family.styles if styles is None else styles),
        teacher=teacher,
    )
    student.backbone.go_home()
    network, adapter = student.backbone.module, student.adapter
    if sampling.kind == "ode":
        if sampling.guidance_scales is not None:
            network, adapter = with_folded_guidance(student, sampling.guidance_scales), None
        return export_many_step(family, network, sampling, to, info, adapter=adapter, dtype=dtype, overwrite=overwrite)

    if family.pipe is None:
        ours = _leaving(role_sampler(family, student, sampling.levels), student)
        return export_parts(family, network, sampling.levels, to, info, adapter=adapter, dtype=dtype, ours=ours, overwrite=overwrite)
    check = family.at(small_size(family, info))
    ours = _leaving(role_sampler(check, student, sampling.levels), student)
    return export_student(family, network, sampling.levels, to, info, adapter=adapter, dtype=dtype, ours=ours, size=check.size, overwrite=overwrite)


def _leaving(sampler: Sampler, student: Role) -> Sampler:
    """The sampler, after which no network that takes turns is left on the device: its weights are written from host memory, and the check needs the room."""

    def ours(prompts: Sequence[Prompt], rng: torch.Generator) -> Tensor:
        x = sampler(prompts, rng)
        student.backbone.go_home()
        return x

    return ours


def with_folded_guidance(student: Role, guidance_scales: GuidanceScales) -> nn.Module:
    """Returns a plain network that predicts, without guidance scales, what the student predicts at `guidance_scales`.

    It shares the student's weights but the biases of the time embedding, and those that an adapter changes, which is merged: the adapter's own file could not
    hold the biases, so such a student has no adapter file.
    """
    from instep.export.rules import check_adapter
    from instep.models.adapters import plain_network

    assert student.guidance_embedding is not None, "only a student that is conditioned on guidance scales has some to fold"
    family, module, adapter = student.backbone.family, student.backbone.module, student.adapter
    check_adapter(family, module, adapter)
    network = family.join({name: plain_network(part, adapter) for name, part in family.parts(module).items()})
    embedders = family.time_embedders(network)
    for embedder in embedders:
        layer = last_layer(embedder)
        layer.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    fold_guidance(embedders, student.guidance_embedding, guidance_scales)
    return network
