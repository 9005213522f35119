"""A model as shapes without memory, from configurations alone: a family on the meta device, for planning."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from instep.core.quiet import quiet
from instep.core.size import Size
from instep.models.borrow import cast as cast_network
from instep.models.families import family_class, parts_of
from instep.models.folder import family_in
from instep.models.index import INDEX, is_model_folder, read_json
from instep.models.preset import ModelSettings

if TYPE_CHECKING:
    from instep.models.family import Family

_UMT5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384, "feed_forward_proj": "gated-gelu"}
_WAN: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "vae": ("AutoencoderKLWan", {}),
    "text_encoder": ("UMT5EncoderModel", _UMT5_XXL),
    "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
}
# published sizes: name -> the pipeline's class, and class and configuration of each part (what is left out is the class's default)
PUBLISHED: Mapping[str, tuple[str, Mapping[str, tuple[str, Mapping[str, Any]]]]] = {
    "1.3B": (
        "WanPipeline",
        {"transformer": ("WanTransformer3DModel", {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}), **_WAN},
    ),
    "14B": (
        "WanPipeline",
        {"transformer": ("WanTransformer3DModel", {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}), **_WAN},
    ),
}


def settings_of_size(name: str) -> ModelSettings:
    """The settings that are published for the model of a published size; ValueError for another name."""
    if name not in PUBLISHED:
        raise ValueError(f"model: {name!r} is not a published size; allowed: {', '.join(PUBLISHED)}")
    kind, parts = PUBLISHED[name]
    family = family_class(kind, parts)
    return ModelSettings(family.preset_of(parts[family.denoisers[0]][1]), None)


def outline(model: str | Path, size: Size | None = None, dtype: torch.dtype = torch.float32) -> Family:
    """The family of a published size by its name, or of a model folder, of which configurations alone are read. All its networks are on the meta device,
    networks and text encoders in `dtype`, the VAE in float32; it has no tokenizers, so that conditions come from its `blank`. `size` None: the model's own.

    Raises ValueError for what is neither, for a part that is missing or that the installed libraries do not have, and for a pipeline that no family knows.
    """
    if model in PUBLISHED:
        kind, parts = PUBLISHED[str(model)]
        components = {name: meta_part(*part) for name, part in parts.items()}
        return _family(kind, components, {}, size, str(model), dtype)
    folder = Path(model)
    if not is_model_folder(folder):
        raise ValueError(f"model: {str(model)!r} is not known ({folder / INDEX} is missing)")
    if not (folder / INDEX).is_file():
        return _parts_only(folder, size, dtype)
    index = _read(folder / INDEX)
    family_class(str(index.get("_class_name")), index)  # raises ValueError for one that no family knows, before parts are read
    components = {name: _folder_part(folder / name, entry[1]) for name, entry in index.items() if isinstance(entry, list)}
    options = {name: value for name, value in index.items() if not name.startswith("_") and not isinstance(value, list)}
    return _family(str(index["_class_name"]), components, options, size, folder.name, dtype)


def _family(kind: str, components: Mapping[str, Any], options: Mapping[str, Any], size: Size | None, name: str, dtype: torch.dtype) -> Family:
    with quiet():
        import diffusers

        made: Any = getattr(diffusers, kind)
        given = {**options, **components}
        # tokenizers and the like, which planning has no use for, are None
        parameters = inspect.signature(made).parameters.values()
        pipe = made(**{p.name: given.get(p.name) for p in parameters if p.name in given or p.default is p.empty})
    for part, module in components.items():
        if isinstance(module, nn.Module) and part != "vae":
            cast_network(module, dtype)
    return cast("Family", family_class(kind, parts_of(pipe))(pipe, size, name))


def _parts_only(folder: Path, size: Size | None, dtype: torch.dtype) -> Family:
    """The family of a network without a pipeline."""
    kind: Any = family_in(folder)
    config = _read(folder / "transformer" / "config.json")
    network = meta_part(str(config.get("_class_name")), config)
    cast_network(network, dtype)
    vae = _folder_part(folder / "vae", "AutoencoderKL") if (folder / "vae").is_dir() else None
    found = kind(network, name=folder.name, vae=vae)
    return found if size is None else found.at(size)


def _folder_part(folder: Path, kind: str | None) -> Any:
    """A part of a pipeline folder: a network on the meta device, a scheduler, or None for one that is not there or only prepares inputs."""
    if kind is None or any(word in kind for word in ("Tokenizer", "Processor", "Extractor")):
        return None
    return meta_part(kind, _read(folder / ("scheduler_config.json" if kind.endswith("Scheduler") else "config.json")))


def meta_part(kind: str, config: Mapping[str, Any]) -> Any:
    """A network of diffusers or transformers with shapes and no memory, or a scheduler. Raises ValueError for a class that neither has."""
    with quiet():
        import diffusers
        import transformers

        given = {key: value for key, value in config.items() if not key.startswith("_")}
        if (found := getattr(diffusers, kind, None)) is not None:
            if kind.endswith("Scheduler"):
                return found.from_config(given)
            with torch.device("meta"):
                return found.from_config(given).eval()
        if (found := getattr(transformers, kind, None)) is not None:
            with torch.device("meta"):
                return found(found.config_class(**given)).eval()
    raise ValueError(
        f"_class_name: {kind!r} is no part of the installed diffusers {diffusers.__version__} or transformers {transformers.__version__}; update them, or "
        "choose another model"
    )


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"model: {file} is missing; copy or download the folder again")
    return read_json(file)
