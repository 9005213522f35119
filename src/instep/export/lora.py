"""Writes a PEFT adapter as files that diffusers and ComfyUI read, one for each part of the network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from instep.export.weights import Finite
from instep.models.adapters import has_adapter, lora_layers
from instep.models.family import Family


def lora_state_dict(module: nn.Module, adapter: str, keys: Callable[[str], tuple[str, str]]) -> dict[str, Tensor]:
    """A [r, in] and B [out, r] of each adapted layer under the two names that `keys(layer name)` gives them, with alpha / r folded into B.

    Strength 1 is therefore exact everywhere. Raises ValueError if the adapter is not there, is not plain LoRA, or adapts a layer without names in `keys`.
    """
    state = {}
    for name, layer, scale in lora_layers(module, adapter):
        a, b = keys(name)
        state[a] = layer.lora_A[adapter].weight.detach().clone().cpu().contiguous()
        state[b] = (layer.lora_B[adapter].weight.detach() * scale).cpu().contiguous()
    return state


def lora_files(family: Family) -> dict[str, str]:
    """The file name of each part's LoRA: lora.safetensors, and lora_2.safetensors for a second expert."""
    return {part: "lora.safetensors" if i == 0 else f"lora_{i + 1}.safetensors" for i, part in enumerate(family.denoisers)}


def save_loras(family: Family, network: nn.Module, folder: Path, adapter: str = "student", dtype: torch.dtype | None = None) -> list[str]:
    """Writes the adapter of each part that has one, each file atomically, and returns all keys. dtype None keeps the adapter's own.

    Raises Unusable that names the tensors if any is not finite, in memory or once it is rounded; the file is then not written.
    """
    from safetensors.torch import save_file

    finite = Finite()
    keys: list[str] = []
    for part, module in family.parts(network).items():
        if not has_adapter(module, adapter) and len(family.denoisers) > 1:
            continue
        state = lora_state_dict(module, adapter, lambda layer, part=part: family.lora_keys(part, layer))  # type: ignore[misc]
        path = folder / lora_files(family)[part]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        tensors = {key: value.to(dtype) if dtype else value for key, value in state.items()}
        for key, value in tensors.items():
            finite.note(f"{path.name}:{key}", state[key], value)
        finite.check(dtype)
        save_file(tensors, temporary, metadata={"format": "pt", "instep": "alpha / rank is folded into B (lora_B, lora_up): load at strength 1"})
        os.replace(temporary, path)
        keys += sorted(state)
    return keys
