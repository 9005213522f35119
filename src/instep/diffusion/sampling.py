"""Sampling: one loop along a list of levels, and the samplers that are made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from instep.diffusion.guidance import GuidanceByLevel, predict_guided
from instep.diffusion.guidance_scales import GuidanceScales
from instep.diffusion.levels import shift_level
from instep.diffusion.noise import Rng, randn
from instep.diffusion.path import Path
from instep.diffusion.prediction import Condition, Denoiser
from instep.diffusion.transitions import Deterministic, Renoise, Transition


@dataclass(frozen=True)
class Step:
    """One step of the loop: samples x_t [B, ...] at level t [B], on their way to t_next [B] (None at the last level); levels are on the host."""

    index: int
    x_t: Tensor
    t: Tensor
    t_next: Tensor | None


Predict = Callable[[Step], Tensor]  # the x0 [B, ...] predicted from a step
Callback = Callable[[Step, Tensor, Tensor], None]  # called with a step, its x0 and the samples at the next level (x0 itself after the last)


def sample(
    predict: Predict,
    noise: Tensor,
    levels: Sequence[float] | Tensor,
    path: Path,
    transition: Transition,
    rng: Rng | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Runs the sampling loop, noise [B, ...] -> x0 [B, ...]: predicts x0 at each of `levels` and goes to the next one by `transition`.

    The step after the last level is the x0 predicted there. Each transition takes fresh noise from `rng`, drawn for the whole batch; with `rng` None it is
    deterministic and takes its mean. Gradients flow through whatever `predict` returns.
    """
    x_t, last = noise, len(levels) - 1
    for j, level in enumerate(levels):
        t = torch.full((len(noise),), float(level), dtype=noise.dtype)
        t_next = torch.full((len(noise),), float(levels[j + 1]), dtype=noise.dtype) if j < last else None
        step = Step(j, x_t, t, t_next)
        x0 = predict(step)
        if t_next is None:
            x_t = x0
        elif rng is None:
            x_t, _ = transition.gaussian(path, x0, x_t, t, t_next)
        else:
            fresh = randn(noise.shape, rng, noise.device, noise.dtype)
            x_t = transition.step(path, x0, x_t, fresh, t, t_next)
        if callback is not None:
            callback(step, x0, x_t)
    return x_t


@torch.no_grad()
def sample_few_step(
    denoiser: Denoiser,
    cond: Condition,
    noise: Tensor,
    levels: Sequence[float],
    path: Path,
    rng: Rng,
    callback: Callback | None = None,
) -> Tensor:
    """Samples a few-step student, noise [B, ...] -> x0 [B, ...]: predicts x0 and re-noises it to the next level; one evaluation a level."""
    return sample(lambda step: denoiser(step.x_t, step.t, cond).x0, noise, levels, path, Renoise(), rng, callback)


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
    guidance: float | GuidanceByLevel = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """Samples the probability-flow ODE, noise [B, ...] -> x0 [B, ...]; `steps` evaluations, twice that if guidance is not 1.

    From level t to s the predicted x0 and eps are kept and re-mixed, x_s = a(s) x0 + b(s) eps: DDIM (eta = 0) on any path, which
    on the rectified flow is the Euler step of the probability-flow ODE. The levels are uniform, then shifted.
    """
    levels = shift_level(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
    return _deterministic(denoiser, cond, null, noise, levels[:-1], path, guidance, callback)


def _deterministic(
    denoiser: Denoiser,
    cond: Condition,
    null: Condition,
    noise: Tensor,
    levels: Sequence[float] | Tensor,
    path: Path,
    guidance: float | GuidanceByLevel,
    callback: Callback | None = None,
) -> Tensor:
    """Guided deterministic sampling along `levels`, then to a clean sample."""

    def predict(step: Step) -> Tensor:
        return predict_guided(denoiser, step.x_t, step.t, cond, null, guidance).x0

    return sample(predict, noise, levels, path, Deterministic(), callback=callback)


@dataclass(frozen=True)
class Sampling:
    """How a student is sampled: `few-step` at its levels (predict x0, re-noise), or a many-step one by its model's own deterministic sampler
    (`ode`) at those levels, with `guidance`. A student that is conditioned on `guidance_scales` (`diffusion/guidance_scales.py`) needs none."""

    levels: tuple[float, ...]
    kind: Literal["few-step", "ode"] = "few-step"
    guidance: float = 1.0
    guidance_scales: GuidanceScales | None = None

    def __post_init__(self) -> None:
        if self.guidance_scales is not None and (self.kind != "ode" or self.guidance != 1):
            raise ValueError(
                f"guidance_scales: {self.guidance_scales} are not allowed for a {self.kind} sampler with guidance {self.guidance:g}, which ignores them; "
                "use the ode sampler with guidance 1"
            )

    def conditioned(self, cond: Condition) -> Condition:
        """The condition as the student gets it."""
        return cond if self.guidance_scales is None else cond.with_guidance(self.guidance_scales)

    @torch.no_grad()
    def __call__(self, student: Denoiser, cond: Condition, null: Condition, noise: Tensor, path: Path, rng: Rng, callback: Callback | None = None) -> Tensor:
        """Samples, noise [B, ...] -> x0 [B, ...]."""
        cond = self.conditioned(cond)
        if self.kind == "few-step":
            return sample_few_step(student, cond, noise, self.levels, path, rng, callback)
        return _deterministic(student, cond, null, noise, self.levels, path, self.guidance, callback)
