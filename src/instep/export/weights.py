"""Writes a pipeline's networks as safetensors shards, merging, rounding and checking one tensor at a time.

A network in training is thus exported without a copy of it. Frozen networks are written from where they are.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instep.core.quiet import quiet
from instep.core.tensor_file import TYPES, Entry, file_parts, write_parts
from instep.core.unusable import Unusable, is_finite, named
from instep.models.adapters import Weight, plain_weights
from instep.models.borrow import float32_parts, in_float32

# of one file, as diffusers writes them
SHARD_BYTES = 10_000_000_000
NAME = "diffusion_pytorch_model"
PART = ".part"
FORMAT = {"format": "pt"}


class Finite:
    """Notes the tensors that are not finite; `check` raises Unusable if there are any. Tensors of whole numbers pass."""

    def __init__(self) -> None:
        self.before: list[str] = []  # not finite in memory
        self.overflown: list[str] = []  # not finite in the dtype of the file

    def note(self, name: str, before: Tensor, after: Tensor) -> None:
        if is_finite(after):
            return
        (self.overflown if is_finite(before) else self.before).append(name)

    def check(self, dtype: torch.dtype | None) -> None:
        if self.before:
            raise Unusable(
                f"weights: {named(self.before)} hold values that are not finite, and nothing was written; export an earlier checkpoint, or train anew with a "
                "lower learning rate"
            )
        if self.overflown:
            kind = str(dtype).removeprefix("torch.")
            raise Unusable(
                f"dtype: {kind} cannot hold {named(self.overflown)}, whose values lie beyond {torch.finfo(dtype or torch.float16).max:g}, and nothing was "
                "written; choose bfloat16 (--dtype bfloat16), which reaches as far as float32"
            )


def target_dtype(name: str, weight: Weight, dtype: torch.dtype | None, keep: tuple[str, ...]) -> torch.dtype:
    """The dtype that a weight is written in: `dtype`, or its own for None, for buffers and for what the class keeps in float32 (norms, time embedding)."""
    if dtype is None or not weight.parameter or not weight.base.is_floating_point() or in_float32(name, keep):
        return weight.base.dtype
    return dtype


def stored_dtype(module: nn.Module, weights: Mapping[str, Weight], dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of most of a network's weights, as written."""
    counts: Counter[torch.dtype] = Counter()
    for name, weight in weights.items():
        counts[target_dtype(name, weight, dtype, float32_parts(type(module)))] += weight.base.numel()
    return counts.most_common(1)[0][0]


def entries_of(what: str, module: nn.Module, weights: Mapping[str, Weight], dtype: torch.dtype | None, finite: Finite) -> dict[str, Entry]:
    """The tensors of a file, made and checked when they are written; `what` names the network in errors."""

    def make(name: str, weight: Weight, target: torch.dtype) -> Tensor:
        value = weight.value(target)
        if not is_finite(value):
            finite.note(f"{what}.{name}", weight.value(torch.promote_types(torch.float32, weight.base.dtype)), value)
        return value

    entries = {}
    for name, weight in weights.items():
        target = target_dtype(name, weight, dtype, float32_parts(type(module)))
        entries[name] = Entry(target, tuple(weight.base.shape), partial(make, name, weight, target))
    return entries


def write_network(folder: Path, module: Any, weights: Mapping[str, Weight], dtype: torch.dtype | None, finite: Finite) -> None:
    """Writes a diffusers network: config.json and its `weights` under diffusers' names, in one file or in shards of up to `SHARD_BYTES` and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    module.save_config(folder)
    entries = entries_of(folder.name, module, weights, dtype, finite)
    shards = split(entries, SHARD_BYTES)
    if len(shards) == 1:
        write_parts(folder / f"{NAME}.safetensors", file_parts(entries, FORMAT))
        return
    files = {f"{NAME}-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        write_parts(folder / file, file_parts(shard, FORMAT))
    index = {
        "metadata": {"total_size": sum(entry.size for entry in entries.values())},
        "weight_map": {name: file for file, shard in files.items() for name in shard},
    }
    (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def split(entries: Mapping[str, Entry], most: int) -> list[dict[str, Entry]]:
    """Entries in their order, in shards of up to `most` bytes; a larger tensor has a shard of its own."""
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.size > most:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.size
    return shards


def write_encoder(folder: Path, module: Any, dtype: torch.dtype | None, finite: Finite) -> None:
    """Writes a network of transformers by its own `save_pretrained`, which knows tied weights and older names; another dtype is made in the files."""
    module.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    if dtype is None:
        for name, value in module.state_dict().items():
            finite.note(f"{folder.name}.{name}", value, value)
        return
    buffers, total = {name for name, _ in module.named_buffers()}, 0
    for file in sorted(folder.glob("*.safetensors")):
        total += recast(file, partial(encoder_dtype, dtype=dtype, buffers=buffers, keep=float32_parts(type(module))), finite)
    for file in folder.glob("*.safetensors.index.json"):
        index = json.loads(file.read_text())
        index["metadata"]["total_size"] = total
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in config}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def encoder_dtype(name: str, own: torch.dtype, *, dtype: torch.dtype, buffers: set[str], keep: tuple[str, ...]) -> torch.dtype:
    """The dtype of a tensor of transformers' file in an export in `dtype`: its own for buffers, whole numbers and what the class keeps in float32."""
    fixed = not own.is_floating_point or name in buffers or in_float32(name, keep)
    return own if fixed else dtype


def recast(file: Path, dtype_of: Callable[[str, torch.dtype], torch.dtype], finite: Finite) -> int:
    """Writes a safetensors file anew, a tensor at a time, in the dtypes that `dtype_of` (name, present dtype) returns; returns the bytes of its tensors."""
    from safetensors import safe_open

    temporary = file.with_name(file.name + PART)
    with safe_open(file, framework="pt") as there:

        def make(name: str, target: torch.dtype) -> Tensor:
            before = there.get_tensor(name)
            value = before.to(target)
            finite.note(f"{file.parent.name}.{name}", before, value)
            return value

        entries = {}
        for name in there.keys():  # noqa: SIM118 (no mapping)
            known = there.get_slice(name)
            target = dtype_of(name, TYPES[known.get_dtype()])
            entries[name] = Entry(target, tuple(known.get_shape()), partial(make, name, target))
        write_parts(temporary, file_parts(entries, there.metadata() or FORMAT))
    os.replace(temporary, file)
    return sum(entry.size for entry in entries.values())


def write_pipeline(folder: Path, pipe: Any, weights: Mapping[str, Mapping[str, Weight]], dtype: torch.dtype | None) -> None:
    """Writes a pipeline that `from_pretrained` loads: the parts in `weights` with those, all other components as they are, all networks in `dtype` (None:
    unchanged). Raises Unusable that names the tensors if any weight is not finite, in memory or once it is rounded.
    """
    from diffusers import ModelMixin

    finite = Finite()
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        pipe.save_config(folder)
        for name, part in pipe.components.items():
            if name in weights:
                write_network(folder / name, part, weights[name], dtype, finite)
            elif isinstance(part, ModelMixin):
                write_network(folder / name, part, plain_weights(part), dtype, finite)
            elif isinstance(part, nn.Module):
                write_encoder(folder / name, part, dtype, finite)
            elif part is not None:
                part.save_pretrained(folder / name)
    finite.check(dtype)
