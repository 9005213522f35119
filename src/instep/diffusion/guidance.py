"""Classifier-free guidance and skip-layer guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

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


class GuidanceRule(Protocol):
    """How a model is guided: of its conditional and unconditional prediction [B, ...] at levels t [B] the guided one. `w` is a scale, or a tensor that
    broadcasts against the predictions; w = 1 gives the conditional prediction back.
    """

    def __call__(self, t: Tensor, cond: Prediction, uncond: Prediction, w: float | Tensor) -> Prediction: ...


@runtime_checkable
class OwnGuidance(Protocol):
    """A denoiser with a guidance rule of its own; None: classifier-free guidance."""

    @property
    def guidance_rule(self) -> GuidanceRule | None: ...


def guided_by(denoiser: Denoiser, t: Tensor, cond: Prediction, uncond: Prediction, w: float | Tensor) -> Prediction:
    """The guided prediction by the denoiser's own rule, or by classifier-free guidance where it has none."""
    rule = denoiser.guidance_rule if isinstance(denoiser, OwnGuidance) else None
    return Prediction(guide(cond.x0, uncond.x0, w), guide(cond.v, uncond.v, w)) if rule is None else rule(t, cond, uncond, w)


@dataclass(frozen=True)
class RescaledGuidance:
    """Classifier-free guidance of the velocity on the rectified flow, at the conditional velocity's norm: v = g |c| / |g| with g = u + w (c - u) (diffusers'
    QwenImagePipeline). Norms are those of the `patch` x `patch` latents, all channels together, that make one token. Predictions are [B, C, H, W].
    """

    patch: int

    def __call__(self, t: Tensor, cond: Prediction, uncond: Prediction, w: float | Tensor) -> Prediction:
        g = guide(cond.v, uncond.v, w)
        # a velocity of zero stays zero
        ratio = self._norms(cond.v) / self._norms(g).clamp(min=torch.finfo(g.dtype).tiny)
        v = g * ratio.repeat_interleave(self.patch, -2).repeat_interleave(self.patch, -1)
        return Prediction(cond.x0 + broadcast(t, v) * (cond.v - v), v)

    def _norms(self, v: Tensor) -> Tensor:
        """Of each token, [B, 1, H / patch, W / patch]."""
        return (nn.functional.avg_pool2d(v.square().sum(1, keepdim=True), self.patch) * self.patch**2).sqrt()


def skip_layers(guided: Tensor, cond: Tensor, skipped: Tensor, skip_scale: float | Tensor) -> Tensor:
    """Skip-layer guidance on top of a guided prediction, guided + skip_scale (c - skipped) (Diffusion-APO Eq. 3; STG, Hyung et al. 2025).

    The paper's omega is w - 1, its lambda `skip_scale`; it prints the skipped prediction's term alone, which is read as STG's own difference.
    Linear, so it holds for x0, velocity and noise alike. Scales are numbers, or tensors that broadcast against the predictions.
    """
    return guided + skip_scale * (cond - skipped)


@dataclass(frozen=True)
class GuidedDenoiser:
    """A denoiser with classifier-free guidance built in: two evaluations a sample, in one call. `null` has one row for each row it is called with."""

    denoiser: Denoiser
    null: Condition
    guidance: float

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.stack(self.null))
        return guided_by(self.denoiser, t, *halves(both), self.guidance)


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


def halves(both: Prediction) -> tuple[Prediction, Prediction]:
    """The predictions of both halves of a batch, without logits."""
    (a, b), (va, vb) = both.x0.chunk(2), both.v.chunk(2)
    return Prediction(a, va), Prediction(b, vb)


def scale_at(w: float | GuidanceByLevel, t: Tensor, like: Tensor) -> float | Tensor:
    """The scale at levels t [B], shaped to multiply `like` [B, ...]; a number where it is the same at all levels."""
    return w if isinstance(w, int | float) else broadcast(w.at(t), like)


def predict_guided(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Condition, null: Condition, w: float | GuidanceByLevel) -> Guided:
    """Conditional and unconditional prediction in one stacked call of 2 B samples (one of B if w = 1)."""
    if w == 1:
        x0 = denoiser(x_t, t, cond).x0
        return Guided(x0, x0, x0)
    c, u = halves(denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.stack(null)))
    return Guided(guided_by(denoiser, t, c, u, scale_at(w, t, x_t)).x0, c.x0, u.x0)
