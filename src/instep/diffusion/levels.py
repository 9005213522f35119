"""Noise levels: the few-step lists a student runs on, and the samplers from which training draws t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instep.diffusion.noise import Rng, beta, rand, randint


def shift_level(t: Tensor, shift: float) -> Tensor:
    """Timestep shift s t / (1 + (s - 1) t), which moves levels in (0, 1) toward noise for s > 1 (SD3, Wan)."""
    return shift * t / (1 + (shift - 1) * t)


def few_step_levels(n: int, shift: float = 1.0) -> tuple[float, ...]:
    """The n levels 1 = t_1 > ... > t_n of a few-step student: uniform, then shifted (Wan, shift 5: 1, .9375, .8333, .625)."""
    if n < 1:
        raise ValueError(f"steps: {n} is not allowed; a student runs at least 1 step")
    t = torch.arange(n, 0, -1, dtype=torch.float64) / n
    return tuple(round(v, 7) for v in shift_level(t, shift).tolist())


def check_levels(levels: Sequence[float]) -> None:
    """Raises ValueError unless 1 = t_1 > t_2 > ... > t_n > 0."""
    falling = all(a > b for a, b in zip(levels, levels[1:], strict=False))
    if not levels or levels[0] != 1 or not falling or levels[-1] <= 0:
        raise ValueError(
            f"levels: {list(levels)} is not a few-step list; it starts at 1 (noise), falls strictly and stays above 0, for example {few_step_levels(4, 3.0)}"
        )


@dataclass(frozen=True)
class LevelSampler:
    """Base of the distributions of t: called with the batch size, returns levels [n] in (0, 1]."""

    def __call__(self, n: int, *, progress: float, t_exit: Tensor | None, rng: Rng) -> Tensor:
        """`progress` in [0, 1] is the fraction of the stage done; `t_exit` [n] the level each sample was predicted at."""
        raise NotImplementedError

    @property
    def window(self) -> tuple[LevelSampler, ...]:
        """The samplers whose gradients one update of a preference sums: itself alone, unless it is a window (`levels_apo.HighLow`)."""
        return (self,)


@dataclass(frozen=True)
class Uniform(LevelSampler):
    """t ~ U(low, high), optionally shifted before it is clamped to [low, high] (DMD on Wan: shift 5, [.02, .98])."""

    low: float = 0.02
    """Lowest level."""
    high: float = 0.98
    """Highest level."""
    shift: float = 1.0
    """Timestep shift before the clamp."""

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high <= 1:
            raise ValueError(f"low, high: {self.low}, {self.high} are not allowed; 0 < low < high <= 1")
        if self.shift <= 0:
            raise ValueError(f"shift: {self.shift} is not allowed; it is positive (1 leaves the levels uniform)")

    def __call__(self, n: int, *, progress: float, t_exit: Tensor | None, rng: Rng) -> Tensor:
        u = rand((n,), rng)
        if self.shift == 1:
            return self.low + (self.high - self.low) * u
        return shift_level(u, self.shift).clamp(self.low, self.high)


@dataclass(frozen=True)
class OneOf(LevelSampler):
    """One of a few levels, each as likely: a few-step student's own."""

    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        check_levels(self.levels)

    def __call__(self, n: int, *, progress: float, t_exit: Tensor | None, rng: Rng) -> Tensor:
        return torch.tensor(self.levels)[randint(len(self.levels), n, rng)]


@dataclass(frozen=True)
class AboveExit(LevelSampler):
    """t ~ U(t_exit, high): only levels noisier than the one a sample was predicted at (Decoupled-DMD's CA term; AMD Table 1, t_phi > t_G).

    Where nothing lies above the exit (a first step starts from pure noise), all of [low, high] serves: the letter would leave a one-step
    student a single level of almost pure noise. `shift` as for `Uniform`.
    """

    low: float = 0.02
    high: float = 0.98
    shift: float = 1.0

    def __post_init__(self) -> None:
        Uniform(self.low, self.high, self.shift)

    def __call__(self, n: int, *, progress: float, t_exit: Tensor | None, rng: Rng) -> Tensor:
        assert t_exit is not None, "levels above the exit need to know the exit"
        low = torch.where(t_exit < self.high, t_exit.clamp(min=self.low), torch.full_like(t_exit, self.low))
        t = shift_level(rand((n,), rng), self.shift).to(low)
        return low + (self.high - low) * t


@dataclass(frozen=True)
class AnnealedBeta(LevelSampler):
    """t ~ Beta(1 + 3 c, 1 + c / 2) with c a half-cosine from 1 to 0 over the stage: from high noise, Beta(4, 1.5), to uniform (DMDR, DynaRS).

    Shifted and clamped to [low, high] as `Uniform` is, so that at its end it draws what `Uniform` of the same shift draws. The parameters are those of
    DMDR's released code, which has no shift, annealed by the fraction of the stage.
    """

    low: float = 0.02
    """Lowest level."""
    high: float = 0.98
    """Highest level."""
    shift: float = 1.0
    """Timestep shift before the clamp."""

    def __post_init__(self) -> None:
        Uniform(self.low, self.high, self.shift)

    def __call__(self, n: int, *, progress: float, t_exit: Tensor | None, rng: Rng) -> Tensor:
        c = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
        return shift_level(beta(1 + 3 * c, 1 + 0.5 * c, n, rng), self.shift).clamp(self.low, self.high)
