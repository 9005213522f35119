"""Consistency distillation with m steps of the teacher, on noised real samples (DOLLAR Eq. 6, 7, 9; LCM, Luo et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from instep.diffusion.guidance import predict_guided
from instep.diffusion.levels import shift_level
from instep.diffusion.noise import randint
from instep.diffusion.path import at_least_float32, broadcast
from instep.diffusion.prediction import Condition, Denoiser
from instep.diffusion.transitions import Deterministic
from instep.methods.term import Need, Objective, View

Distance = Literal["mse", "huber"]
Target = Literal["student", "average", "teacher"]

# LCM's boundary condition: the standard deviation of the data, and the units of one of 1000 training steps
SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0 * 1000
# where the pseudo-Huber distance changes from quadratic to linear, in units of a latent element (LCM: 0.001)
HUBER = 1e-3


def boundary(t: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out [B] of the consistency function at levels t: 1 and 0 at t = 0, close to 0 and 1 from the first of 1000 levels on (LCM)."""
    s = TIMESTEP_SCALING * t.double()
    norm = s.square() + SIGMA_DATA**2
    return (SIGMA_DATA**2 / norm).to(t), (s / norm.sqrt()).to(t)


def consistency_function(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """f(x_t, t) = c_skip x_t + c_out x0(x_t, t), [B, ...]; the identity at t = 0 (DOLLAR Section 3.2)."""
    skip, out = (broadcast(c, x_t) for c in boundary(t))
    # at level 0 some parameterisations have no prediction; its weight is 0 there
    predicted = torch.where(broadcast(t, x_t) > 0, denoiser(x_t, t, cond).x0, x_t)
    return skip * x_t + out * predicted


def distance(x: Tensor, y: Tensor, kind: Distance) -> Tensor:
    """Mean over elements of (x - y)^2, or of sqrt((x - y)^2 + c^2) - c with c = 0.001 (pseudo-Huber), [B]."""
    square = (x - y).square()
    return (square if kind == "mse" else (square + HUBER**2).sqrt() - HUBER).flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class Consistency(Objective):
    """d(f(x_{n+m}, t_{n+m}), f'(x^_n, t_n)): the student's predictions agree at both ends of m deterministic steps of the guided teacher.

    x_{n+m} is a real sample, noised. `grid`: levels of the teacher's sampler between which t_n and t_{n+m} lie, with its timestep `shift`. `target`: the
    source of f': the student's without gradient, its average (`Recipe` then has a role `average`), or the teacher's, as Eq. 6 prints
    it. `guidance` of the teacher: 1 + w of Eq. 9.
    """

    name: str = "consistency"
    steps: int = 5
    grid: int = 50
    shift: float = 1.0
    guidance: float = 3.0
    distance: Distance = "mse"
    target: Target = "student"

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= self.grid:
            raise ValueError(f"cd_steps: {self.steps} is not allowed; the teacher takes 1 to {self.grid} (the grid's) steps")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"real", "average"}) if self.target == "average" else frozenset({"real"})

    def __call__(self, view: View) -> Iterator[Tensor]:
        real, cond = view.batch.real, view.batch.cond
        assert real is not None, "consistency distillation needs real samples in the batch"
        n = randint(self.grid - self.steps + 1, len(real), view.rng)
        levels = self.levels.to(at_least_float32(real).dtype)
        x = start = view.path.renoise(real, view.randn_like(real), levels[n + self.steps])
        with torch.no_grad():
            for k in range(self.steps, 0, -1):
                t, s = levels[n + k], levels[n + k - 1]
                x0 = predict_guided(view.roles["teacher"], x, t, cond, view.batch.null, self.guidance).x0
                x, _ = Deterministic().gaussian(view.path, x0, x, t, s)
            target = consistency_function(view.roles[self.target], x, levels[n], cond)
        yield distance(consistency_function(view.roles["student"], start, levels[n + self.steps], cond), target, self.distance).mean()

    @property
    def levels(self) -> Tensor:
        """t_0 = 0 to t_N = 1, [N + 1]."""
        return shift_level(torch.linspace(0, 1, self.grid + 1, dtype=torch.float64), self.shift)
