"""Sampling: the few-step sampler, the many-step ODE sampler, and how a student is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from instep.diffusion.guidance import predict_guided
from instep.diffusion.guidance_scales import GuidanceScales
from instep.diffusion.levels import shift_level
from instep.diffusion.path import Path
from instep.diffusion.prediction import Condition, Denoiser
from instep.diffusion.transitions import Deterministic


@torch.no_grad()
def sample_few_step(denoiser: Denoiser, cond: Condition, noise: Tensor, levels: Sequence[float], path: Path, rng: torch.Generator) -> Tensor:
    """Few-step sampling: predict x0, re-noise to the next level, ...; noise [B, ...] -> x0 [B, ...]; one evaluation a level."""
    x_t = x0 = noise
    for j, level in enumerate(levels):
        t = noise.new_full((len(noise),), level)
        x0 = denoiser(x_t, t, cond).x0
        if j + 1 < len(levels):
            fresh = torch.randn(noise.shape, generator=rng, device=rng.device, dtype=noise.dtype)
            x_t = path.renoise(x0, fresh, noise.new_full((len(noise),), levels[j + 1]))
    return x0


@torch.no_grad()
def sample_ode(
    denoiser: Denoiser,
    cond: Condition,
    null: Condition,
    noise: Tensor,
    *,
    steps: int,
    path: Path,
    shift: float = 1.0,
    guidance: float = 1.0,
) -> Tensor:
    """Deterministic many-step sampling, noise [B, ...] -> x0 [B, ...]; steps evaluations, twice that if guidance is not 1.

    From level t to s the predicted x0 and eps are kept and re-mixed, x_s = a(s) x0 + b(s) eps: DDIM (eta = 0) on any path, which
    on the rectified flow is the Euler step of the probability-flow ODE. The levels are uniform, then shifted.
    """
    levels = shift_level(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
    return _along(denoiser, cond, null, noise, levels, path, guidance)


def _along(denoiser: Denoiser, cond: Condition, null: Condition, noise: Tensor, levels: Tensor, path: Path, guidance: float) -> Tensor:
    """Deterministic sampling along `levels` [S + 1], 1 to 0."""
    levels = levels.to(noise)
    x_t = noise
    for j in range(len(levels) - 1):
        t, s = levels[j].expand(len(noise)), levels[j + 1].expand(len(noise))
        x0 = predict_guided(denoiser, x_t, t, cond, null, guidance).x0
        x_t, _ = Deterministic().gaussian(path, x0, x_t, t, s)
    return x_t


@dataclass(frozen=True)
class Sampling:
    """How a student is sampled: `few-step` at its levels (predict x0, re-noise), or a many-step one by its model's own deterministic sampler
    (`ode`) at those levels, with `guidance`; one that is told `guidance_scales` (`diffusion/guidance_scales.py`) needs none."""

    levels: tuple[float, ...]
    kind: Literal["few-step", "ode"] = "few-step"
    guidance: float = 1.0
    guidance_scales: GuidanceScales | None = None

    def __post_init__(self) -> None:
        if self.guidance_scales is not None and (self.kind != "ode" or self.guidance != 1):
            raise ValueError(
                f"guidance_scales: {self.guidance_scales} are not allowed for a {self.kind} sampler with guidance {self.guidance:g}; it would not hear them"
            )

    def conditioned(self, cond: Condition) -> Condition:
        """The condition as the student gets it."""
        return cond if self.guidance_scales is None else cond.with_guidance(self.guidance_scales)

    @torch.no_grad()
    def __call__(self, student: Denoiser, cond: Condition, null: Condition, noise: Tensor, path: Path, rng: torch.Generator) -> Tensor:
        """noise [B, ...] -> x0 [B, ...]."""
        cond = self.conditioned(cond)
        if self.kind == "few-step":
            return sample_few_step(student, cond, noise, self.levels, path, rng)
        return _along(student, cond, null, noise, torch.tensor([*self.levels, 0.0], dtype=torch.float64), path, self.guidance)
