"""Stock diffusers schedulers for a student's levels, so that using the student needs no custom code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from instep.diffusion.levels import check_levels
from instep.diffusion.path import Path, RectifiedFlow, VariancePreserving
from instep.diffusion.prediction import PredictionType

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

# levels nearer than this are equal in the student's arithmetic (float32)
TOLERANCE = 1e-6
NUDGES = 40


def few_step_scheduler(
    path: Path, levels: Sequence[float], prediction_type: PredictionType, *, even_sigmas: bool = False
) -> FlowMatchEulerDiscreteScheduler | LCMScheduler:
    """The stock scheduler that predicts x0 at `levels` of `path` and re-noises between them, for `set_timesteps(len(levels))`.

    FlowMatchEulerDiscreteScheduler on the rectified flow, LCMScheduler on a variance-preserving path. even_sigmas: the pipeline gives a flow's scheduler the
    levels 1, (n - 1) / n, ..., 1 / n instead of their number. Raises ValueError for levels that the
    class cannot produce, and for a prediction type that it does not support.
    """
    if isinstance(path, RectifiedFlow) and prediction_type == "velocity":
        return flow_scheduler(levels, even_sigmas=even_sigmas)
    if isinstance(path, VariancePreserving):
        from instep.export.scheduler_vp import vp_scheduler

        return vp_scheduler(path, levels, prediction_type)
    raise ValueError(
        f"prediction_type: no stock scheduler re-noises for {prediction_type!r} on {type(path).__name__}; allowed: velocity on RectifiedFlow, eps, x0 and "
        "v_prediction on VariancePreserving"
    )


def flow_scheduler(levels: Sequence[float], *, even_sigmas: bool = False) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler whose `set_timesteps(len(levels))` gives exactly `levels`, and which re-noises between them; with `even_sigmas` it is
    `set_timesteps(sigmas=even(len(levels)))`.

    levels: 1 = t_1 > ... > t_n > 0. Uniform-then-shifted lists fit, and so do lists of up to 3 levels (unless the
    second is next to 1 or 0). Raises ValueError for a list that this class cannot produce, which is tried, not assumed
    (tolerance 1e-6). The scheduler serves n steps only: another number of steps gives levels on which the student was
    not trained.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    check_levels(levels)
    n = len(levels)
    shift, terminal = solve_even_shift(levels) if even_sigmas else solve_shift(levels)
    wanted = torch.tensor(levels, dtype=torch.float32)
    best: tuple[float, FlowMatchEulerDiscreteScheduler] | None = None
    # one float32 unit of a level changes a sample by 1e-6, so of almost equal shifts the bit-exact one is chosen
    for nudge in sorted(range(-NUDGES, NUDGES + 1), key=abs):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift * (1 + nudge * 2e-8), shift_terminal=terminal, stochastic_sampling=True)
        scheduler.set_timesteps(n, sigmas=even(n) if even_sigmas else None)
        off = float((scheduler.sigmas[:-1] - wanted).abs().sum())
        if best is None or off < best[0]:
            best = off, scheduler
        if not off > 0:
            break
    assert best is not None
    scheduler = best[1]
    got = scheduler.sigmas[:-1].double()
    error = max_error(got, levels)
    # not <=: a NaN must not pass
    if not error <= TOLERANCE:
        nearest = [round(v, 6) for v in got.tolist()]
        raise ValueError(
            f"levels: {list(levels)} cannot be represented by FlowMatchEulerDiscreteScheduler (nearest {nearest}, off"
            f" by {error:.2g}); allowed: uniform levels moved by one timestep shift, or a list of up to 3 levels whose"
            " second is not next to 1 or 0; train with instep.diffusion.levels.few_step_levels(n, shift)"
        )
    return scheduler


def max_error(got: Tensor, levels: Sequence[float]) -> float:
    return float((got - torch.tensor(levels, dtype=torch.float64)).abs().max())


def solve_shift(levels: Sequence[float]) -> tuple[float, float | None]:
    """The class's (shift, shift_terminal) for which a middle level and the last one come out right.

    `set_timesteps` takes n points from 1 down to m (the shifted 1/1000), shifts them by s, and stretches 1 - sigma so
    that the last is T. For level j (from 0), r = (1 - t_j) / (1 - T) and k = j / (n - 1), this requires s = 1 / (1 - a
    / (1 - m)) with a = (k - r) / (k (1 - r)): a fixed point, because m depends on s. The j with r nearest 1/2 is the
    least sensitive to rounding.
    """
    n = len(levels)
    if n == 1:
        # the stretch would be 0 / 0; without it the one level is 1
        return 1.0, None
    if n == 2:
        return 1.0, float(levels[-1])
    r, j = min((((1 - t) / (1 - levels[-1]), j) for j, t in enumerate(levels[1:-1], 1)), key=lambda pair: abs(pair[0] - 0.5))
    k = j / (n - 1)
    a = (k - r) / (k * (1 - r))
    shift = 1.0
    for _ in range(100):
        m = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
        denominator = 1 - a / (1 - m)
        if denominator <= 0:
            # no positive shift exists; the caller's trial then reports the error of the nearest list
            break
        shift = 1 / denominator
    return shift, float(levels[-1])


def even(n: int) -> list[float]:
    """The levels 1, (n - 1) / n, ..., 1 / n."""
    return [(n - j) / n for j in range(n)]


def solve_even_shift(levels: Sequence[float]) -> tuple[float, float | None]:
    """The class's (shift, shift_terminal) for which a middle level and the last one come out right of even sigmas.

    Shifted by s, 1 - sigma is (1 - u) / (1 + (s - 1) u) of an even u. If the last level comes out right with every other, no terminal is needed. Else the
    stretch keeps the ratio of two of them: with r = (1 - t_j) / (1 - T) and A = (1 - u_j) / (1 - u_n), s = 1 + (r - A) / (A u_n - r u_j).
    """
    n, last = len(levels), float(levels[-1])
    if n == 1:
        return 1.0, None
    u = even(n)
    shift = last * (1 - u[-1]) / (u[-1] * (1 - last))
    if max(abs(shift * a / (1 + (shift - 1) * a) - t) for a, t in zip(u, levels, strict=True)) <= TOLERANCE:
        return shift, None
    if n == 2:
        return 1.0, last
    r, j = min((((1 - t) / (1 - last), j) for j, t in enumerate(levels[1:-1], 1)), key=lambda pair: abs(pair[0] - 0.5))
    ratio = (1 - u[j]) / (1 - u[-1])
    shift = 1 + (r - ratio) / (ratio * u[-1] - r * u[j])
    # no positive shift exists: the caller's trial then reports the error of the nearest list
    return (shift if shift > 0 else 1.0), last
