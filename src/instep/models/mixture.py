"""The exact laboratory: 2-D Gaussian mixtures whose teacher is known in closed form, small networks, and free particles.

Noising a Gaussian mixture gives a Gaussian mixture, so E[x0 | x_t] is exact on any path, conditional and unconditional.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from instep.paths import Path, broadcast
from instep.prediction import Condition, Prediction, read, velocity_of_x0


@dataclass(frozen=True, kw_only=True)
class LabelCondition(Condition):
    """Class labels [B]; -1 is the unconditional one."""

    label: Tensor


@dataclass(frozen=True)
class Mixture:
    """Equal-weight isotropic Gaussians: means [M, D], one deviation, and the class [M] each belongs to."""

    means: Tensor
    sigma: float
    classes: Tensor

    @classmethod
    def ring(cls, modes: int = 8, radius: float = 2.0, sigma: float = 0.15) -> Mixture:
        """Modes on a circle; class 0 is its upper half, class 1 its lower."""
        angle = (torch.arange(modes) + 0.5) * 2 * math.pi / modes
        means = radius * torch.stack([angle.cos(), angle.sin()], 1)
        return cls(means, sigma, (means[:, 1] < 0).long())

    def member(self, label: Tensor) -> Tensor:
        """Which modes belong to each label, [B, M] booleans; all of them for -1."""
        return (label[:, None] == self.classes) | (label[:, None] < 0)

    def sample(self, label: Tensor, rng: torch.Generator) -> Tensor:
        """Exact samples [B, D] of each label's modes."""
        mode = torch.multinomial(self.member(label).float(), 1, generator=rng).flatten()
        means = self.means[mode]
        return means + self.sigma * torch.randn(means.shape, generator=rng, dtype=means.dtype)

    def posterior_mean(self, path: Path, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Exact E[x0 | x_t, label], [B, D]."""
        a, b = broadcast(path.a(t), x_t), broadcast(path.b(t), x_t)
        variance = a.square() * self.sigma**2 + b.square()
        residual = x_t[:, None] - a[:, None] * self.means
        logits = -0.5 * residual.square().sum(-1) / variance
        weight = logits.masked_fill(~self.member(label), -math.inf).softmax(1)
        each = self.means + (a * self.sigma**2 / variance)[:, None] * residual
        return (weight[..., None] * each).sum(1)

    def log_density(self, path: Path, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Exact log p_t(x_t | label), [B]."""
        a, b = path.a(t)[:, None], path.b(t)[:, None]
        variance = a.square() * self.sigma**2 + b.square()
        residual = x_t[:, None] - a[:, None] * self.means
        member = self.member(label)
        log_each = -0.5 * residual.square().sum(-1) / variance - 0.5 * x_t.shape[1] * (2 * math.pi * variance).log()
        return log_each.masked_fill(~member, -math.inf).logsumexp(1) - member.sum(1).to(x_t).log()


class ExactTeacher:
    """The mixture's own denoiser."""

    def __init__(self, mixture: Mixture, path: Path) -> None:
        self.mixture, self.path = mixture, path

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        assert isinstance(cond, LabelCondition)
        x0 = self.mixture.posterior_mean(self.path, x_t, t, cond.label)
        return Prediction(x0, velocity_of_x0(self.path, x_t, t, x0))


class VelocityMLP(nn.Module):
    """A small velocity network: inputs x, t, four Fourier pairs of t, a one-hot class and a one-hot exit; features are its last hidden layer."""

    def __init__(self, path: Path, *, classes: int = 2, exits: int = 0, width: int = 64, dim: int = 2) -> None:
        super().__init__()
        self.path, self.classes, self.exits = path, classes, exits
        inputs = dim + 1 + 8 + classes + exits
        self.body = nn.Sequential(
            nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.head = nn.Linear(width, dim)

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        assert isinstance(cond, LabelCondition)
        angle = math.pi * t[:, None] * torch.arange(1, 5, device=t.device)
        parts = [x_t, t[:, None], angle.sin(), angle.cos(), _one_hot(cond.label, self.classes)]
        if self.exits:
            parts.append(_one_hot(torch.full_like(cond.label, -1) if cond.exit_id is None else cond.exit_id, self.exits))
        features = self.body(torch.cat(parts, 1).to(x_t))
        answer = read("velocity", self.head(features), self.path, x_t, t)
        return Prediction(answer.x0, answer.v, (features,))


def _one_hot(index: Tensor, n: int) -> Tensor:
    """One-hot rows; an index below zero gives zeros."""
    return (index[:, None] == torch.arange(n, device=index.device)).float()


class Particles(nn.Module):
    """A free point cloud in place of a student: sample i *is* parameter i, whatever the noise. With the exact fake it isolates a
    method's fixed point from networks and optimisers."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(start.clone())

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        assert len(x_t) == len(self.x), "a particle student runs on all of its particles"
        return Prediction(self.x, self.x)


class ExactFake:
    """The exact denoiser of a point cloud: a softmax over its points, no training."""

    def __init__(self, particles: Particles, path: Path) -> None:
        self.particles, self.path = particles, path

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        points = self.particles.x.detach()
        a, b = broadcast(self.path.a(t), x_t), broadcast(self.path.b(t), x_t)
        logits = -0.5 * (x_t[:, None] - a[:, None] * points).square().sum(-1) / b.square()
        x0 = logits.softmax(1) @ points
        return Prediction(x0, velocity_of_x0(self.path, x_t, t, x0))


def labels(prompts: Sequence[str]) -> LabelCondition:
    """Prompts of the laboratory are class numbers; "" is unconditional."""
    return LabelCondition(label=torch.tensor([int(p) if p else -1 for p in prompts]))
