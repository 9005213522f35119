"""The exact laboratory: 2-D Gaussian mixtures with a teacher in closed form.

Noising a Gaussian mixture gives a Gaussian mixture, so E[x0 | x_t] is exact on any path, conditional and unconditional.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from instep.diffusion.path import Path, broadcast
from instep.diffusion.prediction import Condition, Prediction, velocity_of_x0


@dataclass(frozen=True, kw_only=True)
class LabelCondition(Condition):
    """Class labels [B]; -1 is the unconditional one. `member` [B]: the network of an ensemble that handles a row."""

    label: Tensor
    member: Tensor | None = None

    def rolled(self, k: int) -> LabelCondition:
        """Labels alone: a row stays with its member."""
        return replace(self, label=self.label.roll(-k, 0))


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

    @classmethod
    def grid(cls, side: int = 3, spacing: float = 1.6, sigma: float = 0.15) -> Mixture:
        """Modes on a square grid about the origin; classes alternate as on a chessboard."""
        at = (torch.arange(side) - (side - 1) / 2) * spacing
        means = torch.cartesian_prod(at, at)
        row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
        return cls(means, sigma, (row + column) % 2)

    @classmethod
    def moons(cls, each: int = 5, sigma: float = 0.15) -> Mixture:
        """Two interleaved arcs of modes, one a class."""
        angle = torch.linspace(0, math.pi, each)
        upper = torch.stack([1.8 * angle.cos() - 0.9, 1.8 * angle.sin() - 0.45], 1)
        means = torch.cat([upper, -upper])
        return cls(means, sigma, torch.arange(2 * each) // each)

    @classmethod
    def rings(cls, inner: int = 4, outer: int = 8, sigma: float = 0.15) -> Mixture:
        """A ring in a ring, one a class."""
        one, other = cls.ring(inner, 1.0, sigma), cls.ring(outer, 2.4, sigma)
        return cls(torch.cat([one.means, other.means]), sigma, torch.tensor([0] * inner + [1] * outer))

    @property
    def label_count(self) -> int:
        """Number of classes."""
        return int(self.classes.max()) + 1

    def member(self, label: Tensor) -> Tensor:
        """Which modes belong to each label, [B, M] booleans; all of them for -1."""
        return (label[:, None] == self.classes) | (label[:, None] < 0)

    def sample(self, label: Tensor, rng: torch.Generator, only: Tensor | None = None) -> Tensor:
        """Exact samples [B, D] of each label's modes; of those among them that are in `only` [M], if it is given."""
        modes = self.member(label) if only is None else self.member(label) & only
        mode = torch.multinomial(modes.float(), 1, generator=rng).flatten()
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


def labels(prompts: Sequence[str], member: Tensor | None = None) -> LabelCondition:
    """Prompts of the laboratory are class numbers; "" is unconditional."""
    return LabelCondition(label=torch.tensor([int(p) if p else -1 for p in prompts]), member=member)
