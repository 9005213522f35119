"""Writing a student as a complete diffusers pipeline folder, all or nothing."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from instep.core.files import atomic_dir
from instep.core.quiet import quiet
from instep.core.size import VideoSize
from instep.data.first_frame import FirstFrameReader, read_first_frame
from instep.diffusion.sampling import Sampling
from instep.export.card import LEVELS_EQUAL, ExportInfo, Measured, many_step_card, model_card
from instep.export.comfyui import comfyui_shift, comfyui_state_dict, comfyui_workflow, runs_in_comfyui
from instep.export.lora import adapter_active, merge_lora, plain_copy, save_lora
from instep.export.scheduler import few_step_scheduler
from instep.export.verify import Sampler, our_sampler, smallest_size, verify_export
from instep.models.stock import stock, takes_first_frame

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

RECORD = "instep_export.json"
COMFYUI_MODEL = "comfyui_diffusion_model.safetensors"


@dataclass(frozen=True)
class ExportReport:
    """What was written; differences are largest absolute differences of final latents in float32 (see `verify_export`).

    sampler_difference: stock diffusers against our sampler, both on the exported weights. student_difference: stock
    diffusers on the exported weights against our sampler on the student in memory: sampler, merge and rounding to
    `dtype` together. comfyui_difference: of ComfyUI's levels from ours; None where none is made for it: exports that are no
    pipeline, other families than text-to-video Wan.
    """

    folder: Path
    levels: tuple[float, ...]
    sampler_difference: float
    student_difference: float
    comfyui_difference: float | None
    lora_tensors: int
    size_bytes: int


def export_student(
    pipeline: DiffusionPipeline,
    levels: Sequence[float],
    out: Path,
    info: ExportInfo,
    *,
    lora: nn.Module | None = None,
    adapter: str = "student",
    dtype: torch.dtype | None = None,
    ours: Sampler | None = None,
    first_frame: FirstFrameReader = read_first_frame,
    overwrite: bool = False,
) -> ExportReport:
    """Writes a folder that `DiffusionPipeline.from_pretrained(out)` loads, with card, LoRA file and (Wan) ComfyUI workflow,
    and checks it (on the student's device).

    pipeline: one that `models/stock.py` knows, around the student (its other parts are saved too; nothing in it is changed). lora: the
    module that carries the PEFT adapter `adapter`; then the folder's transformer is that module with the adapter
    merged. dtype: float16, float32 or None to keep. ours: the training-side sampler to compare with, at info.size
    (None: our sampler around the weights in memory, at a small size). first_frame: reads the example prompt's. The folder appears at once, complete, or not at
    all. Raises ValueError if `out` holds something that is not an earlier export and `overwrite` is not set, if the
    levels cannot be represented, or for a pipeline with two transformers.
    """
    out, levels = Path(out), tuple(float(t) for t in levels)
    if dtype not in (torch.float16, torch.float32, None):
        raise ValueError(f"dtype: {dtype} is not allowed; allowed: torch.float16, torch.float32, None (keep)")
    if "transformer_2" in pipeline.components and pipeline.components["transformer_2"] is not None:
        raise ValueError("pipeline: it has two transformers (Wan 2.2's experts), one student cannot stand for both; export each expert's pipeline alone")
    _check_target(out, overwrite)
    how = stock(pipeline)
    scheduler = few_step_scheduler(how.path, levels, how.prediction_type)
    student = merge_lora(lora, adapter) if lora is not None else pipeline.transformer
    exported = _with_parts(pipeline, transformer=_plain(student, dtype), scheduler=scheduler, dtype=dtype)
    with atomic_dir(out, "export") as temporary:
        with quiet():
            exported.save_pretrained(temporary, safe_serialization=True)
        keys = save_lora(lora, temporary / "lora.safetensors", adapter, dtype) if lora is not None else []
        (temporary / RECORD).write_text(json.dumps({"instep": info.instep_version, "levels": levels, "info": info.json()}, indent=2))
        size = info.size if ours else smallest_size(pipeline)
        if takes_first_frame(pipeline):  # a first frame has the shape that it has
            size = VideoSize(info.size.height, info.size.width, size.frames)
        in_memory = ours or our_sampler(pipeline, student if lora is None else lora, levels, size, first_frame)
        device = next((pipeline.transformer if lora is None else lora).parameters()).device
        prompts = (info.example_prompt, replace(info.example_prompt, text=""))
        with nullcontext() if lora is None else adapter_active(lora, adapter):
            student_difference = verify_export(temporary, in_memory, prompts=prompts, size=size, device=device, first_frame=first_frame)
        is_wan = type(exported).__name__ == "WanPipeline"
        shift, off = comfyui_shift(levels) if is_wan else (None, None)
        defaults = inspect.signature(type(pipeline).__call__).parameters
        measured = Measured(
            sampler_difference=verify_export(temporary, levels, prompts=prompts, size=size, device=device, first_frame=first_frame),
            student_difference=student_difference,
            comfyui_shift=shift,
            comfyui_difference=off,
            comfyui_obstacle=runs_in_comfyui(pipeline) if is_wan else None,
            lora=lora is not None,
            dtype=str(exported.transformer.proj_out.weight.dtype).removeprefix("torch."),
            pipeline=type(pipeline).__name__,
            scheduler=type(scheduler).__name__,
            usual=(defaults["num_inference_steps"].default, defaults["guidance_scale"].default),
            passes_generator=how.passes_generator,
        )
        if is_wan:
            _write_comfyui(temporary, exported.transformer, levels, info, measured)
        (temporary / "README.md").write_text(model_card(info, levels, measured))
        size_bytes = _sync(temporary)
    return ExportReport(out, levels, measured.sampler_difference, measured.student_difference, off, len(keys), size_bytes)


def export_many_step(
    pipeline: DiffusionPipeline,
    sampling: Sampling,
    out: Path,
    info: ExportInfo,
    *,
    lora: nn.Module | None = None,
    adapter: str = "student",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Writes a student that is still a many-step model: the pipeline with its own scheduler, its weights in place of the pretrained ones.

    `sampling` is what it was trained with, and what the card and `instep sample` say. Otherwise as `export_student`; nothing is compared with our
    sampler: the scheduler is the pipeline's own, whose levels are other ones for the same number of steps (diffusers' last lies next to 0). Of a student
    that is told guidance scales the pipeline holds those of `sampling` in its weights already.
    """
    out = Path(out)
    _check_target(out, overwrite)
    student = merge_lora(lora, adapter) if lora is not None else pipeline.transformer
    exported = _with_parts(pipeline, transformer=_plain(student, dtype), scheduler=pipeline.scheduler, dtype=dtype)
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
        keys = save_lora(lora, temporary / "lora.safetensors", adapter, dtype) if lora is not None else []
        (temporary / RECORD).write_text(json.dumps(record, indent=2))
        (temporary / "README.md").write_text(many_step_card(info, sampling))
        size_bytes = _sync(temporary)
    return ExportReport(out, sampling.levels, math.nan, math.nan, math.nan, len(keys), size_bytes)


def _check_target(out: Path, overwrite: bool) -> None:
    empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not empty and not overwrite and not (out / RECORD).is_file():
        raise ValueError(f"out: {out} exists and is not an earlier export; allowed: a new path, an earlier export; choose another or pass overwrite=True")


def _plain(transformer: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy without hooks and with stock attention, in `dtype`."""
    if any(".lora_" in key for key in transformer.state_dict()):
        raise ValueError("pipeline: its transformer carries LoRA layers, which are not weights of a pipeline; pass that module as lora=")
    return _cast(plain_copy(transformer, {key: value.detach().clone() for key, value in transformer.state_dict().items()}), dtype)


def _cast(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """`module` itself, its parameters in `dtype` except those that its class wants in float32 (norms, time embedding:
    they are small).
    """
    family: Any = type(module)
    keep = family._keep_in_fp32_modules or ()
    for name, parameter in module.named_parameters():
        if dtype is not None and not any(part in name.split(".") for part in keep):
            parameter.data = parameter.data.to(dtype)
    return module


def _with_parts(pipeline: DiffusionPipeline, *, transformer: nn.Module, scheduler: Any, dtype: torch.dtype | None) -> DiffusionPipeline:
    parts = {**pipeline.components, "transformer": transformer, "scheduler": scheduler}
    if dtype is not None:
        for name in ("vae", "text_encoder"):
            parts[name] = _cast(copy.deepcopy(parts[name]), dtype)
    # what is configuration and not a component: Wan's expand_timesteps, boundary_ratio
    options = {key: pipeline.config[key] for key in inspect.signature(type(pipeline)).parameters if key not in parts and key in pipeline.config}
    return type(pipeline)(**parts, **options)


def _write_comfyui(folder: Path, transformer: nn.Module, levels: Sequence[float], info: ExportInfo, measured: Measured) -> None:
    from safetensors.torch import save_file

    if not measured.lora and measured.comfyui_obstacle is None:
        save_file(comfyui_state_dict(transformer), folder / COMFYUI_MODEL, metadata={"format": "pt"})
    if measured.comfyui_difference is None or measured.comfyui_difference > LEVELS_EQUAL:
        return
    model = f"{info.base_model.rpartition('/')[2]}.safetensors" if measured.lora else COMFYUI_MODEL
    graph = comfyui_workflow(levels, info.size, info.example_prompt.text, model, "lora.safetensors" if measured.lora else None, info.seed)
    (folder / "comfyui_workflow.json").write_text(json.dumps(graph, indent=2))


def _sync(folder: Path) -> int:
    """Everything in `folder` to the disk; returns its size in bytes."""
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            size += path.stat().st_size
    return size
