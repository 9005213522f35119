"""Writing a student as a complete diffusers pipeline folder, all or nothing."""

from __future__ import annotations

import copy
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from instep.core.files import atomic_dir
from instep.core.quiet import quiet
from instep.core.size import Size
from instep.diffusion.sampling import Sampling
from instep.export.card import LEVELS_EQUAL, ExportInfo, Measured, many_step_card, model_card
from instep.export.lora import lora_files, save_loras
from instep.export.scheduler import few_step_scheduler
from instep.export.verify import Sampler, our_sampler, verify_export
from instep.models.adapters import has_adapter, merge_lora, plain_copy, without_adapters
from instep.models.family import ComfyUI, Family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

RECORD = "instep_export.json"
COMFYUI_MODEL = "comfyui_diffusion_model.safetensors"


@dataclass(frozen=True)
class ExportReport:
    """The result of an export; differences are largest absolute differences of final latents in float32 (see `verify_export`).

    sampler_difference: stock diffusers against our sampler, both on the exported weights. student_difference: stock
    diffusers on the exported weights against our sampler on the student in memory: sampler, merge and rounding to
    `dtype` together. comfyui_difference: the difference of ComfyUI's levels from ours; None without a workflow (exports that are no
    pipeline, families other than text-to-video Wan).
    """

    folder: Path
    levels: tuple[float, ...]
    sampler_difference: float
    student_difference: float
    comfyui_difference: float | None
    lora_tensors: int
    size_bytes: int


