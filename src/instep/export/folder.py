"""Writing a student as a complete diffusers pipeline folder, all or nothing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from instep.core.files import atomic_dir
from instep.core.size import Size
from instep.core.tensor_file import Entry, file_parts, write_parts
from instep.data.prompt import Prompt
from instep.diffusion.sampling import Sampling
from instep.export.card import LEVELS_EQUAL, ExportInfo, Measured, many_step_card, model_card
from instep.export.limits import check_differences
from instep.export.load import load_pipeline
from instep.export.lora import lora_files, save_loras
from instep.export.room import check_room
from instep.export.rules import RECORD, check_adapter, check_dtype, check_sampler, check_target, keep_others
from instep.export.verify import (
    EARLIER,
    Sampler,
    check_samples,
    difference,
    draw,
    draw_latents,
    our_sampler,
    stock_sampler,
    unchanged,
)
from instep.export.weights import FORMAT, Finite, entries_of, stored_dtype, write_pipeline
from instep.models.adapters import Weight, plain_network
from instep.models.family import Family

COMFYUI_MODEL = "comfyui_diffusion_model.safetensors"
NARROW = (torch.float16, torch.bfloat16)
# of the sample that shows whether a many-step student's are finite
FEW = 2
Weights = Mapping[str, Mapping[str, Weight]]


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
    size: Size | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Writes a folder that `DiffusionPipeline.from_pretrained(out)` loads, with card, LoRA files and (where ComfyUI has the model) a workflow, and checks it.

    network: the student's, of `family`; neither it nor the family's pipeline is changed, and the pipeline's other parts are saved too. adapter: the PEFT
    adapter on `network` that is the student; the folder's networks then have it merged. dtype: float16, bfloat16, float32 or None to keep. ours: the
    training-side sampler to compare with, at `size` (None: info.size); None: our sampler around the weights in memory, at a small size. The folder appears at
    once, complete, or not at all.

    Writing takes the memory of one tensor. The check then loads the folder's networks in float32 (`draw_latents`), and without `ours` an adapter is
    merged into a copy before that. Raises ValueError for what `export/rules.py` refuses, and Unusable for weights or samples that are not finite and
    for samples that differ more than `export/limits.py` allows.
    """
    out, levels = Path(out), tuple(float(t) for t in levels)
    check_dtype(dtype)
    check_target(out, overwrite)
    scheduler = check_sampler(family, Sampling(levels))
    weights = check_adapter(family, network, adapter)
    check_room(out, family, network, weights, dtype, adapter=adapter, comfyui=True)
    check = family.at((size or info.size) if ours else small_size(family, info))
    prompts, device = [info.example_prompt, replace(info.example_prompt, text="")], family.device
    mine = draw(ours or our_sampler(check, family.join(_plain(family, network, adapter)), levels), check, prompts, device)
    with atomic_dir(out, "export") as temporary:
        pipe = family.pipeline(family.parts(network), scheduler=scheduler)
        write_pipeline(temporary, pipe, weights, dtype)
        keys = save_loras(family, network, temporary, adapter, dtype) if adapter else []
        (temporary / RECORD).write_text(json.dumps({"instep": info.instep_version, "levels": levels, "info": info.json()}, indent=2))
        sampler_difference, student_difference = _compared(temporary, check, prompts, levels, mine, weights, dtype)
        shift, off = family.comfyui.shift(levels) if family.comfyui else (None, None)
        measured = Measured(
            sampler_difference=sampler_difference,
            student_difference=student_difference,
            comfyui_shift=shift,
            comfyui_difference=off,
            comfyui_obstacle=family.comfyui.obstacle(family.pipe) if family.comfyui else None,
            lora=adapter is not None,
            dtype=str(_stored(family, network, weights, dtype)).removeprefix("torch."),
            pipeline=type(pipe).__name__,
            scheduler=type(scheduler).__name__,
            usual=family.usual(),
            unguided=family.guidance_arguments(1.0),
            passes_generator=family.passes_generator,
            task=family.task,
            loras=tuple(lora_files(family).values()) if adapter else (),
            comfyui_reads_lora=family.comfyui_reads_lora,
        )
        if family.comfyui:
            _write_comfyui(temporary, family, network, weights, dtype, levels, info, measured)
        (temporary / "README.md").write_text(model_card(info, levels, measured))
        size_bytes = _sync(out, temporary)
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
    the scheduler is the pipeline's own, with other levels for the same number of steps (diffusers' last one is next to 0). A small sample of few steps
    has to be finite. The weights of a student that is conditioned on guidance scales hold those of `sampling` already.
    """
    out = Path(out)
    check_dtype(dtype)
    check_target(out, overwrite)
    scheduler = check_sampler(family, sampling)
    weights = check_adapter(family, network, adapter)
    check_room(out, family, network, weights, dtype, adapter=adapter)
    record = {
        "instep": info.instep_version,
        "levels": sampling.levels,
        "sampler": "ode",
        "guidance": sampling.guidance,
        "guidance_scales": sampling.guidance_scales,
        "info": info.json(),
    }
    with atomic_dir(out, "export") as temporary:
        write_pipeline(temporary, family.pipeline(family.parts(network), scheduler=scheduler), weights, dtype)
        keys = save_loras(family, network, temporary, adapter, dtype) if adapter else []
        (temporary / RECORD).write_text(json.dumps(record, indent=2))
        device = family.device
        _check_stock(temporary, family.at(small_size(family, info)), [info.example_prompt], FEW, sampling.guidance, device, dtype)
        (temporary / "README.md").write_text(many_step_card(info, sampling, family.task, family.guidance_arguments(sampling.guidance)))
        size_bytes = _sync(out, temporary)
    return ExportReport(out, sampling.levels, math.nan, math.nan, math.nan, len(keys), size_bytes)


def small_size(family: Family, info: ExportInfo) -> Size:
    """The size of the check's samples: the family's smallest, but a first frame has the shape that it has."""
    small = family.smallest()
    return Size(info.size.height, info.size.width, small.frames) if family.takes_first_frame else small


def _plain(family: Family, network: nn.Module, adapter: str | None) -> dict[str, nn.Module]:
    return {name: plain_network(part, adapter) for name, part in family.parts(network).items()}


def _stored(family: Family, network: nn.Module, weights: Weights, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of most of the student's weights in the folder."""
    first = family.denoisers[0]
    return stored_dtype(family.parts(network)[first], weights[first], dtype)


