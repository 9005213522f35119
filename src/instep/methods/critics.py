"""The fake score: a denoiser trained continually on the student's samples (DMD2; DM-Align Eq. 4; AMD Eq. 14)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from instep.diffusion.levels import LevelSampler, Uniform
from instep.diffusion.prediction import Condition, Denoiser, at_scale, eps_of_x0
from instep.diffusion.rollout import Where
from instep.methods.term import NOTHING, Critic, Need, View

# what a fake's error is taken of
ErrorOf = Literal["velocity", "eps", "x0"]


def denoising_error(denoiser: Denoiser, view: View, x0: Tensor, t: Tensor, noise: Tensor, cond: Condition, target: ErrorOf) -> Tensor:
    """Per-sample mean squared error [B] of a denoiser on x0 [B, ...] noised to t with `noise`, in the prediction_type `target`.

    With x_t = a x0 + b eps it is the squared error of x0 times 1 (x0), (a / b)^2 (eps: DMD2's for a noise-predicting model) or ((a + b) / b)^2 (velocity).
    """
    x_t = view.path.renoise(x0, noise, t)
    prediction = denoiser(x_t, t, cond)
    if target == "velocity":
        error = prediction.v - (noise - x0)
    elif target == "eps":
        error = eps_of_x0(view.path, x_t, t, prediction.x0) - noise
    else:
        error = prediction.x0 - x0
    return error.square().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class FakeScoreLoss(Critic):
    """Trains `role` by denoising the student's samples at their exit; `target`: the velocity's error for flows (DOLLAR's on any path), that of the noise (DMD2
    on SDXL), or that of x0.

    With `condition_on_exit` the fake is conditioned on the exit of each sample: one unconditional fake for the mixture over all exits leaves
    the marginal of each exit unidentified.

    `tilt` weighs each sample by W = exp(-tilt advantage) (AMD Eq. 14 has 1). The fake then models q W instead of q, so the fixed point of
    matching is q ~ p_real / W = p_real exp(tilt advantage): the weight alone gives a reward-tilted target, without a reward's gradient.

    `adapter_scale` is the scale of the role's adapter during training; None keeps the role's own.
    """

    role: str = "fake"
    on: Where = "exit"
    levels: LevelSampler = field(default_factory=Uniform)
    target: ErrorOf = "velocity"
    condition_on_exit: bool = False
    tilt: float = 0.0
    adapter_scale: float | None = None

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reward"}) if self.tilt else NOTHING

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target not in get_args(ErrorOf):
            raise ValueError(f"fake_target: {self.target!r} is not known; allowed: {', '.join(get_args(ErrorOf))}")

    def losses(self, view: View) -> Iterator[Tensor]:
        samples = view.samples
        point = samples.point(self.on).detach()
        t = view.levels(self.levels, len(point.x), point.level).to(point.x.dtype)
        cond = samples.cond.at_exit(point.exit_id)
        denoiser = view.roles[self.role] if self.adapter_scale is None else at_scale(view.roles[self.role], self.adapter_scale)
        error = denoising_error(denoiser, view, point.x, t, view.randn_like(point.x), cond, self.target)
        yield (error if not self.tilt else tilted(error, samples.advantage, self.tilt)).mean()


def tilted(error: Tensor, advantage: Tensor | None, tilt: float) -> Tensor:
    """exp(-tilt a) times each sample's error, [B] (AMD Eq. 14; its Algorithm 1 prints the weight twice, which would tilt by 2 a)."""
    assert advantage is not None, "a tilted critic weighs by the advantage; its stage must score rewards"
    return (-tilt * advantage).exp() * error


@dataclass(frozen=True, kw_only=True)
class FakeScoreGANLoss(FakeScoreLoss):
    """Denoising, and classification of real against generated samples by the same network: DMD2's fake with its discriminator head.

    Adds `gan_weight` times the logistic loss softplus(-l(real)) + softplus(l(generated)) of the head's logit l, each noised to its own
    levels; the head is part of the role and trained with it.
    """

    gan_weight: float = 1e-2
    gan_levels: LevelSampler = field(default_factory=Uniform)

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | {"real"}

    def losses(self, view: View) -> Iterator[Tensor]:
        yield from super().losses(view)
        samples, real = view.samples, view.batch.real
        assert real is not None, "a discriminator needs real samples in the batch"
        point = samples.point(self.on).detach()
        for x, sign in ((real.repeat_interleave(samples.group, 0), -1.0), (point.x, 1.0)):
            t = view.levels(self.gan_levels, len(x), point.level).to(x.dtype)
            logit = view.roles[self.role](view.path.renoise(x, view.randn_like(x), t), t, samples.cond.at_exit(point.exit_id)).logit
            assert logit is not None, f"role {self.role!r} has no discriminator head"
            yield self.gan_weight * F.softplus(sign * logit).mean()
