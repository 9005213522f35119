"""Adapters that a lent pipeline carries (style LoRAs): merged into the networks that are trained on, and named in the records of what is made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Style:
    """An adapter inside a model: its name on the pipeline, the parts of the pipeline that it changes, and its strength there, [lowest, highest] over the
    layers (1: as it was trained)."""

    name: str
    parts: tuple[str, ...]
    scale: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.scale
        return f"{self.name} at {low:g}{'' if low == high else f' to {high:g}'} ({', '.join(self.parts)})"

    def json(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def of_json(cls, record: Mapping[str, Any]) -> Style:
        low, high = record["scale"]
        return cls(str(record["name"]), tuple(record["parts"]), (float(low), float(high)))


def styles_of(pipe: Any) -> tuple[Style, ...]:
    """The adapters that a pipeline samples with, fused ones included; none for those that are loaded and not active.

    Adapters that were fused and then unloaded are plain weights, which nobody can tell from others.
    """
    found: dict[str, tuple[list[str], list[float]]] = {}
    for part, network in pipe.components.items():
        for layer in _layers(network) if isinstance(network, nn.Module) else ():
            for name in _inside(layer):
                parts, scales = found.setdefault(name, ([], []))
                parts += [] if part in parts else [part]
                scales.append(_scale(layer, name))
    return tuple(Style(name, tuple(parts), (min(scales), max(scales))) for name, (parts, scales) in found.items())


@torch.no_grad()
def merge_adapters(network: nn.Module) -> None:
    """Puts plain layers in place of adapted ones: the network computes what it did, without adapters. Weights that an adapter changes become new tensors, so
    that a network which shares them stays as it is; the merge is computed in float32 or better, and then rounded.

    Raises ValueError for what PEFT puts into a network besides adapters on layers.
    """
    layers = {name: layer for name, layer in network.named_modules() if _is_adapted(layer)}
    for name, layer in layers.items():
        owner, _, last = name.rpartition(".")
        network.get_submodule(owner)._modules[last] = _merged(layer)
    if left := next((name for name, part in network.named_modules() if type(part).__module__.startswith("peft.")), None):
        raise ValueError(
            f"pipeline: {left!r} of its {type(network).__name__} is wrapped by PEFT in another way than by adapters on layers (modules_to_save); merge it with "
            "PEFT's merge_and_unload, save the pipeline, and load it again"
        )
    if layers:
        vars(network).pop("peft_config", None)
        vars(network).pop("_hf_peft_config_loaded", None)


def _merged(layer: Any) -> nn.Module:
    """The base layer with what the adapted one samples with added to its weights; itself if that is nothing."""
    base: nn.Module = layer.get_base_layer()
    fused = bool(layer.merged)
    if fused != layer.disable_adapters or not (fused or _inside(layer)):  # fused and in use, or neither
        return base
    own = {id(p) for p in base.parameters()}
    dtypes = {name: p.dtype for name, p in base.named_parameters()}
    for p in layer.parameters():
        wide = torch.promote_types(torch.float32, p.dtype) if p.is_floating_point() else p.dtype
        p.data = p.data.to(wide, copy=id(p) in own)
    if fused:
        layer.unmerge()
    else:
        layer.merge(adapter_names=_inside(layer))
    for name, p in base.named_parameters():
        p.data = p.data.to(dtypes[name])
    return base


def _inside(layer: Any) -> list[str]:
    """The adapters that a layer computes with."""
    if layer.disable_adapters:
        return []
    return list(layer.merged_adapters) if layer.merged else [name for name in layer.active_adapters if name in layer.scaling]


def _scale(layer: Any, name: str) -> float:
    """The strength of an adapter on a layer: its present scaling over the one that it was trained at."""
    rank = layer.r[name] ** (0.5 if getattr(layer, "use_rslora", {}).get(name) else 1)
    return round(float(layer.scaling[name] * rank / layer.lora_alpha[name]), 6)


def _layers(network: nn.Module) -> Iterator[Any]:
    return (layer for layer in network.modules() if _is_adapted(layer))


def _is_adapted(layer: nn.Module) -> bool:
    """Whether it is a layer with LoRA; PEFT is imported only where there may be some."""
    if not type(layer).__module__.startswith("peft."):
        return False
    from peft.tuners.lora.layer import LoraLayer

    return isinstance(layer, LoraLayer)
