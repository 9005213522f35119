"""Training of the three classifiers, each on its own scans, deformed, blurred, noisy and partly through the VAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from instep.bundled.classifiers import ARCHITECTURES, Classifier, ClassifierName
from instep.bundled.digits import MOTIONS, PromptSpec, Split, draw, motion_spec, place, random_paths, render
from instep.core.progress import Progress
from instep.models.wan_vae import decode_latents, encode_latents
from pretrain.optim import Average, Optimisers, finite

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

SPLITS: dict[ClassifierName, Split] = {"training": "train", "monitor": "monitor", "heldout": "heldout"}


@dataclass(frozen=True)
class ClassifierConfig:
    """Settings of one classifier's training; `smoothing` of the labels keeps the training classifier from saturating as a reward."""

    name: ClassifierName
    seed: int
    steps: int = 900
    batch: int = 64
    pool: int = 1536
    lr: float = 3e-3
    muon_lr: float = 0.01
    smoothing: float = 0.05
    ema: float = 0.99


CLASSIFIERS = (
    ClassifierConfig("training", 101, steps=2000, smoothing=0.1),
    ClassifierConfig("monitor", 202, steps=700),
    ClassifierConfig("heldout", 303, steps=700),
)


def deformations(n: int, rng: torch.Generator) -> Tensor:
    """Random small affine maps [n, 2, 2]: rotation of 10 degrees, scale and aspect 10 %, shear .15 (standard deviations or half ranges)."""
    u = torch.rand(4, n, generator=rng) * 2 - 1
    angle, stretch, aspect, shear = u[0] * 0.25, (u[1] * 0.12).exp(), (u[2] * 0.1).exp(), u[3] * 0.2
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    zeros = torch.zeros(n)
    scaling = torch.stack([stretch * aspect, shear, zeros, stretch / aspect], 1).view(n, 2, 2)
    return rotation @ scaling


def deformed_videos(split: Split, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random videos of deformed scans: frames [n, 9, 48, 48], digits [n], motions [n]."""
    scans, digits, motions = draw(split, [PromptSpec()] * n, rng)
    return place(scans, *random_paths(motions, rng), deformations(n, rng)), digits, motions


@torch.no_grad()
def decoded_pool(vae: AutoencoderKLWan, split: Split, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Videos after the VAE's round trip, their latents disturbed by up to .35 standard deviations, as a generator's would be."""
    parts = []
    for _ in range(n // 64):
        frames, digits, motions = deformed_videos(split, 64, rng)
        x = encode_latents(vae, frames[:, None].expand(-1, 3, -1, -1, -1))
        noise = torch.randn(x.shape, generator=rng) * torch.rand(64, 1, 1, 1, 1, generator=rng) * 0.35
        parts.append((decode_latents(vae, x + noise).mean(1), digits, motions))
    frames, digits, motions = (torch.cat(p) for p in zip(*parts, strict=True))
    return frames, digits, motions


def disturbed(frames: Tensor, rng: torch.Generator) -> Tensor:
    """Contrast 10 %, blur for a third of the videos, and white noise of up to .08."""
    n = len(frames)
    blurred = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, 1)
    weight = (torch.rand(n, 1, 1, 1, generator=rng) * 3 - 2).clamp(min=0)
    gain = 1 + 0.15 * (torch.rand(n, 1, 1, 1, generator=rng) * 2 - 1)
    noise = torch.randn(frames.shape, generator=rng) * torch.rand(n, 1, 1, 1, generator=rng) * 0.08
    return gain * torch.lerp(frames, blurred, weight) + noise


def train_classifier(config: ClassifierConfig, vae: AutoencoderKLWan, seed: int) -> Classifier:
    """One classifier; half of every batch comes from fresh renderings, half through the VAE."""
    torch.manual_seed(seed + config.seed)
    rng = torch.Generator().manual_seed(seed + config.seed)
    net, split, half = ARCHITECTURES[config.name](), SPLITS[config.name], config.batch // 2
    pool = decoded_pool(vae, split, config.pool, rng)
    params = dict(net.named_parameters())
    matrices = [p for n, p in params.items() if p.ndim >= 3]
    optimisers = Optimisers(matrices, [p for p in params.values() if p.ndim < 3], config.steps, config.muon_lr, config.lr)
    average = Average(net, config.ema)
    with Progress(f"classifier {config.name}", config.steps) as progress:
        for step in range(config.steps):
            index = torch.randint(0, config.pool, (half,), generator=rng)
            fresh = deformed_videos(split, half, rng)
            frames, digits, motions = (torch.cat([a, b[index]]) for a, b in zip(fresh, pool, strict=True))
            digit, motion = net(disturbed(frames, rng))
            loss = F.cross_entropy(digit, digits, label_smoothing=config.smoothing) + F.cross_entropy(motion, motions, label_smoothing=config.smoothing)
            loss.backward()
            optimisers.step(step)
            average.update(net, step)
            progress.step(loss=finite(loss, config.name, step))
    net.load_state_dict({k: v.half().float() for k, v in average.weights.items()})
    return Classifier(config.name, net, {})


@torch.no_grad()
def accuracy(classifier: Classifier, media: Tensor, prompts: list[str]) -> dict[str, float]:
    """Shares of digit, motion and both right."""
    hits = [classifier.correct(part, prompts[i * 128 : i * 128 + 128]) for i, part in enumerate(media.split(128))]
    return {k: round(torch.cat([getattr(h, k) for h in hits]).float().mean().item(), 4) for k in ("digit", "motion", "both")}


def reference_videos(n: int, seed: int) -> tuple[Tensor, list[PromptSpec]]:
    """n real videos of reference scans, digits and motions in turn, with their full specs."""
    specs = [motion_spec(i % 10, i // 10 % len(MOTIONS)) for i in range(n)]
    return render("reference", specs, seed), specs
