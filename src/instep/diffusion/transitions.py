"""How a sampler goes from one level to the next: as a Gaussian, so that sampling is a policy with an exact log-probability.

A few-step student's own step is `Renoise`. The others turn a many-step model's deterministic sampler into a stochastic one, which policy
gradients need (Flow-GRPO, DanceGRPO), or stand between the two (CPS). The step from the last level to a clean sample is deterministic with
all of them, and no part of the policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from instep.diffusion.path import Path, RectifiedFlow, broadcast
from instep.diffusion.prediction import eps_of_x0
from instep.diffusion.transfer import to_match


@dataclass(frozen=True)
class Transition:
    """N(mean, std^2) of the sample at `t_next` < `t`, given the sample x_t [B, ...] and the x0 predicted from it; levels [B]."""

    def gaussian(self, path: Path, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, ...] and standard deviation [B]."""
        raise NotImplementedError

    def step(self, path: Path, x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """A sample of it, made of `noise` [B, ...]."""
        mean, std = self.gaussian(path, x0, x_t, t, t_next)
        return mean + broadcast(std, mean) * noise

    def log_prob(self, path: Path, x0: Tensor, x_t: Tensor, x_next: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """log N(x_next; mean, std^2), *mean* over elements, [B].

        The mean over elements (not the sum) is what the ratio of a policy gradient is taken of, as is usual for latents of any size.
        """
        mean, std = self.gaussian(path, x0, x_t, t, t_next)
        wide = broadcast(std, mean)
        return (-0.5 * ((x_next - mean) / wide).square() - wide.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


@dataclass(frozen=True)
class Renoise(Transition):
    """mean a(t') x0, std b(t'): the few-step student's own step, which forgets x_t."""

    def gaussian(self, path: Path, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        return broadcast(path.a(t_next), x0) * x0, to_match(path.b(t_next), x0)


@dataclass(frozen=True)
class Deterministic(Transition):
    """mean a(t') x0 + b(t') eps, std 0: DDIM, the Euler step on the rectified flow. It can roll out, and is no policy."""

    def gaussian(self, path: Path, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        return path.renoise(x0, eps_of_x0(path, x_t, t, x0), t_next), x0.new_zeros(t_next.shape)


@dataclass(frozen=True)
class CPS(Transition):
    """Coefficients-preserving sampling: part of the predicted noise is replaced by fresh noise, so that the sample has the path's own amount.

    std = b(t') sin(noise pi / 2), mean = a(t') x0 + sqrt(b(t')^2 - std^2) eps. `noise` 0 is DDIM, 1 is `Renoise`.
    """

    noise: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.noise <= 1:
            raise ValueError(f"noise: {self.noise} is not allowed; above 0 (0 would be deterministic, no policy) up to 1 (the few-step step)")

    def gaussian(self, path: Path, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        b = to_match(path.b(t_next), x0)
        std = b * math.sin(self.noise * math.pi / 2)
        kept = b * math.cos(self.noise * math.pi / 2) if self.noise < 1 else torch.zeros_like(b)
        return broadcast(path.a(t_next), x0) * x0 + broadcast(kept, x0) * eps_of_x0(path, x_t, t, x0), std


@dataclass(frozen=True)
class Posterior(Transition):
    """DDPM's step on any grid: N(a(t') x0 + sqrt(b(t')^2 - std^2) eps, std^2) with std = eta b(t') / b(t) sqrt(b(t)^2 - (a(t) / a(t'))^2 b(t')^2).

    With `eta` 1 it is the posterior of x_t' given x_t and x0, whose std is DOLLAR's sigma_t; towards 0 it becomes DDIM. As derived: Eq. 5
    prints the coefficient of x_t without std, and Eq. 27 the mean's two roots at other indices (docs/errata.md).
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta: {self.eta} is not allowed; above 0 (0 would be deterministic, no policy) up to 1 (DDPM)")

    def gaussian(self, path: Path, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        a, b, a_next, b_next = (to_match(f(level), x0) for level in (t, t_next) for f in (path.a, path.b))
        std = self.eta * b_next / b * (b.square() - (a / a_next * b_next).square()).clamp(min=0).sqrt()
        kept = (b_next.square() - std.square()).clamp(min=0).sqrt()
        return broadcast(a_next, x0) * x0 + broadcast(kept, x0) * eps_of_x0(path, x_t, t, x0), std


@dataclass(frozen=True)
class _FlowDiffusion(Transition):
    """One Euler-Maruyama step of the reverse SDE that has the flow's marginals: dx = (v - s^2/2 score) dt + s dw, in the limit of small steps."""

    noise: float = 0.7

    def __post_init__(self) -> None:
        if not self.noise > 0:
            raise ValueError(f"noise: {self.noise} is not allowed; it is positive")

    def diffusion(self, t: Tensor, t_next: Tensor) -> Tensor:
        """s of the SDE at level t, [B]."""
        raise NotImplementedError

    def gaussian(self, path: Path, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(path, RectifiedFlow):
            raise ValueError(f"transition: {type(self).__name__} is a step of the rectified flow, and this model's path is {type(path).__name__}; use CPS")
        dt, s = to_match(t_next - t, x0), to_match(self.diffusion(t, t_next), x0)
        eps = eps_of_x0(path, x_t, t, x0)
        # the score is -eps / t
        mean = x_t + broadcast(dt, x_t) * (eps - x0 + broadcast(0.5 * s.square() / to_match(t, x0), x_t) * eps)
        return mean, s * (-dt).sqrt()


@dataclass(frozen=True)
class FlowSDE(_FlowDiffusion):
    """Flow-GRPO's: s = noise sqrt(t / (1 - t)) (Liu et al. 2025), at level 1, where that is infinite, the next level's.

    On a grid of few steps it leaves more noise than the path has: of pure noise at 1, .86 at .75.
    """

    noise: float = 0.7

    def diffusion(self, t: Tensor, t_next: Tensor) -> Tensor:
        below = torch.where(t < 1, t, t_next)
        return self.noise * (t / (1 - below)).sqrt()


@dataclass(frozen=True)
class DanceSDE(_FlowDiffusion):
    """DanceGRPO's: the same noise at every level, s = noise (Xue et al. 2025)."""

    noise: float = 0.3

    def diffusion(self, t: Tensor, t_next: Tensor) -> Tensor:
        return torch.full_like(t, self.noise)
