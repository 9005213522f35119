"""What a model folder is, from its JSON files alone: its family, and the settings that are published for its model. No weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instep.core.json_files import read_object
from instep.models.families import family_class
from instep.models.pipeline_family import PipelineFamily
from instep.models.preset import ModelSettings

INDEX = "model_index.json"


def family_in(folder: Path) -> type[PipelineFamily]:
    """The family that reads a folder. ValueError for what is no model folder, and for a pipeline that no family knows."""
    index = folder / INDEX
    if not is_model_folder(folder):
        raise ValueError(
            f"model: {str(folder)!r} is not a model folder ({index} is missing); give the path of a diffusers pipeline folder as save_pretrained writes it"
        )
    if index.is_file():
        parts = read_json(index)
        return family_class(str(parts.get("_class_name")), parts)
    from instep.models.dit import DiTFamily

    return DiTFamily


def is_model_folder(folder: Path) -> bool:
    """Whether it holds a pipeline, or the parts of a class-conditional DiT (transformer/ and scheduler/), which has no pipeline."""
    return (folder / INDEX).is_file() or read_json(folder / "transformer" / "config.json").get("_class_name") == "DiTTransformer2DModel"


def settings_in(folder: Path) -> ModelSettings:
    """The settings that are published for the model in a folder. A configuration that is not there counts as empty, which loading the model refuses.

    Raises ValueError for what is no model folder, and for a pipeline that no family knows.
    """
    family = family_in(folder)
    denoiser, scheduler = folder / family.denoisers[0] / "config.json", folder / "scheduler" / "scheduler_config.json"
    return ModelSettings(family.preset_of(read_json(denoiser)), family.shift_of(read_json(scheduler)) if scheduler.is_file() else None)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    return read_object(file, "model", "download or save the model again") if file.is_file() else {}
