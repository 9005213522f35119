"""Levels near those that a sampler visits, and the window of them that one update sums over (Diffusion-APO, Section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from instep.diffusion.levels import LevelSampler, Uniform, shift_level
from instep.diffusion.noise import Rng, rand, randint, randn

# the steps that levels are rounded to, as Wan, SD3 and DDPMs are trained on; offsets are counted in them
TRAINING_STEPS = 1000
# where the two regimes of the window meet (paper: 0.8 T)
BOUNDARY = 0.8
# the paper's set of shifts
SHIFTS = (3.0, 4.0, 5.0, 6.0)


@dataclass(frozen=True)
class NearTrajectory(LevelSampler):
    """A level near one of those that a sampler of `steps` steps visits: t' ~ N(round(shifted anchor T), offset^2) with T = 1,000 (Eq. 5).

    The anchors are 1, (n - 1) / n, ..., 1 / n under a shift drawn for each sample from `shifts`; of these, one in [low, high] is drawn, each as likely;
    then comes a Gaussian offset of deviation `offset` training steps, and the sum is rounded to a training step and clipped to [low, high] (and to one
    training step above 0, where nothing is left to denoise). A single shift leaves the random shift out, `offset` 0 the random offset. The paper
    rounds to "the nearest valid inference step", which would cancel the offset: it is read as training step.
    """

    steps: int = 50
    """Steps of the sampler."""
    shifts: tuple[float, ...] = SHIFTS
    """Timestep shifts, one drawn for each sample."""
    offset: float = 5.0
    """Deviation of the Gaussian offset, in training steps of 1,000."""
    low: float = 0.0
    """Lowest level."""
    high: float = 1.0
    """Highest level."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: {self.steps} is not allowed; the sampler has 1 or more")
        if not self.shifts or min(self.shifts) <= 0:
            raise ValueError(f"shifts: {list(self.shifts)} is not allowed; one or more positive shifts (paper: 3 4 5 6)")
        if self.offset < 0:
            raise ValueError(f"offset: {self.offset} is not allowed; 0 (none) or more training steps of 1,000 (paper: 5)")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low, high: {self.low}, {self.high} are not allowed; 0 <= low < high <= 1")
        for shift, anchors in zip(self.shifts, self.anchors, strict=True):
            if not anchors:
                raise ValueError(
                    f"steps: a sampler of {self.steps} steps with shift {shift:g} has no level in [{self.low:g}, {self.high:g}]; give it more steps, other "
                    "shifts, or a window without that part"
                )

    @property
    def anchors(self) -> tuple[tuple[int, ...], ...]:
        """Training steps that the sampler visits within [low, high], falling, for each shift."""
        grid = torch.arange(self.steps, 0, -1, dtype=torch.float64) / self.steps
        least, most = self._bounds()
        visited = [(shift_level(grid, shift) * TRAINING_STEPS).round().long().tolist() for shift in self.shifts]
        return tuple(tuple(t for t in each if least <= t <= most) for each in visited)

    def _bounds(self) -> tuple[int, int]:
        """First and last training step in [low, high]."""
        return max(1, -int(-self.low * TRAINING_STEPS // 1)), int(self.high * TRAINING_STEPS)

    def __call__(self, n: int, *, progress: float, t_exit: Tensor | None, rng: Rng) -> Tensor:
        which = randint(len(self.shifts), n, rng)
        u, offset = rand((n,), rng), randn((n,), rng, "cpu")
        anchors = self.anchors
        count = torch.tensor([len(each) for each in anchors])
        table = torch.zeros(len(anchors), int(count.max()))
        for i, each in enumerate(anchors):
            table[i, : len(each)] = torch.tensor(each, dtype=table.dtype)
        step = table[which, (u * count[which]).long().clamp(max=count[which] - 1)]
        return (step + self.offset * offset).round().clamp(*self._bounds()) / TRAINING_STEPS


@dataclass(frozen=True)
class HighLow(LevelSampler):
    """The hybrid window: `high` levels from [0.8, 1] and `low` from [0, 0.8), whose gradients are summed (paper: 4 and 1).

    Each part of the window draws levels of its own for every sample, as `NearTrajectory` does. Called for one level, it draws one of the parts.
    """

    steps: int = 50
    shifts: tuple[float, ...] = SHIFTS
    offset: float = 5.0
    high: int = 4
    low: int = 1

    def __post_init__(self) -> None:
        if self.high < 0 or self.low < 0 or not self.high + self.low:
            raise ValueError(f"high, low: {self.high} and {self.low} levels are not allowed; 0 or more of each and at least one (paper: 4 and 1)")
        _ = self.window

    @property
    def window(self) -> tuple[LevelSampler, ...]:
        above = [NearTrajectory(self.steps, self.shifts, self.offset, BOUNDARY, 1.0)] if self.high else []
        # [0, 0.8): the training step at 0.8 itself belongs above
        below = [NearTrajectory(self.steps, self.shifts, self.offset, 0.0, BOUNDARY - 1 / TRAINING_STEPS)] if self.low else []
        return tuple(self.high * above + self.low * below)

    def __call__(self, n: int, *, progress: float, t_exit: Tensor | None, rng: Rng) -> Tensor:
        drawn = torch.stack([part(n, progress=progress, t_exit=t_exit, rng=rng) for part in self.window])
        return drawn.gather(0, randint(len(drawn), n, rng)[None])[0]


@dataclass(frozen=True)
class Repeated(LevelSampler):
    """The same sampler several times over: a window of `times` levels without regimes, to compare with at equal cost."""

    levels: LevelSampler = Uniform()
    times: int = 5

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError(f"times: {self.times} is not allowed; 1 or more levels")

    @property
    def window(self) -> tuple[LevelSampler, ...]:
        return (self.levels,) * self.times

    def __call__(self, n: int, *, progress: float, t_exit: Tensor | None, rng: Rng) -> Tensor:
        return self.levels(n, progress=progress, t_exit=t_exit, rng=rng)
