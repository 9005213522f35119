"""`instep export`: the student of a run, from its newest checkpoint, as a stock diffusers folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from instep.bundled import WORLDS, load
from instep.core.files import recover
from instep.core.json_files import read_object
from instep.core.size import Size
from instep.data.prompt import Prompt
from instep.diffusion.guidance_scales import GuidanceRange
from instep.diffusion.sampling import Sampling
from instep.export.rules import check_target
from instep.methods.role_config import LoRA
from instep.models.backbone import Backbone
from instep.models.family import Family
from instep.models.role import Role
from instep.models.styles import Style
from instep.training import checkpoint
from instep.training.finish import export_role
from instep.training.saved import stage_at


@dataclass(frozen=True)
class ExportArgs:
    """Write the student of run DIR as a diffusers folder with model card, ComfyUI workflow and, if it is an adapter, LoRA file."""

    dir: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    to: Path
    """New folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the weights on disk. float16 is finer than bfloat16 and ends at 65504: an export whose weights or samples reach beyond is refused."""
    guidance: float | None = None
    """Guidance scale to fold into the weights, for a student conditioned on it (`apo --draw LOW HIGH`); default: the run's own."""
    skip: float | None = None
    """The same for skip-layer guidance (`apo --draw-skip LOW HIGH`)."""
    raw: bool = False
    """Export the student itself instead of its moving average."""
    overwrite: bool = False
    """Replace an earlier export in that folder. Files that instep did not write stay there."""
    model: str | None = None
    """The base model's folder, if it has moved since the run."""


def export_command(args: ExportArgs) -> int:
    """Exports the student and prints the difference between stock diffusers and our own sampler."""
    record = read_run(args.dir)
    recover(args.to)  # before the disk's room is counted
    # invalid options are rejected before anything is loaded
    check_target(args.to, args.overwrite)
    sampling = at_guidance_scales(sampling_of(record, newest_step(args.dir)), record, args.guidance, args.skip)
    styles = [Style.of_json(style) for style in record.get("styles", ())]
    if styles and args.model is None:
        raise ValueError(
            f"model: the pipeline of this run carried {', '.join(map(str, styles))}, which {record['model_path'] or 'its folder'} does not; load it with its "
            "LoRA in diffusers, call fuse_lora() and save_pretrained(FOLDER), and give --model FOLDER"
        )
    family = load(args.model or (record["model"] if record["model"] in WORLDS else record["model_path"]), Size(**record["size"]), variant=record.get("variant"))
    student = student_of(args.dir, record, family, raw=args.raw)
    report = export_role(
        student,
        family,
        sampling,
        args.to,
        recipe=record["recipe"],
        seed=record["seed"],
        prompts=record["prompt_count"],
        example=Prompt.parse(record["example_prompt"]),
        command=record["command"],
        styles=styles or None,
        teacher=(record.get("teacher") or {}).get("model"),
        dtype=getattr(torch, args.dtype),
        overwrite=args.overwrite,
    )
    off = f"; stock diffusers differs from our sampler by {report.sampler_difference:.1e}" if sampling.kind == "few-step" else ""
    print(f"wrote {report.folder} ({report.size_bytes / 1e6:.1f} MB){off}")
    return 0


def read_run(folder: Path) -> dict[str, Any]:
    """Reads a run's recipe.json. Raises ValueError if `folder` has none."""
    file = folder / "recipe.json"
    if not file.is_file():
        raise ValueError(f"dir: {folder} holds no run (recipe.json is missing); give the folder that `instep train --out` wrote")
    return read_object(file, "dir", "restore it from a copy of the run, or train anew in another folder")


def sampling_of(record: dict[str, Any], step: int | None = None) -> Sampling:
    """Returns a run's `Sampling` at a step (None: at its end), from its recipe.json; see `Recipe.sampling_at`."""
    config = record["config"]
    if config.get("sampler", "few-step") == "few-step":
        return Sampling(tuple(record["levels"]))
    here = stage_at(config, step)
    guidance_scales = (float(here["guidance_scales"][0]), float(here["guidance_scales"][1])) if here.get("guidance_scales") else None
    return Sampling(tuple(record["levels"]), "ode", float(config["guidance"]) if here.get("guided", True) else 1.0, guidance_scales)


def at_guidance_scales(sampling: Sampling, record: dict[str, Any], guidance: float | None, skip: float | None) -> Sampling:
    """Returns the `Sampling` at other guidance scales (None: unchanged). Raises ValueError unless the student was trained with such scales."""
    if guidance is None and skip is None:
        return sampling
    guidance_range = guidance_range_of(record)
    if guidance_range is None or sampling.guidance_scales is None:
        early = " yet (its newest checkpoint lies before the stage that distils it)" if guidance_range else ""
        raise ValueError(
            f"{'skip' if guidance is None else 'guidance'}: this run's student is not conditioned on guidance scales{early}; leave it out, or train with "
            "`instep train apo --draw LOW HIGH`"
        )
    usual, usual_skip = sampling.guidance_scales
    guidance_scales = (usual if guidance is None else guidance, usual_skip if skip is None else skip)
    guidance_range.check(guidance_scales)
    return replace(sampling, guidance_scales=guidance_scales)


def guidance_range_of(record: dict[str, Any]) -> GuidanceRange | None:
    """Returns the guidance range that a run's student is conditioned on, from its recipe.json, or None."""
    guidance_range = record["config"]["roles"]["student"].get("guidance_range")
    return guidance_range and GuidanceRange.of_json(guidance_range)


def newest_step(folder: Path) -> int | None:
    """The step of a run's newest checkpoint."""
    newest = checkpoint.latest(folder / "checkpoints")
    return None if newest is None else checkpoint.step_of(newest)


def student_of(folder: Path, record: dict[str, Any], family: Family, *, raw: bool = False, step: int | None = None) -> Role:
    """Loads the student of a run's newest checkpoint (or that of `step`), averaged if the run kept an average."""
    checkpoints = folder / "checkpoints"
    newest = checkpoint.latest(checkpoints) if step is None else checkpoint.at(checkpoints, step)
    if newest is None:
        kept = ", ".join(str(checkpoint.step_of(path)) for path in checkpoint.every(checkpoints))
        if step is not None and kept:
            raise ValueError(f"step: {folder} has no whole checkpoint of step {step}; it has {kept}")
        raise ValueError(f"dir: {folder} holds no checkpoint yet; let the run reach its first one")
    saved = checkpoint.load(newest)
    config, guidance_range = record["config"]["roles"]["student"], guidance_range_of(record)
    if config["lora"] is not None:
        backbone = Backbone(family, family.pretrained)
        backbone.add_adapter("student", LoRA(config["lora"]["rank"], config["lora"]["alpha"]))
        role = Role("student", backbone, adapter="student", prediction_type=config.get("prediction_type"), guidance_range=guidance_range)
    else:
        role = Role("student", Backbone(family, family.new_backbone()), prediction_type=config.get("prediction_type"), guidance_range=guidance_range)
    averaged = None if raw else saved["ema"].get("student")
    role.load_state(averaged or saved["roles"]["student"])
    return role
