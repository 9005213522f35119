"""A model as shapes without memory: what planning counts, from configurations alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from instep.core.quiet import quiet
from instep.core.size import Size
from instep.models.families import family_class
from instep.models.family import Dimensions
from instep.models.pipeline_family import PipelineFamily
from instep.models.preset import ModelSettings

# published sizes: name -> the pipeline's class, and class and configuration of each part of its network (what is left out is the class's default)
PUBLISHED: Mapping[str, tuple[str, Mapping[str, tuple[str, Mapping[str, Any]]]]] = {
    "1.3B": (
        "WanPipeline",
        {"transformer": ("WanTransformer3DModel", {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30})},
    ),
    "14B": (
        "WanPipeline",
        {"transformer": ("WanTransformer3DModel", {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40})},
    ),
}


@dataclass(frozen=True)
class Outline:
    """A family, the parts of its network on the meta device by component name, and its VAE's configuration (empty: the class's defaults)."""

    family: type[PipelineFamily]
    parts: Mapping[str, nn.Module]
    vae: Mapping[str, Any]

    def dimensions(self, size: Size) -> Dimensions:
        """What memory and time at `size` follow from; ValueError where that was not counted for the architecture."""
        return self.family.dimensions_of(next(iter(self.parts.values())), size, self.vae)


def settings_of_size(name: str) -> ModelSettings:
    """The settings that are published for the model of a published size; ValueError for another name."""
    if name not in PUBLISHED:
        raise ValueError(f"model: {name!r} is not a published size; allowed: {', '.join(PUBLISHED)}")
    kind, networks = PUBLISHED[name]
    return ModelSettings(family_class(kind, networks).preset_of(next(iter(networks.values()))[1]), None)


def meta_network(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """A diffusers network of class `kind` with shapes and no memory (meta device). Raises ValueError for a class that diffusers does not have."""
    with quiet():
        import diffusers

        found: Any = getattr(diffusers, kind, None)
        if found is None:
            raise ValueError(
                f"_class_name: {kind!r} is no network of the installed diffusers {diffusers.__version__}; update diffusers, or choose another model"
            )
        with torch.device("meta"):
            return found.from_config({key: value for key, value in config.items() if not key.startswith("_")})


def outline(model: str | Path) -> Outline:
    """The outline of a published size by its name, or of a diffusers pipeline folder, of which configurations alone are read.

    Raises ValueError for what is neither, and for a pipeline that no family knows.
    """
    if model in PUBLISHED:
        kind, networks = PUBLISHED[str(model)]
        return Outline(family_class(kind, networks), {part: meta_network(*network) for part, network in networks.items()}, {})
    folder = Path(model)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"model: {str(model)!r} is not known ({folder / 'model_index.json'} is missing)")
    index = _read(folder / "model_index.json")
    family = family_class(str(index.get("_class_name")), index)
    vae = folder / "vae" / "config.json"
    parts = {part: meta_network(index[part][1], _read(folder / part / "config.json")) for part in family.denoisers}
    return Outline(family, parts, _read(vae) if vae.is_file() else {})


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"model: {file} is missing; copy or download the folder again")
    return json.loads(file.read_text(encoding="utf-8"))
