"""From what a network outputs to x0, noise, velocity and score, on any path; and guidance.

*Velocity* is the conjugate (rectified-flow) one, v = eps - x0, on **any** path (DOLLAR Eq. 4 with its sign turned);
`v_prediction` is the variance-preserving prediction_type a eps - b x0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from instep.diffusion.guidance_scales import GuidanceScales
from instep.diffusion.path import Path, at_least_float32, broadcast
from instep.diffusion.transfer import to_device

PredictionType = Literal["velocity", "x0", "eps", "v_prediction"]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What a denoiser is conditioned on: tensors whose first axis is the batch. Families add their own fields.

    `exit_id` [B] (which rollout step a sample was predicted at) is read only by a fake that is conditioned on it, `guidance_scales` [B, 2] (of the guidance
    that its samples are to come out with; `diffusion/guidance_scales.py`) only by a student that was trained to be told them.
    """

    exit_id: Tensor | None = None
    guidance_scales: Tensor | None = None

    def _map(self, function) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in values.items() if isinstance(v, Tensor)})

    def __getitem__(self, rows: Tensor | slice) -> Self:
        return self._map(lambda v: v[to_device(rows, v.device) if isinstance(rows, Tensor) else rows])

    def __len__(self) -> int:
        return next(len(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor))

    def repeat(self, k: int) -> Self:
        """Every row k times in a row: the conditions of groups of k samples."""
        return self if k == 1 else self._map(lambda v: v.repeat_interleave(k, 0))

    def tiled(self, k: int) -> Self:
        """All rows k times, one batch after the other."""
        return self if k == 1 else self._map(lambda v: v.repeat(k, *[1] * (v.ndim - 1)))

    def at_exit(self, exit_id: Tensor | None) -> Self:
        """The same condition with the exit that its samples come from ([B] integers)."""
        return replace(self, exit_id=exit_id if exit_id is None else to_device(exit_id, self.device))

    def with_guidance(self, guidance_scales: Tensor | GuidanceScales | None) -> Self:
        """The same condition with these guidance scales: [B, 2], or one pair for all; None: without any."""
        if isinstance(guidance_scales, tuple):
            guidance_scales = torch.tensor(guidance_scales).expand(len(self), 2)
        return replace(self, guidance_scales=guidance_scales if guidance_scales is None else to_device(guidance_scales, self.device))

    @property
    def device(self) -> torch.device:
        return next((v.device for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)), torch.device("cpu"))

    def to(self, device: torch.device | str) -> Self:
        return self._map(lambda v: to_device(v, device))

    def stack(self, other: Self) -> Self:
        """Both batches, one after the other; a field that only one of them has is dropped."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        both = {k: isinstance(a, Tensor) and isinstance(b, Tensor) for k, (a, b) in pairs.items()}
        return replace(self, **{k: self._join(k, a, b) if both[k] else None for k, (a, b) in pairs.items()})

    def rolled(self, k: int) -> Self:
        """Row i gets what row i + k has, the last k what the first have: each sample's condition from its neighbour's prompt."""
        return self[(torch.arange(len(self)) + k) % len(self)]

    def tokens(self) -> tuple[Tensor, Tensor]:
        """What a text-conditioned reward model reads: tokens [B, L, D], and which of them are there [B, L]; ValueError where there are none."""
        raise ValueError(f"kind: {type(self).__name__} has no text tokens; use a reward model without text (image or video)")

    def _join(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """How two batches of field `name` are joined; a family with ragged fields pads here."""
        return torch.cat([a, b])


@dataclass(frozen=True)
class Prediction:
    """A denoiser's answer: x0 and velocity [B, ...] in float32 or better.

    `logit` [B]: how real x_t looks to the role's discriminator head (above 0: real); None where it has none.
    """

    x0: Tensor
    v: Tensor
    logit: Tensor | None = None


class Denoiser(Protocol):
    """Anything that predicts the clean sample from a noisy one; every role is one."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction: ...


@runtime_checkable
class Scalable(Protocol):
    """A denoiser whose adapter's scale can be set for a call."""

    def scaled(self, scale: float) -> Denoiser: ...


def at_scale(denoiser: Denoiser, scale: float) -> Denoiser:
    """The denoiser with its adapter at `scale`; ValueError if it has none."""
    if not isinstance(denoiser, Scalable):
        raise ValueError(f"teacher: {type(denoiser).__name__} has no adapter to scale; give its role a LoRA, or leave the force's adapter out")
    return denoiser.scaled(scale)


@runtime_checkable
class Skippable(Protocol):
    """A denoiser that can run without some of its network's blocks."""

    def skipping(self, blocks: Sequence[int]) -> Denoiser: ...


def skipping(denoiser: Denoiser, blocks: Sequence[int]) -> Denoiser:
    """The denoiser with the blocks of these numbers (0-based) passing on what they are given; ValueError if it has none to skip."""
    if not isinstance(denoiser, Skippable):
        raise ValueError(f"skip: {type(denoiser).__name__} has no blocks to leave out; use a network, or skip-layer guidance of scale 0")
    return denoiser.skipping(blocks)


def velocity_of_x0(path: Path, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """Conjugate velocity eps - x0 that belongs to an x0 prediction; t > 0."""
    return (x_t - broadcast(path.a(t), x_t) * x0) / broadcast(path.b(t), x_t) - x0


def x0_of_velocity(path: Path, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """x0 = (x_t - b v) / (a + b): flow matching's x_t - t v, and DOLLAR's Eq. 8 on any path."""
    a, b = broadcast(path.a(t), x_t), broadcast(path.b(t), x_t)
    return (x_t - b * v) / (a + b)


def eps_of_x0(path: Path, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """Noise that belongs to an x0 prediction; t > 0."""
    return (x_t - broadcast(path.a(t), x_t) * x0) / broadcast(path.b(t), x_t)


def score_of_x0(path: Path, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """Score (a x0 - x_t) / b^2 of the noised density at x_t; t > 0 (Tweedie)."""
    return (broadcast(path.a(t), x_t) * x0 - x_t) / broadcast(path.b(t), x_t).square()


def to_prediction(prediction_type: PredictionType, raw: Tensor, path: Path, x_t: Tensor, t: Tensor) -> Prediction:
    """Raw network output [B, ...] as a `Prediction`; everything in float32 or better.

    `eps` needs a(t) > 0 and `x0` needs b(t) > 0; the other two hold at every level.
    """
    raw, x_t, t = at_least_float32(raw), at_least_float32(x_t), at_least_float32(t)
    if prediction_type == "velocity":
        return Prediction(x0_of_velocity(path, x_t, t, raw), raw)
    a, b = broadcast(path.a(t), x_t), broadcast(path.b(t), x_t)
    if prediction_type == "x0":
        return Prediction(raw, velocity_of_x0(path, x_t, t, raw))
    if prediction_type == "eps":
        x0 = (x_t - b * raw) / a
        return Prediction(x0, raw - x0)
    if prediction_type == "v_prediction":
        # the variance-preserving formulas, divided by a^2 + b^2 so that they hold on any path
        norm = a.square() + b.square()
        x0 = (a * x_t - b * raw) / norm
        return Prediction(x0, (a * raw + b * x_t) / norm - x0)
    raise ValueError(f"prediction_type: {prediction_type!r} is not known; allowed: velocity, x0, eps, v_prediction")
