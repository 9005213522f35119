"""What an export has on the disk at its worst moment, counted from shapes before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from instep.core.disk import check_disk
from instep.core.tensor_file import Entry
from instep.export.rules import networks, others_in
from instep.export.weights import SHARD_BYTES, encoder_dtype, split
from instep.models.borrow import float32_parts

if TYPE_CHECKING:
    from instep.models.adapters import Weight
    from instep.models.family import Family


def check_room(
    out: Path,
    family: Family,
    network: nn.Module,
    weights: Mapping[str, Mapping[str, Weight]],
    dtype: torch.dtype | None,
    *,
    adapter: str | None,
    comfyui: bool = False,
) -> None:
    """Raises ValueError if less is free where `out` lies than the new folder takes, which is whole before an earlier one goes.

    weights: of the parts of `network`, with `adapter` merged. comfyui: whether ComfyUI's file is written too, where the model has one.
    """
    lora = sum(
        factor.numel() * (dtype or factor.dtype).itemsize for part in weights.values() for weight in part.values() if weight.lora for factor in weight.lora[:2]
    )
    rest = {
        "LoRA file": lora if adapter is not None else 0,
        "ComfyUI's file": comfyui_bytes(family, dtype) if comfyui and adapter is None else 0,
        "files that stay": sum(path.stat().st_size for path in others_in(out)),
    }
    needed = {"networks": pipeline_bytes(family, family.parts(network), dtype, sum(rest.values())), **{what: count for what, count in rest.items() if count}}
    check_disk(out, needed, "export")


def comfyui_bytes(family: Family, dtype: torch.dtype | None) -> int:
    """Of ComfyUI's file, which holds the first network once more; 0 where there is none."""
    if family.comfyui is None or family.pipe is None or family.comfyui.obstacle(family.pipe) is not None:
        return 0
    return _bytes(_entries(family.parts(family.pretrained)[family.denoisers[0]], dtype))


def pipeline_bytes(family: Family, parts: Mapping[str, nn.Module], dtype: torch.dtype | None, rest: int = 0) -> int:
    """Of a pipeline's networks in `dtype` (None: as they are), `parts` in place of its own. If `rest` bytes, which are written later, do not outweigh it: what
    they take at most, while a text encoder's file is written anew in another dtype beside the one that transformers wrote."""
    from diffusers import ModelMixin

    done = most = 0
    for name, part in {**networks(family), **parts}.items():
        # the VAE beside a bare network is written as it is
        there, after = _entries(part, None), _entries(part, dtype if family.pipe is not None or name in parts else None)
        if dtype is not None and not isinstance(part, ModelMixin):
            written = done + _bytes(there)
            for file in split(there, SHARD_BYTES):
                anew = _bytes({key: after[key] for key in file})
                most = max(most, written + anew)
                written += anew - _bytes(file)
        done += _bytes(after)
    return max(most - rest, done)


def _entries(network: nn.Module, dtype: torch.dtype | None) -> dict[str, Entry]:
    """The tensors of a network's file without adapters, tied ones once."""
    buffers, keep = {name for name, _ in network.named_buffers()}, float32_parts(type(network))
    tensors = {id(x): (name, x) for name, x in network.state_dict(keep_vars=True).items() if ".lora_" not in name}
    return {
        name: Entry(x.dtype if dtype is None else encoder_dtype(name, x.dtype, dtype=dtype, buffers=buffers, keep=keep), tuple(x.shape), lambda: torch.empty(0))
        for name, x in tensors.values()
    }


def _bytes(entries: Mapping[str, Entry]) -> int:
    return sum(entry.size for entry in entries.values())
