"""Classifier-free guidance and skip-layer guidance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from instep.diffusion.path import broadcast
from instep.diffusion.prediction import Condition, Denoiser, Prediction


@dataclass(frozen=True)
class Guided:
    """A guided prediction and its two parts, all x0 [B, ...]. `uncond` is `cond` where no guidance was asked for."""

    x0: Tensor
    cond: Tensor
    uncond: Tensor


def guide(cond: Tensor, uncond: Tensor, w: float | Tensor) -> Tensor:
    """Classifier-free guidance u + w (c - u); w = 1 means none (Ho and Salimans 2022)."""
    return uncond + w * (cond - uncond)


def guide_and_skip(cond: Tensor, uncond: Tensor, skipped: Tensor, w: float | Tensor, skip_scale: float | Tensor) -> Tensor:
    """Classifier-free and skip-layer guidance together, u + w (c - u) + skip_scale (c - skipped) (Diffusion-APO Eq. 3; STG, Hyung et al. 2025).

    The paper's omega is w - 1, its lambda `skip_scale`; it prints the skipped prediction's term alone, which is read as STG's own difference.
    Linear, so it holds for x0, velocity and noise alike. Scales are numbers, or tensors that broadcast against the predictions.
    """
    return guide(cond, uncond, w) + skip_scale * (cond - skipped)


@dataclass(frozen=True)
class GuidedDenoiser:
    """A denoiser with classifier-free guidance built in: two evaluations a sample, in one call. `null` has one row for each row it is called with."""

    denoiser: Denoiser
    null: Condition
    guidance: float

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.stack(self.null))
        (c, u), (vc, vu) = both.x0.chunk(2), both.v.chunk(2)
        return Prediction(guide(c, u, self.guidance), guide(vc, vu, self.guidance))


@dataclass(frozen=True)
class GuidanceByLevel:
    """Guidance of a model of two experts: `scale` at levels from `boundary` up, `scale_2` below it (diffusers' guidance_scale and guidance_scale_2)."""

    scale: float
    scale_2: float
    boundary: float

    def at(self, t: Tensor) -> Tensor:
        """The scale of each level, [B] -> [B]."""
        return torch.where(t >= self.boundary, self.scale, self.scale_2)


def by_level(guidance: float, guidance_2: float | None, boundary: float | None) -> float | GuidanceByLevel:
    """One scale for all levels, unless a model of two experts has a second one."""
    return guidance if boundary is None or guidance_2 in (None, guidance) else GuidanceByLevel(guidance, float(guidance_2), boundary)  # type: ignore[arg-type]


def scale_at(w: float | GuidanceByLevel, t: Tensor, like: Tensor) -> float | Tensor:
    """The scale at levels t [B], shaped to multiply `like` [B, ...]; a number where it is the same at all levels."""
    return w if isinstance(w, int | float) else broadcast(w.at(t), like)


def predict_guided(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Condition, null: Condition, w: float | GuidanceByLevel) -> Guided:
    """Conditional and unconditional prediction in one stacked call of 2 B samples (one of B if w = 1)."""
    if w == 1:
        x0 = denoiser(x_t, t, cond).x0
        return Guided(x0, x0, x0)
    both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.stack(null)).x0
    c, u = both.chunk(2)
    return Guided(guide(c, u, scale_at(w, t, c)), c, u)
