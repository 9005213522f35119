"""Interpolation paths: how a clean sample x0 and noise eps mix at level t (t = 1 is noise).

    x_t = a(t) x0 + b(t) eps

Everything else (predictions, scores, re-noising) follows from a and b.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def broadcast(t: Tensor, x: Tensor) -> Tensor:
    """Levels [B] shaped to multiply a batch x [B, ...]."""
    return t.reshape(-1, *(1,) * (x.ndim - 1)).to(x)


def at_least_float32(x: Tensor) -> Tensor:
    """x itself if it is float32 or float64, else a float32 copy: scores and differences are never taken in half precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@dataclass(frozen=True)
class Path:
    """Base of all interpolation paths; a subclass gives `a` and `b`, both [B] -> [B]."""

    def a(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def b(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def renoise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = a(t) x0 + b(t) eps, shapes [B, ...], [B, ...], [B] -> [B, ...]."""
        return broadcast(self.a(t), x0) * x0 + broadcast(self.b(t), x0) * eps


@dataclass(frozen=True)
class RectifiedFlow(Path):
    """Straight lines between data and noise: a = 1 - t, b = t (Wan, SD3, SiT, Flux)."""

    def a(self, t: Tensor) -> Tensor:
        return 1 - t

    def b(self, t: Tensor) -> Tensor:
        return t


@dataclass(frozen=True)
class VariancePreserving(Path):
    """a^2 + b^2 = 1 from a table of DDPM betas; level t = k / N is training step k - 1, and t = 0 is clean.

    Between the table's levels log(alpha-bar) is interpolated linearly.
    """

    betas: tuple[float, ...]

    def __post_init__(self) -> None:
        bad = [beta for beta in self.betas if not 0 < beta < 1]
        if bad or not self.betas:
            raise ValueError(f"betas: {bad[:1] or 'empty'} is not allowed; every beta lies strictly between 0 and 1")

    @classmethod
    def linear(cls, low: float = 1e-4, high: float = 0.02, n: int = 1000) -> VariancePreserving:
        """DDPM's linear schedule (Ho et al. 2020)."""
        return cls(tuple(torch.linspace(low, high, n, dtype=torch.float64).tolist()))

    @classmethod
    def scaled_linear(cls, low: float = 0.00085, high: float = 0.012, n: int = 1000) -> VariancePreserving:
        """Stable Diffusion's schedule: linear in the square root of beta."""
        return cls(tuple(torch.linspace(low**0.5, high**0.5, n, dtype=torch.float64).square().tolist()))

    @classmethod
    def cosine(cls, n: int = 1000, offset: float = 0.008, largest: float = 0.999) -> VariancePreserving:
        """Improved DDPM's schedule (Nichol and Dhariwal 2021, Eq. 17)."""
        u = torch.arange(n + 1, dtype=torch.float64) / n
        bar = torch.cos((u + offset) / (1 + offset) * torch.pi / 2).square()
        return cls(tuple((1 - bar[1:] / bar[:-1]).clamp(max=largest).tolist()))

    def alpha_bar(self, t: Tensor) -> Tensor:
        """Product of (1 - beta) up to level t, [B] -> [B] in (0, 1]."""
        table = torch.zeros(len(self.betas) + 1, dtype=torch.float64)
        table[1:] = torch.log1p(-torch.tensor(self.betas, dtype=torch.float64)).cumsum(0)
        table = table.to(t.device)
        position = t.double().clamp(0, 1) * len(self.betas)
        low = position.floor().long().clamp(max=len(self.betas) - 1)
        log_bar = torch.lerp(table[low], table[low + 1], position - low)
        return log_bar.exp().to(t)

    def a(self, t: Tensor) -> Tensor:
        return self.alpha_bar(t).sqrt()

    def b(self, t: Tensor) -> Tensor:
        return (1 - self.alpha_bar(t)).sqrt()
