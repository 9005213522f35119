"""Networks that are lent: used, moved and adapted, and given back as they were, because the original is never touched."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from instep.models.styles import merge_adapters

M = TypeVar("M", bound=nn.Module)


def borrowed(module: M) -> M:
    """A module of its own around the same parameters and buffers, frozen and in eval mode.

    It takes no memory. What is attached to it (adapters, hooks, attention processors) and where it is moved to leave the original as it was.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    memo |= {id(b): b.detach() for b in module.buffers()}
    return copy.deepcopy(module, memo).eval()


def borrowed_pipeline(pipe: Any) -> Any:
    """A diffusers pipeline around borrowed networks and a copy of the scheduler; tokenizers and processors are shared.

    Adapters that the pipeline samples with are merged into networks of its own (`models/styles.py`), which costs the memory of the weights that they change.
    Raises ValueError for a pipeline with hooks, whose networks move or cast themselves, and for networks that are wrapped.
    """
    other = copy.copy(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            if wrapped := _wrapped(part, name):
                raise ValueError(f"pipeline: its {name} is wrapped by {wrapped}")
            if what := _hooked(part):
                raise ValueError(
                    f"pipeline: its {name} is moved or cast by hooks ({what}), under which no training is possible; load the pipeline without them, and let "
                    "the run place it (device, offload, dtype)"
                )
            own = borrowed(part)
            merge_adapters(own)
            object.__setattr__(other, name, own)
    if getattr(pipe, "scheduler", None) is not None:
        object.__setattr__(other, "scheduler", copy.deepcopy(pipe.scheduler))
    return other


def _wrapped(network: Any, name: str) -> str:
    """What wraps a network, and how it is taken off; empty: nothing."""
    if hasattr(network, "_orig_mod"):
        return f"torch.compile; give it as it was, pipe.{name} = pipe.{name}._orig_mod, and let the run compile it (compile=True)"
    if any(getattr(part, "_compiled_call_impl", None) is not None for part in network.modules()):
        return "torch.compile, in place; load the pipeline again and let the run compile it (compile=True)"
    kind = type(network)
    if kind.__module__.startswith("torch.nn.parallel"):
        return f"{kind.__name__}; give it as it was, pipe.{name} = pipe.{name}.module: processes that torchrun starts share a batch without it"
    if kind.__module__.startswith("torch.distributed") or any(type(p).__name__ == "DTensor" for p in network.parameters()):
        return f"{kind.__name__}, which shards it; load the pipeline again, whole"
    if kind.__module__.startswith("peft."):
        return f"PEFT's {kind.__name__}; merge it, pipe.{name} = pipe.{name}.merge_and_unload(), or load the adapter with pipe.load_lora_weights"
    return ""


def _hooked(network: nn.Module) -> str:
    """What moves or casts a network, or a part of it, in each call; empty: nothing."""
    for part in network.modules():
        if hasattr(part, "_hf_hook"):
            return "enable_model_cpu_offload, enable_sequential_cpu_offload or a device_map"
        registry = getattr(part, "_diffusers_hook", None)
        if registry is not None and (names := list(registry.hooks)):
            return f"diffusers' {', '.join(names)}"
    return ""


@contextmanager
def visiting(modules: Iterable[nn.Module], device: torch.device | str) -> Iterator[None]:
    """Networks on `device` for as long as the context lasts; then they are where they were, without having been copied back."""
    target = torch.device(device)
    held: list[tuple[dict[str, Any], ...]] = [(part._parameters, part._buffers) for module in modules for part in module.modules()]
    home = [(store, name, p) for stores in held for store in stores for name, p in store.items() if p is not None and p.device != target]
    for store, name, p in home:
        # a tensor of its own: a graph made meanwhile keeps it, and finds it on the device in its backward pass
        moved = p.detach().to(target, non_blocking=target.type != "cpu")
        store[name] = nn.Parameter(moved, requires_grad=p.requires_grad) if isinstance(p, nn.Parameter) else moved
    try:
        yield
    finally:
        for store, name, p in home:
            store[name] = p


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a network computes in: that of most of its parameters. diffusers keeps some (`_keep_in_fp32_modules`) in float32 whatever the rest is."""
    counts: Counter[torch.dtype] = Counter()
    for p in module.parameters():
        if p.is_floating_point():
            counts[p.dtype] += p.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


@torch.no_grad()
def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts a network in place; what diffusers keeps in float32 when it loads one stays in float32."""
    kept = {id(p) for part in module.modules() for name, p in tensors_of(part).items() if in_float32(name, float32_parts(part))}
    for p in tensors_of(module).values():
        if p.is_floating_point():
            p.data = p.data.to(torch.float32 if id(p) in kept and dtype != torch.float64 else dtype)


def float32_parts(network: Any) -> tuple[str, ...]:
    """The parts of names whose tensors diffusers and transformers keep in float32, of a network or its class."""
    return tuple(getattr(network, "_keep_in_fp32_modules", None) or ())


def in_float32(name: str, parts: Sequence[str]) -> bool:
    """Whether a tensor of this name is kept in float32 (`float32_parts`)."""
    return any(part in name.split(".") for part in parts)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
