"""`instep export`: the student of a run, from its newest checkpoint, as a stock diffusers folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from instep.models import BUNDLED, VideoSize, load
from instep.models.base import Family
from instep.roles import Backbone, LoRA, Role
from instep.rollout import Sampling
from instep.train import checkpoint
from instep.train.run import export_role


@dataclass(frozen=True)
class ExportArgs:
    """Write the student of run DIR as a diffusers folder with model card, ComfyUI workflow and, if it is one, LoRA file."""

    dir: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    to: Path
    """New folder."""
    dtype: Literal["float32", "float16"] = "float32"
    """Precision of the weights on disk."""
    raw: bool = False
    """The student itself instead of its moving average."""
    model: str | None = None
    """The base model's folder, if it is not where the run found it."""


def export_command(args: ExportArgs) -> int:
    """Exports and prints how far stock diffusers is from our own sampler."""
    record = read_run(args.dir)
    bundled = record["model"] in BUNDLED
    family = load(args.model or (record["model"] if bundled else record["model_path"]), VideoSize(**record["size"]))
    student, sampling = student_of(args.dir, record, family, raw=args.raw), sampling_of(record, newest_step(args.dir))
    report = export_role(student, family, sampling, args.to, recipe=record["recipe"], seed=record["seed"],
                         prompts=record["prompt_count"], example=record["example_prompt"], command=record["command"],
                         dtype=getattr(torch, args.dtype))  # fmt: skip
    off = f"; stock diffusers differs from our sampler by {report.sampler_difference:.1e}" if sampling.kind == "few-step" else ""
    print(f"wrote {report.folder} ({report.size_bytes / 1e6:.1f} MB){off}")
    return 0


def read_run(folder: Path) -> dict[str, Any]:
    """recipe.json of a run; ValueError if `folder` holds none."""
    file = folder / "recipe.json"
    if not file.is_file():
        raise ValueError(f"dir: {folder} holds no run (recipe.json is missing); give the folder that `instep train --out` wrote")
    return json.loads(file.read_text(encoding="utf-8"))


def sampling_of(record: dict[str, Any], step: int | None = None) -> Sampling:
    """How the student of a run is sampled at a step (None: at its end), from its recipe.json; see `Recipe.sampling_at`."""
    config = record["config"]
    if config.get("sampler", "few-step") == "few-step":
        return Sampling(tuple(record["levels"]))
    left, stages = step, [stage for stage in config["stages"] if stage["steps"]]
    here = stages[-1]
    for stage in stages if left is not None else ():
        if left <= stage["steps"]:
            here = stage
            break
        left -= stage["steps"]
    return Sampling(tuple(record["levels"]), "ode", float(config["guidance"]) if here.get("guided", True) else 1.0)


def newest_step(folder: Path) -> int | None:
    """The step of a run's newest checkpoint."""
    newest = checkpoint.latest(folder / "checkpoints")
    return None if newest is None else checkpoint.step_of(newest)


def student_of(folder: Path, record: dict[str, Any], family: Family, *, raw: bool = False, step: int | None = None) -> Role:
    """The student in the newest checkpoint of a run (or that of `step`), averaged if the run kept an average."""
    checkpoints = folder / "checkpoints"
    newest = checkpoint.latest(checkpoints) if step is None else checkpoint.at(checkpoints, step)
    if newest is None:
        kept = ", ".join(str(checkpoint.step_of(path)) for path in checkpoint.every(checkpoints))
        if step is not None and kept:
            raise ValueError(f"step: {folder} has no whole checkpoint of step {step}; it has {kept}")
        raise ValueError(f"dir: {folder} holds no checkpoint yet; let the run reach its first one")
    saved = checkpoint.load(newest)
    config = record["config"]["roles"]["student"]
    if config["lora"] is not None:
        backbone = Backbone(family, family.pretrained)
        backbone.add_adapter("student", LoRA(config["lora"]["rank"], config["lora"]["alpha"]))
        role = Role("student", backbone, adapter="student", reads=config.get("reads"))
    else:
        role = Role("student", Backbone(family, family.new_backbone()), reads=config.get("reads"))
    averaged = None if raw else saved["ema"].get("student")
    role.load_state(averaged or saved["roles"]["student"])
    return role
