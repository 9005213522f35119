"""A Wan transformer with random weights, of any size: what the cost of training depends on. It needs diffusers alone, not this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import WanTransformer3DModel

TEXT_WIDTH = 32


def random_transformer(width: int, layers: int, latent: Sequence[int]) -> Any:
    """Returns the frozen transformer of `layers` blocks of `width` (a multiple of 32) for latents [C, F, H, W]; the weights are always the same."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=width // 32,
        attention_head_dim=32,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=4 * width,
        num_layers=layers,
        in_channels=latent[0],
        out_channels=latent[0],
    )
    return transformer.eval().requires_grad_(False)
