"""The parts of the moving-words pipeline before training: a 4x VAE, a tokenizer with a token for each letter, a frozen text encoder that tells places, a transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from instep.bundled.glyphs import FONTS, LETTERS
from instep.bundled.words import DIRECTIONS, LENGTH, SIZES, SPEEDS, Spec, draw, random_words

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

VOCABULARY = ("<pad>", "</s>", "<unk>", *LETTERS, "the", "word", "in", "letters", "moving", "standing", "still", *DIRECTIONS, *SPEEDS, *SIZES, *FONTS)


def build_words_vae() -> AutoencoderKLWan:
    """The untrained VAE: Wan's residual layout, 4x in time and in space, base width 8; the posterior starts narrow, otherwise its noise drowns the signal."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=16,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        is_residual=True,
        scale_factor_spatial=4,
        scale_factor_temporal=4,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    with torch.no_grad():
        vae.quant_conv.bias[16:] = -6.0
        vae.quant_conv.weight[16:] *= 0.1
    return vae


def word_videos(n: int, rng: torch.Generator) -> Tensor:
    """Fully random training videos: media [n, 3, 9, 32, 64] in [0, 1]."""
    return draw([Spec(word) for word in random_words("train", n, rng)], rng).media
