"""PEFT adapters on a diffusers network: which layers they touch, and merging one into plain weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Weight:
    """One tensor of a plain network: `base` as it is, or with `scale` times b @ a of an adapter added; `parameter`: whether it is one, not a buffer."""

    base: Tensor
    parameter: bool
    lora: tuple[Tensor, Tensor, float] | None = None

    @torch.no_grad()
    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in `dtype` (None: that of `base`): `base` itself if nothing changes it. A merge is computed in float32 or better, and then rounded."""
        if self.lora is None:
            return self.base if dtype is None else self.base.to(dtype)
        a, b, scale = self.lora
        wide = torch.promote_types(torch.float32, self.base.dtype)
        # in place: a copy of the tensor and the product are all that is alive
        return (b.to(wide) @ a.to(wide)).mul_(scale).add_(self.base).to(dtype or self.base.dtype)


def plain_weights(module: nn.Module, adapter: str | None = None) -> dict[str, Weight]:
    """The weights of a network without LoRA layers, under its own class's names; with `adapter`, of the network that has it merged. Nothing is copied.

    A part of a network that lacks `adapter` has its base weights, as have the layers of other adapters (a fake's). Raises ValueError for a module that
    carries LoRA layers where no adapter is named, and for an adapter that is not plain LoRA.
    """
    layers = {name: (layer, scale) for name, layer, scale in lora_layers(module, adapter)} if adapter and has_adapter(module, adapter) else {}
    parameters = {key for key, _ in module.named_parameters(remove_duplicate=False)}
    weights = {}
    for key, value in module.state_dict().items():
        if ".lora_" in key:
            if adapter is None:
                raise ValueError("network: it carries LoRA layers, which are not weights of a pipeline; name the adapter to merge, adapter=")
            continue
        owner, _, leaf = key.rpartition(".base_layer.")
        lora = None
        if owner in layers and leaf == "weight":
            layer, scale = layers[owner]
            lora = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach(), scale
        weights[f"{owner}.{leaf}" if owner else key] = Weight(value.detach(), key in parameters, lora)
    return weights


def plain_network(module: Any, adapter: str | None = None) -> nn.Module:
    """A network of the same class and configuration with `plain_weights`: no hooks, stock attention processors, eval mode, frozen.

    It shares every tensor with `module` but those that the adapter changes. It is not a deepcopy, because a backbone in training carries hooks.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        plain = type(module).from_config(module.config)
    state = {key: weight.value() for key, weight in plain_weights(module, adapter).items()}
    plain.load_state_dict(state, assign=True)
    # the buffers that no state holds (rotary frequencies) were made on the CPU
    return plain.eval().requires_grad_(False).to(next(iter(state.values())).device)


def merge_lora(module: nn.Module, adapter: str = "student") -> nn.Module:
    """A plain network with W + (alpha / r) B A in place of the adapted W, in W's dtype; `module` stays as it is.

    Raises ValueError if the adapter is not there or is not plain LoRA.
    """
    for _ in lora_layers(module, adapter):
        pass
    return plain_network(module, adapter)
