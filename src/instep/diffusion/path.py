"""Interpolation paths: how a clean sample x0 and noise eps mix at level t (t = 1 is noise).

    x_t = a(t) x0 + b(t) eps

Everything else (predictions, scores, re-noising) follows from a and b.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from instep.diffusion.transfer import to_match


def broadcast(t: Tensor, x: Tensor) -> Tensor:
    """Levels [B] shaped to multiply a batch x [B, ...]."""
    return to_match(t.reshape(-1, *(1,) * (x.ndim - 1)), x)


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
    """a^2 + b^2 = 1 from a table of DDPM betas, or of their running products alpha-bar; level t = k / N is training step k - 1, and t = 0 is clean.

    Between the table's levels log(alpha-bar) is interpolated linearly. A table of alpha-bar may end in 0 (a schedule rescaled to zero terminal SNR,
    Lin et al. 2024, Alg. 1): t = 1 is then pure noise, a(1) = 0, and in the interval before it, where the logarithm has no end, a itself falls
    linearly, as that rescaling is linear in a. Predictions of eps cannot be read there; v_prediction, x0 and velocity can.
    """

    betas: tuple[float, ...] = ()
    alpha_bars: tuple[float, ...] = ()
    """Instead of betas: alpha-bar of each training step, taken as it is."""

    def __post_init__(self) -> None:
        if bool(self.betas) == bool(self.alpha_bars):
            raise ValueError("betas, alpha_bars: " + ("both are given" if self.betas else "empty is not allowed") + "; a path is made of one of the two tables")
        bad = [beta for beta in self.betas if not 0 < beta < 1]
        if bad:
            raise ValueError(f"betas: {bad[0]} is not allowed; every beta lies strictly between 0 and 1 (for zero terminal SNR give alpha_bars)")
        bars = (1.0, *self.alpha_bars)
        # written so that a NaN is refused as well
        rises = [k for k in range(1, len(bars)) if not (0 <= bars[k] < bars[k - 1])]
        if rises:
            raise ValueError(f"alpha_bars: {bars[rises[0]]} at training step {rises[0] - 1} is not allowed; they fall strictly from below 1, the last may be 0")

    @property
    def steps(self) -> int:
        """N, how many training steps the table has."""
        return len(self.betas or self.alpha_bars)

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

    def training_step(self, t: Tensor) -> Tensor:
        """Levels [B] in [0, 1] as the timesteps that a network of this table knows, k / N as k - 1; between them fractions, below 1 / N still 0.

        A level of the table in float32 misses k by up to 6e-5, which is rounded away.
        """
        position = t.double() * self.steps
        whole = position.round()
        position = torch.where((position - whole).abs() < 1e-3, whole, position)
        return (position - 1).clamp(min=0).float()

    def table(self) -> Tensor:
        """alpha-bar of every level k / N, [N + 1] in float64, from 1 (clean)."""
        if self.alpha_bars:
            return torch.tensor((1.0, *self.alpha_bars), dtype=torch.float64)
        return self._logarithms().exp()

    def _logarithms(self) -> Tensor:
        if self.alpha_bars:
            return self.table().log()
        table = torch.zeros(len(self.betas) + 1, dtype=torch.float64)
        table[1:] = torch.log1p(-torch.tensor(self.betas, dtype=torch.float64)).cumsum(0)
        return table

    def alpha_bar(self, t: Tensor) -> Tensor:
        """Product of (1 - beta) up to level t, [B] -> [B] in [0, 1]; at the table's levels exactly its entries."""
        bars, logs = self.table().to(t.device), self._logarithms().to(t.device)
        position = t.double().clamp(0, 1) * self.steps
        low = position.floor().long()
        high = (low + 1).clamp(max=self.steps)
        w = position - low
        between = torch.lerp(logs[low], logs[high], w).exp()
        between = torch.where(bars[high] == 0, bars[low] * (1 - w).square(), between)
        return torch.where(w == 0, bars[low], between).to(t)

    def a(self, t: Tensor) -> Tensor:
        return self.alpha_bar(t).sqrt()

    def b(self, t: Tensor) -> Tensor:
        return (1 - self.alpha_bar(t)).sqrt()
