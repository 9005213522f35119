"""AdamW with moments in 8 bit, by torchao: a byte a number and a float32 scale for every 256 of them (Dettmers et al., arXiv 2110.02861)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# what a moment in 8 bit is made of, in a checkpoint too; `qmap` are the values that the codes stand for
PARTS = ("codes", "scale", "qmap")
BLOCK = 256
# torchao leaves smaller tensors in float32, and those that are no whole number of blocks
LEAST = 4096
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether it has a sign


def check_installed() -> None:
    """Raises ValueError if torchao is absent."""
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("moments: 8bit needs torchao, which is not installed; run: pip install 'instep[lowbit]', or leave the option out")


def adamw8bit(parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    """torchao's AdamW. It compiles its step for every shape of a parameter, at its first step."""
    check_installed()
    from torchao.optim import AdamW8bit

    return AdamW8bit(list(parameters), lr=lr, betas=betas, weight_decay=weight_decay, block_size=BLOCK)


def is_low_bit(optimizer: torch.optim.Optimizer) -> bool:
    return hasattr(optimizer, "bf16_stochastic_round")


def in_8_bit(p: Tensor) -> bool:
    """Whether torchao keeps the moments of this parameter in 8 bit."""
    return p.numel() >= LEAST and p.numel() % BLOCK == 0


def parts_of(moment: Tensor) -> dict[str, Tensor] | None:
    """The plain tensors of a moment in 8 bit; None for any other tensor."""
    return {name: getattr(moment, name) for name in PARTS} if all(hasattr(moment, name) for name in PARTS) else None


def plain(value: Any) -> Any:
    """A moment in 8 bit as its plain tensors by name; anything else as it is."""
    return (parts_of(value) or value) if isinstance(value, Tensor) else value


def moment_of(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The inverse of `parts_of`, of the moment of that name."""
    check_installed()
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(*(parts[part] for part in PARTS), MOMENTS[name], dtype=torch.float32)


def empty_moments(p: Tensor) -> dict[str, Any]:
    """The moments of a parameter before the first step, as plain tensors on its device: what they take."""
    if not in_8_bit(p):
        return {name: torch.zeros_like(p) for name in MOMENTS}
    sizes = {"codes": (p.shape, torch.uint8), "scale": ((p.numel() // BLOCK,), torch.float32), "qmap": ((256,), torch.float32)}
    return {name: {part: torch.zeros(shape, dtype=dtype, device=p.device) for part, (shape, dtype) in sizes.items()} for name in MOMENTS}