def export_student(
    family: Family,
    network: nn.Module,
    levels: Sequence[float],
    out: Path,
    info: ExportInfo,
    *,
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
    ours: Sampler | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Writes a folder that `DiffusionPipeline.from_pretrained(out)` loads, with card, LoRA files and (where ComfyUI has the model) a workflow, and checks it.

    network: the student's, of `family`; neither it nor the family's pipeline is changed, and the pipeline's other parts are saved too. adapter: the PEFT
    adapter on `network` that is the student; the folder's networks then have it merged. dtype: float16, float32 or None to keep. ours: the training-side
    sampler to compare with, at info.size (None: our sampler around the weights in memory, at a small size). The folder appears at once, complete, or not at
    all. Raises ValueError if `out` holds something that is not an earlier export and `overwrite` is not set, or if the levels cannot be represented.
    """
    out, levels = Path(out), tuple(float(t) for t in levels)
    _check_dtype(dtype)
    _check_target(out, overwrite)
    scheduler = few_step_scheduler(family.path, levels, family.prediction_type)
    parts = merged_parts(family, network, adapter)
    exported = _pipeline(family, parts, scheduler, dtype)
    device = next(network.parameters()).device
    with atomic_dir(out, "export") as temporary:
        with quiet():
            exported.save_pretrained(temporary, safe_serialization=True)
        keys = save_loras(family, network, temporary, adapter, dtype) if adapter else []
        (temporary / RECORD).write_text(json.dumps({"instep": info.instep_version, "levels": levels, "info": info.json()}, indent=2))
        small = family.smallest()
        if family.takes_first_frame:  # a first frame has the shape that it has
            small = Size(info.size.height, info.size.width, small.frames)
        check = family.at(info.size if ours else small)
        prompts = (info.example_prompt, replace(info.example_prompt, text=""))
        in_memory = ours or our_sampler(check, family.join(parts), levels)
        student_difference = verify_export(temporary, in_memory, family=check, prompts=prompts, size=check.size, device=device)
        shift, off = family.comfyui.shift(levels) if family.comfyui else (None, None)
        measured = Measured(
            sampler_difference=verify_export(temporary, levels, family=check, prompts=prompts, size=check.size, device=device),
            student_difference=student_difference,
            comfyui_shift=shift,
            comfyui_difference=off,
            comfyui_obstacle=family.comfyui.obstacle(family.pipe) if family.comfyui else None,
            lora=adapter is not None,
            dtype=_stored_dtype(getattr(exported, family.denoisers[0])),
            pipeline=type(exported).__name__,
            scheduler=type(scheduler).__name__,
            usual=family.usual(),
            passes_generator=family.passes_generator,
            task=family.task,
            loras=tuple(lora_files(family).values()) if adapter else (),
        )
        if family.comfyui:
            _write_comfyui(temporary, family.comfyui, getattr(exported, family.denoisers[0]), levels, info, measured)
        (temporary / "README.md").write_text(model_card(info, levels, measured))
        size_bytes = _sync(temporary)
    return ExportReport(out, levels, measured.sampler_difference, measured.student_difference, off, len(keys), size_bytes)


def export_many_step(
    family: Family,
    network: nn.Module,
    sampling: Sampling,
    out: Path,
    info: ExportInfo,
    *,
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Writes a student that is still a many-step model: the pipeline with its own scheduler, its weights in place of the pretrained ones.

    `sampling` is that of training, and the default of the card and `instep sample`. Otherwise as `export_student`, but nothing is compared with our sampler:
    the scheduler is the pipeline's own, with other levels for the same number of steps (diffusers' last one is next to 0). The weights of a student
    that is conditioned on guidance scales hold those of `sampling` already.
    """
    out = Path(out)
    _check_dtype(dtype)
    _check_target(out, overwrite)
    exported = _pipeline(family, merged_parts(family, network, adapter), family.pipe.scheduler, dtype)
    record = {
        "instep": info.instep_version,
        "levels": sampling.levels,
        "sampler": "ode",
        "guidance": sampling.guidance,
        "guidance_scales": sampling.guidance_scales,
        "info": info.json(),
    }
    with atomic_dir(out, "export") as temporary:
        with quiet():
            exported.save_pretrained(temporary, safe_serialization=True)
        keys = save_loras(family, network, temporary, adapter, dtype) if adapter else []
        (temporary / RECORD).write_text(json.dumps(record, indent=2))
        (temporary / "README.md").write_text(many_step_card(info, sampling, family.task))
        size_bytes = _sync(temporary)
    return ExportReport(out, sampling.levels, math.nan, math.nan, math.nan, len(keys), size_bytes)


def merged_parts(family: Family, network: nn.Module, adapter: str | None = None) -> dict[str, nn.Module]:
    """Plain copies of a network's parts, with `adapter` merged into those that carry it."""
    if adapter is None:
        return {name: plain_copy(part) for name, part in family.parts(network).items()}
    alone = len(family.denoisers) == 1  # merge_lora then reports the error
    return {name: merge_lora(part, adapter) if alone or has_adapter(part, adapter) else without_adapters(part) for name, part in family.parts(network).items()}


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (torch.float16, torch.float32, None):
        raise ValueError(f"dtype: {dtype} is not allowed; allowed: torch.float16, torch.float32, None (keep)")


def _check_target(out: Path, overwrite: bool) -> None:
    empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not empty and not overwrite and not (out / RECORD).is_file():
        raise ValueError(f"out: {out} exists and is not an earlier export; allowed: a new path, an earlier export; choose another or pass overwrite=True")


def _cast(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """`module` itself, its parameters in `dtype`, except those that its class keeps in float32 (norms and time embedding,
    which are small).
    """
    family: Any = type(module)
    keep = family._keep_in_fp32_modules or ()
    for name, parameter in module.named_parameters():
        if dtype is not None and not any(part in name.split(".") for part in keep):
            parameter.data = parameter.data.to(dtype)
    return module


def _pipeline(family: Family, parts: Mapping[str, nn.Module], scheduler: Any, dtype: torch.dtype | None) -> DiffusionPipeline:
    """The stock pipeline around copies of `parts` with `scheduler`; all its networks, text encoders and VAE included, in `dtype` (None: unchanged)."""
    others: dict[str, Any] = {"scheduler": scheduler}
    if dtype is not None:
        networks = {name: part for name, part in family.pipe.components.items() if isinstance(part, nn.Module) and name not in parts}
        others |= {name: _cast(copy.deepcopy(part), dtype) for name, part in networks.items()}
    exported = family.pipeline(parts, **others)
    for name in parts:
        _cast(getattr(exported, name), dtype)
    return exported


def _stored_dtype(network: nn.Module) -> str:
    """Returns the dtype of most of a network's weights."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in network.parameters():
        counts[parameter.dtype] += parameter.numel()
    return str(counts.most_common(1)[0][0]).removeprefix("torch.")


def _write_comfyui(folder: Path, comfyui: ComfyUI, denoiser: nn.Module, levels: Sequence[float], info: ExportInfo, measured: Measured) -> None:
    from safetensors.torch import save_file

    if not measured.lora and measured.comfyui_obstacle is None:
        save_file(comfyui.state_dict(denoiser), folder / COMFYUI_MODEL, metadata={"format": "pt"})
    if measured.comfyui_difference is None or measured.comfyui_difference > LEVELS_EQUAL:
        return
    model = f"{info.base_model.rpartition('/')[2]}.safetensors" if measured.lora else COMFYUI_MODEL
    graph = comfyui.workflow(levels, info.size, info.example_prompt.text, model, "lora.safetensors" if measured.lora else None, info.seed)
    (folder / "comfyui_workflow.json").write_text(json.dumps(graph, indent=2))


def _sync(folder: Path) -> int:
    """Flushes everything in `folder` to disk; returns its size in bytes."""
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            size += path.stat().st_size
    return size
