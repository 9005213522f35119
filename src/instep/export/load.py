"""Loads an exported folder as stock diffusers does; networks of another dtype are cast a tensor at a time."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from instep.core.json_files import read_object
from instep.core.quiet import quiet
from instep.core.tensor_file import dtypes_in, read_tensors


def load_pipeline(folder: Path, device: torch.device | str, parts: Mapping[str, nn.Module] | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The stock pipeline of a folder in `dtype`, with `parts` in place of those that need not be loaded.

    Networks of diffusers that the folder holds in a narrower dtype take no more than their float32 copy and one tensor: diffusers' own loader
    maps a whole file beside the copy. Encoders of transformers are loaded by their own library.
    """
    import diffusers

    gc.collect()  # a network with hooks is part of a cycle: the one that was loaded before goes now
    given = dict(parts or {})
    with quiet():
        if dtype == torch.float32:
            given |= {name: widened(folder / name, kind, device) for name, kind in narrow_networks(folder).items() if name not in given}
        # DiffusionPipeline itself loads a part that the class lists as optional (Wan's transformer) although it is given
        kind = getattr(diffusers, _index(folder)["_class_name"])
        pipe = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True, **given).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def narrow_networks(folder: Path) -> dict[str, Any]:
    """The networks of diffusers in a folder whose files hold numbers in less than float32: their classes by name."""
    import diffusers

    found = {}
    for name, entry in _index(folder).items():
        if not isinstance(entry, list) or entry[0] != "diffusers" or not (files := sorted((folder / name).glob("*.safetensors"))):
            continue
        kind = getattr(diffusers, entry[1])
        if issubclass(kind, diffusers.ModelMixin) and any(dtype.is_floating_point and dtype.itemsize < 4 for file in files for dtype in dtypes_in(file)):
            found[name] = kind
    return found


def _index(folder: Path) -> dict[str, Any]:
    return read_object(folder / "model_index.json", "dir", "export the student again")


def widened(folder: Path, kind: Any, device: torch.device | str = "cpu") -> Any:
    """The diffusers network of a folder in float32 on `device`, each tensor read, cast and freed before the next one is read.

    Raises ValueError for tensors that the network lacks, and for some of its own that the files lack.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():  # parameters without memory; buffers that are in no file are computed
        network = kind.from_config(kind.load_config(folder))
    left = set(network.state_dict())
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in read_tensors(file):
            if name not in left:
                raise ValueError(f"weights: {file} holds {name}, which is no tensor of {kind.__name__} or is there twice; export the student again")
            left.remove(name)
            owner, _, last = name.rpartition(".")
            _put(network.get_submodule(owner), last, value.to(device, torch.float32 if value.is_floating_point() else value.dtype))
    if left:
        raise ValueError(f"weights: {folder} lacks {', '.join(sorted(left)[:3])}, which {kind.__name__} has; export the student again")
    return network.eval()


def _put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=value.is_floating_point())
    else:
        module._buffers[name] = value
