"""PEFT adapters on a diffusers network: which layers they touch, and merging one into plain weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def lora_layers(module: nn.Module, adapter: str) -> Iterator[tuple[str, Any, float]]:
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


def has_adapter(module: nn.Module, adapter: str) -> bool:
    """Whether `adapter` touches any layer of the module."""
    from peft.tuners.lora.layer import LoraLayer

    return any(isinstance(layer, LoraLayer) and adapter in layer.lora_A for layer in module.modules())


def plain_copy(module: Any, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A new module of the same class and configuration with weights `state` (None: copies of its own): no hooks, stock attention processors, eval mode.

    It is not a deepcopy, because a backbone in training carries hooks. Raises ValueError for the own weights of a module that carries LoRA layers.
    """
    from accelerate import init_empty_weights

    if state is None:
        state = {key: value.detach().clone() for key, value in module.state_dict().items()}
        if any(".lora_" in key for key in state):
            raise ValueError("network: it carries LoRA layers, which are not weights of a pipeline; name the adapter to merge, adapter=")
    with init_empty_weights(include_buffers=False):
        copy = type(module).from_config(module.config)
    copy.load_state_dict(state, assign=True)
    return copy.eval().requires_grad_(False)


@torch.no_grad()
def merge_lora(module: nn.Module, adapter: str = "student") -> nn.Module:
    """A plain module with W + (alpha / r) B A in place of the adapted W, in W's dtype; `module` stays as it is.

    Other adapters on the module (a fake's) are left out. The product is formed in float32 or better.
    """
    layers = {name: (layer, scale) for name, layer, scale in lora_layers(module, adapter)}
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


def without_adapters(module: nn.Module) -> nn.Module:
    """A plain module of the base weights, without the adapters that `module` carries."""
    state = {key.replace(".base_layer.", "."): value.detach().clone() for key, value in module.state_dict().items() if ".lora_" not in key}
    return plain_copy(module, state)
