"""The Wan VAE without its clamp: what `WanPipeline` does between latents and media, but differentiable everywhere.

`AutoencoderKLWan.decode` clamps to [-1, 1], so no gradient passes wherever a video is black or white. The functions here repeat diffusers'
`_encode` and `_decode` (frame by frame, with the causal feature cache) and leave that clamp out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from instep.diffusion.transfer import to_match
from instep.models.borrow import compute_dtype

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


# elements of one sample's latents up to which a graph holds all activations of its decoding; 480 x 832 and 81 frames are 2 million
WHOLE = 2**18


def _statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's latents from its config, [1, C, 1, 1, 1]."""
    mean, std = (to_match(torch.tensor(v), like).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return mean, std


def normalise(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """VAE latents z [B, C, F, H, W] to the unit-scale latents x the transformer sees."""
    mean, std = _statistics(vae, z)
    return (z - mean) / std


def denormalise(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    mean, std = _statistics(vae, x)
    return x * std + mean


def decode_unclamped(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """VAE latents z [B, C, f, h, w] to videos [B, 3, F, H, W], nominally in [-1, 1]; `vae.decode` is this, clamped.

    Gradients flow to z and to the VAE's weights. Tiling and slicing are not used. Where a gradient is needed, the frames of large latents are decoded again in
    the backward pass, one at a time: of each frame the graph then holds the cache that the next one reads, and not its activations.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    vae.clear_cache()
    z, cache = vae.post_quant_conv(z), list(vae._feat_map)

    def decoded(i: int, cache: list[Any]) -> tuple[Tensor, list[Any]]:
        after, first = list(cache), {"first_chunk": True} if i == 0 else {}
        return vae.decoder(z[:, :, i : i + 1], feat_cache=after, feat_idx=[0], **first), after

    recompute = torch.is_grad_enabled() and z.requires_grad and z[0].numel() > WHOLE
    frames = []
    for i in range(z.shape[2]):
        frame, cache = checkpoint(decoded, i, cache, use_reentrant=False, preserve_rng_state=False) if recompute else decoded(i, cache)
        frames.append(frame)
    video = torch.cat(frames, 2)
    return video if vae.config.patch_size is None else unpatchify(video, patch_size=vae.config.patch_size)


def encode_latents(vae: AutoencoderKLWan, media: Tensor) -> Tensor:
    """Media [B, 3, F, H, W] in [0, 1] to normalised latents x [B, C, f, h, w]: the posterior's mean. The VAE works in its own dtype."""
    z = vae.encode((media * 2 - 1).to(compute_dtype(vae))).latent_dist.mode()
    return normalise(vae, z.to(media.dtype))


def decode_latents(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    """Normalised latents x [B, C, f, h, w] to media [B, 3, F, H, W], nominally in [0, 1] but not clamped. The VAE works in its own dtype."""
    return decode_unclamped(vae, denormalise(vae, x).to(compute_dtype(vae))).to(x.dtype) / 2 + 0.5
