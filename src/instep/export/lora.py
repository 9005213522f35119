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


def lora_state_dict(module: nn.Module, adapter: str, key: Callable[[str], str]) -> dict[str, Tensor]:
    """The tensors `KEY.lora_A.weight` and `KEY.lora_B.weight` of each adapted layer, KEY = `key(layer name)`, with alpha / r folded into B.

    Strength 1 is therefore exact everywhere. Raises ValueError if the adapter is not there, is not plain LoRA, or adapts a layer without a name in `key`.
    """
    state = {}
    for name, layer, scale in lora_layers(module, adapter):
        state[f"{key(name)}.lora_A.weight"] = layer.lora_A[adapter].weight.detach().clone().cpu().contiguous()
        state[f"{key(name)}.lora_B.weight"] = (layer.lora_B[adapter].weight.detach() * scale).cpu().contiguous()
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
        state = lora_state_dict(module, adapter, lambda layer, part=part: family.lora_key(part, layer))  # type: ignore[misc]
        path = folder / lora_files(family)[part]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        tensors = {key: value.to(dtype) if dtype else value for key, value in state.items()}
        for key, value in tensors.items():
            finite.note(f"{path.name}:{key}", state[key], value)
        finite.check(dtype)
        save_file(tensors, temporary, metadata={"format": "pt", "instep": "alpha / rank is folded into lora_B: load at strength 1"})
        os.replace(temporary, path)
        keys += sorted(state)
    return keys
