"""The VAE: a stock `AutoencoderKLWan` in the Wan 2.2 layout (4x in time, 8x in space), narrow enough for one CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from instep.bundled.digits import PromptSpec, draw, place, random_paths
from instep.core.progress import Progress
from instep.models.wan_vae import decode_unclamped
from pretrain.optim import Average, Optimisers, finite

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


@dataclass(frozen=True)
class VaeConfig:
    """Settings of the VAE's training; from `full_from` of the steps on, whole frames instead of crops of at most `crop` pixels a side and, where
    `first_frames` is below a video's length, of so many frames; `kl` weighs a mean over elements, `squared` the squared error beside the absolute one."""

    steps: int = 1400
    batch: int = 8
    crop: int = 32
    first_frames: int = 9
    full_from: float = 0.8
    muon_lr: float = 0.01
    adam_lr: float = 2e-3
    kl: float = 2e-4
    squared: float = 1.0
    ema: float = 0.995


def build_vae(base: int = 16, patch: int | None = 2) -> AutoencoderKLWan:
    """The untrained VAE of base width `base`: Wan's residual layout, 4x in time and, times the side of a `patch`, in space.

    The posterior starts narrow, otherwise its noise drowns the signal for hundreds of steps.
    """
    from diffusers import AutoencoderKLWan

    side = patch or 1
    vae = AutoencoderKLWan(
        base_dim=base,
        decoder_base_dim=base,
        z_dim=16,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=patch,
        in_channels=3 * side**2,
        out_channels=3 * side**2,
        scale_factor_spatial=4 * side,
        scale_factor_temporal=4,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    with torch.no_grad():
        vae.quant_conv.bias[16:] = -6.0
        vae.quant_conv.weight[16:] *= 0.1
    return vae


def real_videos(n: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Fully random training videos: media [n, 3, 9, 48, 48], digits [n], motions [n]."""
    scans, digits, motions = draw("train", [PromptSpec()] * n, rng)
    frames = place(scans, *random_paths(motions, rng))
    return frames[:, None].expand(-1, 3, -1, -1, -1), digits, motions


def digit_videos(n: int, rng: torch.Generator) -> Tensor:
    """The media of `real_videos`."""
    return real_videos(n, rng)[0]


def train_vae(
    config: VaeConfig, seed: int, build: Callable[[], AutoencoderKLWan] = build_vae, videos: Callable[[int, torch.Generator], Tensor] = digit_videos
) -> AutoencoderKLWan:
    """Trains the VAE that `build` makes on random crops of training videos and, late, on whole frames, then fixes its latents' statistics.

    `videos(n, rng)` draws media [n, 3, F, H, W] in [0, 1].
    """
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed + 1)
    vae = build()
    matrices = [p for p in vae.parameters() if p.ndim >= 4]
    optimisers = Optimisers(matrices, [p for p in vae.parameters() if p.ndim < 4], config.steps, config.muon_lr, config.adam_lr)
    average = Average(vae, config.ema)
    with Progress("vae", config.steps) as progress:
        for step in range(config.steps):
            media = videos(config.batch, rng)
            side, frames = (config.crop, config.first_frames) if step < config.full_from * config.steps else (max(media.shape[-2:]), media.shape[2])
            video = cropped(media, side, frames, rng) * 2 - 1
            posterior = vae.encode(video).latent_dist
            recon = decode_unclamped(vae, posterior.sample())
            error = recon - video
            kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
            loss = error.abs().mean() + config.squared * error.square().mean() + config.kl * kl
            loss.backward()
            optimisers.step(step)
            average.update(vae, step)
            progress.step(loss=finite(loss, "vae", step))
    vae.load_state_dict(average.weights)
    vae.eval().requires_grad_(False)
    return _with_statistics(vae, rng, videos)


def cropped(media: Tensor, side: int, frames: int, rng: torch.Generator) -> Tensor:
    """A random crop of media [B, 3, F, H, W]: at most `side` pixels high and wide, the first `frames` frames."""
    height, width = (min(side, whole) for whole in media.shape[-2:])
    top, left = (int(torch.randint(0, whole - kept + 1, (1,), generator=rng)) for whole, kept in zip(media.shape[-2:], (height, width), strict=True))
    return media[:, :, :frames, top : top + height, left : left + width]


@torch.no_grad()
def _with_statistics(vae: AutoencoderKLWan, rng: torch.Generator, videos: Callable[[int, torch.Generator], Tensor]) -> AutoencoderKLWan:
    """Writes the mean and standard deviation of 512 videos' latents into the config."""
    z = torch.cat([vae.encode(videos(32, rng) * 2 - 1).latent_dist.mode() for _ in range(16)])
    mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, media: Tensor) -> float:
    """Peak signal to noise ratio in dB of media [B, 3, F, H, W] after a round trip (through the stock, clamped decode)."""
    errors = []
    for part in media.split(32):
        out = vae.decode(vae.encode(part * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
        errors.append((out - part).square().mean((1, 2, 3, 4)))
    return float(-10 * torch.cat(errors).mean().log10())
