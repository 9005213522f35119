"""Bands of levels: which of two experts of a model works at a level, and levels drawn within one band."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from instep.diffusion.noise import Rng, branch

Band = tuple[float, float]  # the levels from low to high
WHOLE: Band = (0.0, 1.0)
TRIES = 32  # draws of a level sampler before what still lies outside a band is mapped into it


def bands_of(boundary: float | None) -> tuple[Band, ...]:
    """The bands of a model: one of all levels, or with a `boundary` in (0, 1) those at and above it, and those below it."""
    return (WHOLE,) if boundary is None else ((boundary, 1.0), (0.0, boundary))


def in_band(t: Tensor, band: Band) -> Tensor:
    """Whether each level lies in the band, [B] booleans; a level at the boundary belongs to the upper band."""
    low, high = band
    return (t >= low) & ((t < high) if high < 1 else (t <= high))


def draw_in_band(draw: Callable[[Rng], Tensor], band: Band, rng: Rng) -> Tensor:
    """Levels [n] of a sampler, given that they lie in the band: those outside are drawn again.

    `draw` draws n levels from what it is given. The band of all levels takes the first draw as it is. What lies outside after `TRIES` draws, because the
    sampler (almost) never falls into the band, is mapped into it linearly.
    """
    if band == WHOLE:
        return draw(rng)
    # how often is up to the slowest of the samples at hand
    own = branch(rng)
    t = draw(own)
    for _ in range(TRIES):
        inside = in_band(t, band)
        if bool(inside.all()):
            return t
        t = torch.where(inside, t, draw(own).to(t))
    low, high = band
    # below 1 the upper end belongs to the other band
    return torch.where(in_band(t, band), t, low + (high - low) * t.clamp(1e-3, 1 - 1e-3))
