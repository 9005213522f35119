"""The fake score: a denoiser that is kept up to date with the student's samples (DMD2; DM-Align Eq. 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from instep.levels import LevelSampler, Uniform
from instep.prediction import Condition, Denoiser, eps_of_x0
from instep.rollout import Where
from instep.terms import Critic, View


def denoising_error(
    denoiser: Denoiser, view: View, x0: Tensor, t: Tensor, noise: Tensor, cond: Condition, target: Literal["velocity", "eps", "x0"]
) -> Tensor:
    """Per-sample mean squared error [B] of a denoiser on x0 [B, ...] noised to t with `noise`, in the parameterisation `target`."""
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
class Score(Critic):
    """Trains `role` by denoising the student's samples at their exit; velocity error for flows (DOLLAR's on any path).

    With `condition_on_exit` the fake is told which exit a sample comes from: one fake for the mixture over all exits leaves the
    marginal of each exit unidentified.
    """

    role: str = "fake"
    on: Where = "exit"
    levels: LevelSampler = field(default_factory=Uniform)
    target: Literal["velocity", "eps", "x0"] = "velocity"
    condition_on_exit: bool = False

    def losses(self, view: View) -> Iterator[Tensor]:
        samples = view.samples
        point = samples.point(self.on).detach()
        t = self.levels(len(point.x), progress=view.progress, t_exit=point.level, rng=view.rng).to(point.x)
        cond = samples.cond.at_exit(point.exit_id)
        yield denoising_error(view.roles[self.role], view, point.x, t, view.randn_like(point.x), cond, self.target).mean()