def _compared(
    folder: Path, family: Family, prompts: Sequence[Prompt], levels: Sequence[float], mine: Tensor, weights: Weights, dtype: torch.dtype | None
) -> tuple[float, float]:
    """Differences of stock diffusers on the folder from our sampler on it, and of the folder from the student in memory, whose latents are `mine`.

    The second difference is that of stock diffusers. Of a student that computes in less than float32 it is that of our sampler in the student's own dtype
    on both sides, so that the dtype of the computation is no part of it. Raises Unusable for samples that are not finite or differ too much.
    """
    check_samples("the student in memory", mine, EARLIER)
    dtypes = {name: {key: weight.base.dtype for key, weight in part.items()} for name, part in weights.items()}
    memory = stored_dtype(family.parts(family.pretrained)[family.denoisers[0]], weights[family.denoisers[0]], None)
    drawn = draw_latents(folder, family, prompts, levels, mine.device, dtype, dtypes if memory in NARROW else None)
    check_samples("stock diffusers on the exported folder, in float32,", drawn.stock, EARLIER)
    check_samples("our sampler on the exported folder", drawn.folder, EARLIER)
    sampler = difference(drawn.stock, drawn.folder)
    student = difference(drawn.stock, mine) if drawn.narrow is None else difference(drawn.narrow, mine)
    check_differences(sampler, student, float(drawn.stock.abs().max()), stored=dtype or memory, memory=memory)
    if (dtype or memory) == torch.float16:
        _check_stock(folder, family, prompts, len(levels), 1.0, mine.device, torch.float16)
    return sampler, student


def _check_stock(folder: Path, family: Family, prompts: Sequence[Prompt], steps: int, guidance: float, device: torch.device, dtype: torch.dtype | None) -> None:
    """Raises Unusable if samples of stock diffusers on a folder that was exported in `dtype`, computed in it (None: float32), are not finite.

    Needs the memory of the pipeline in that dtype; what was written as it is in float32 is not loaded again.
    """
    pipe = load_pipeline(folder, device, {} if dtype else unchanged(family, device), dtype or torch.float32)
    latents = draw(stock_sampler(family.with_pipe(pipe, family.size), pipe, steps, guidance), family, prompts, device)
    fix = "export with bfloat16 (--dtype bfloat16)" if dtype == torch.float16 else EARLIER
    check_samples(f"stock diffusers on the exported folder, in {str(dtype or torch.float32).removeprefix('torch.')},", latents, fix)


def _write_comfyui(
    folder: Path,
    family: Family,
    network: nn.Module,
    weights: Weights,
    dtype: torch.dtype | None,
    levels: Sequence[float],
    info: ExportInfo,
    measured: Measured,
) -> None:
    comfyui, name = family.comfyui, family.denoisers[0]
    assert comfyui is not None
    if not measured.lora and measured.comfyui_obstacle is None:
        entries: Mapping[str, Entry] = entries_of(name, family.parts(network)[name], weights[name], dtype, Finite())  # whose weights were found finite
        write_parts(folder / COMFYUI_MODEL, file_parts({comfyui.parameter(key): entry for key, entry in entries.items()}, FORMAT))
    if measured.comfyui_difference is None or measured.comfyui_difference > LEVELS_EQUAL:
        return
    model = f"{info.base_model.rpartition('/')[2]}.safetensors" if measured.lora else COMFYUI_MODEL
    # of the plain base model, beside which the files of the styles lie
    styles = [(f"{style.name}.safetensors", style.scale[1]) for style in info.styles if name in style.parts]
    loras = [*styles, ("lora.safetensors", 1.0)] if measured.lora else []
    graph = comfyui.workflow(levels, info.size, info.example_prompt.text, model, loras, info.seed)
    (folder / "comfyui_workflow.json").write_text(json.dumps(graph, indent=2))


def _sync(out: Path, folder: Path) -> int:
    """Completes the new export in `folder`, which takes the place of `out`, and flushes it to disk; returns its size in bytes."""
    keep_others(out, folder)
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            size += path.stat().st_size
    return size
