"""A PEFT adapter as a file that diffusers and ComfyUI both read, or merged into plain weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instep.export.comfyui import comfyui_module


def _layers(module: nn.Module, adapter: str) -> Iterator[tuple[str, Any, float]]:
    """Name, LoRA layer and scale alpha / r of everything `adapter` touches.

    The scale is computed from alpha and r: the layer's own `scaling` is whatever the last forward set it to.
    """
    from peft.tuners.lora.layer import LoraLayer

    lora = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer)]
    found = [(name, layer) for name, layer in lora if adapter in layer.lora_A]
    if not found:
        there = sorted({key for _, layer in lora for key in layer.lora_A})
        raise ValueError(f"adapter: {adapter!r} is not on this module; allowed: {there or 'none, the module carries no LoRA'}; train with a LoRA role")
    for name, layer in found:
        if adapter in layer.lora_variant or layer.lora_bias[adapter]:
            raise ValueError(f"adapter: {adapter!r} on {name} is not a plain LoRA (DoRA or a bias); allowed: plain LoRA; retrain with LoraConfig's defaults")
        rank = layer.r[adapter] ** (0.5 if layer.use_rslora[adapter] else 1)
        yield name, layer, layer.lora_alpha[adapter] / rank


@contextmanager
def adapter_active(module: nn.Module, adapter: str = "student") -> Iterator[None]:
    """`adapter` alone, at its own alpha / r, for everything inside; activity, scales and requires_grad come back
    afterwards.
    """
    layers = [(layer, scale) for _, layer, scale in _layers(module, adapter)]
    before = [(layer.active_adapters, dict(layer.scaling)) for layer, _ in layers]
    trained = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for layer, scale in layers:
            layer.set_adapter([adapter])
            layer.scaling[adapter] = scale
        yield
    finally:
        for (layer, _), (active, scaling) in zip(layers, before, strict=True):
            layer.set_adapter(active)
            layer.scaling.update(scaling)
        for p, flag in trained:
            p.requires_grad_(flag)


def lora_state_dict(module: nn.Module, adapter: str = "student") -> dict[str, Tensor]:
    """`diffusion_model.blocks.0.self_attn.q.lora_A.weight` ... with alpha / r folded into B, so strength 1 is exact
    everywhere.

    These names are the ones ComfyUI maps onto Wan and diffusers converts by itself; of other transformers they are diffusers' own,
    `transformer.transformer_blocks.0.attn1.to_q.lora_A.weight`. Raises ValueError if the adapter is
    not there, is not plain LoRA, or touches a module that has no name in ComfyUI's Wan.
    """
    state, is_wan = {}, type(module).__name__ == "WanTransformer3DModel"
    for name, layer, scale in _layers(module, adapter):
        key = f"diffusion_model.{comfyui_module(name)}" if is_wan else f"transformer.{name}"
        state[f"{key}.lora_A.weight"] = layer.lora_A[adapter].weight.detach().clone().cpu().contiguous()
        state[f"{key}.lora_B.weight"] = (layer.lora_B[adapter].weight.detach() * scale).cpu().contiguous()
    return state


def save_lora(module: nn.Module, path: Path, adapter: str = "student", dtype: torch.dtype | None = None) -> list[str]:
    """Writes `lora_state_dict` to a safetensors file, atomically; returns the keys. dtype None keeps its own."""
    from safetensors.torch import save_file

    state = {key: value.to(dtype) if dtype else value for key, value in lora_state_dict(module, adapter).items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(state, temporary, metadata={"format": "pt", "instep": "alpha / rank is folded into lora_B: load at strength 1"})
    os.replace(temporary, path)
    return sorted(state)


def plain_copy(module: Any, state: dict[str, Tensor]) -> nn.Module:
    """A new module of the same class and configuration with weights `state`: no hooks, stock attention processors, eval
    mode.

    Not a deepcopy: a backbone in training carries hooks.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        copy = type(module).from_config(module.config)
    copy.load_state_dict(state, assign=True)
    return copy.eval().requires_grad_(False)


@torch.no_grad()
def merge_lora(module: nn.Module, adapter: str = "student") -> nn.Module:
    """A plain module with W + (alpha / r) B A in place of the adapted W, in W's dtype; `module` stays as it is.

    Other adapters on the module (a fake's) are left out. The product is formed in float32 or better.
    """
    layers = {name: (layer, scale) for name, layer, scale in _layers(module, adapter)}
    state = {}
    for key, value in module.state_dict().items():
        if ".lora_" in key:
            continue
        merged = value.detach().clone()
        owner, _, leaf = key.rpartition(".base_layer.")
        if owner in layers and leaf == "weight":
            layer, scale = layers[owner]
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            wide = torch.promote_types(torch.float32, merged.dtype)
            merged = (merged.to(wide) + scale * (b.to(wide) @ a.to(wide))).to(merged.dtype)
        state[f"{owner}.{leaf}" if owner else key] = merged
    return plain_copy(module, state)
