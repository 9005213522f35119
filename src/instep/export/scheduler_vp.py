"""Few-step sampling on a variance-preserving path through diffusers' `LCMScheduler`: predict x0, re-noise, at the student's own training steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from instep.diffusion.levels import check_levels
from instep.diffusion.path import VariancePreserving
from instep.diffusion.prediction import PredictionType

if TYPE_CHECKING:
    from diffusers import LCMScheduler

KINDS = {"eps": "epsilon", "x0": "sample", "v_prediction": "v_prediction"}
# LCM mixes c_skip x_t into its prediction, c_skip = 0.25 / ((scaling step)^2 + 0.25). At this scaling that is below 1e-12 from step 1 on, and, as a
# power of two keeps the root of the square exact, c_out = 1
SCALING = 2.0**20
# of alpha-bar, which the class keeps in float32
TOLERANCE = 1e-6


def vp_scheduler(path: VariancePreserving, levels: Sequence[float], prediction_type: PredictionType) -> LCMScheduler:
    """The scheduler whose `set_timesteps(len(levels))` gives the training steps of `levels` (t = k / N is step k - 1) and which re-noises between them.

    `LCMScheduler(original_inference_steps=m)` has every (N // m)-th step and takes n of them, evenly spaced: uniform levels n / n, ..., 1 / n with n
    a divisor of N, and a few more lists. Its alpha-bar equals the path's to one float32 unit, for any schedule. Raises ValueError for levels it
    cannot give (which is tried), for another number of steps than n, and for a network that predicts a velocity.
    """
    from diffusers import LCMScheduler

    check_levels(levels)
    if prediction_type not in KINDS:
        raise ValueError(f"prediction_type: {prediction_type!r} cannot be read by LCMScheduler; allowed: {', '.join(KINDS)}")
    if prediction_type == "eps" and path.table()[-1] == 0:
        raise ValueError("prediction_type: 'eps' does not determine x0 at zero terminal SNR, where x_t is the noise; allowed: v_prediction, x0")
    steps = training_steps(path, levels)
    for m in range(len(levels), path.steps + 1):
        if steps == lcm_steps(path.steps, m, len(levels)):
            break
    else:
        raise _no_such(path, levels)
    scheduler = LCMScheduler(
        num_train_timesteps=path.steps,
        trained_betas=float32_betas(path),
        original_inference_steps=m,
        prediction_type=KINDS[prediction_type],
        clip_sample=False,
        timestep_scaling=SCALING,
        set_alpha_to_one=True,
        rescale_betas_zero_snr=False,
    )
    scheduler.set_timesteps(len(levels))
    off = float((scheduler.alphas_cumprod.double() - path.table()[1:]).abs().max())
    # not <=: a NaN must not pass
    if scheduler.timesteps.tolist() != steps or not off <= TOLERANCE:
        raise ValueError(f"levels: LCMScheduler gives the steps {scheduler.timesteps.tolist()} for {steps}, and alpha-bar off by {off:.1g}; report this")
    return scheduler


def training_steps(path: VariancePreserving, levels: Sequence[float]) -> list[int]:
    """Returns the training steps k - 1 of the levels k / N. Raises ValueError for a level between steps, and for step 0, which LCM leaves unchanged."""
    steps = [round(t * path.steps) - 1 for t in levels]
    # few_step_levels rounds to seven digits
    if any(abs((step + 1) / path.steps - t) > 2e-7 for step, t in zip(steps, levels, strict=True)) or steps[-1] < 1:
        raise _no_such(path, levels)
    return steps


def lcm_steps(total: int, original: int, n: int) -> list[int]:
    """Returns the timesteps of `LCMScheduler.set_timesteps(n)` with `original_inference_steps` = original, of `total` training steps."""
    k = total // original
    return [(original - int(math.floor(i))) * k - 1 for i in np.linspace(0, original, num=n, endpoint=False)]


def _no_such(path: VariancePreserving, levels: Sequence[float]) -> ValueError:
    n = len(levels)
    fits = [m for m in range(1, 17) if path.steps % m == 0]
    return ValueError(
        f"levels: {list(levels)} cannot be represented by LCMScheduler, which has {path.steps} training steps and spaces those it takes evenly; allowed: "
        f"uniform levels (shift 1) of {', '.join(map(str, fits))} or another number of steps that divides {path.steps}; train with shift 1"
        + ("" if n in fits else f" and {max((m for m in fits if m < n), default=1)} steps instead of {n}")
    )


def float32_betas(path: VariancePreserving) -> list[float]:
    """Betas whose running product in float32 is the path's alpha-bar: each one compensates for the rounding of those before it."""
    betas, product = [], 1.0
    for bar in path.table()[1:].tolist():
        beta = torch.tensor(1 - bar / product, dtype=torch.float32)
        betas.append(float(beta))
        product *= float(1.0 - beta)
    return betas
