"""The JSON files of a model folder: what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instep.core.json_files import read_object

INDEX = "model_index.json"


def is_model_folder(folder: Path) -> bool:
    """Whether it holds a pipeline, or the parts of a class-conditional DiT (transformer/ and scheduler/), which has no pipeline."""
    return (folder / INDEX).is_file() or read_json(folder / "transformer" / "config.json").get("_class_name") == "DiTTransformer2DModel"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    return read_object(file, "model", "download or save the model again") if file.is_file() else {}
