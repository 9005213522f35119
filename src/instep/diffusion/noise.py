"""Random numbers, one row a sample: of a generator that is drawn from for a whole batch, or of streams that each sample has of its own (`streams.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from instep.diffusion.streams import SampleStreams, SeveralStreams
from instep.diffusion.transfer import to_device

Rng = torch.Generator | SampleStreams
# candidates that `beta` draws for each gamma variable: each is taken with a probability above 0.95
CANDIDATES = 8


def randn(shape: Sequence[int], rng: Rng, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal noise of `shape` [n, ...] on `device` (dtype None: torch's default), drawn where the generator lives: a run's is on the host, so it draws
    the same numbers on every device."""
    dtype = dtype or torch.get_default_dtype()
    if isinstance(rng, SampleStreams):
        return to_device(rng.normal(shape, dtype), device)
    return to_device(torch.randn(tuple(shape), generator=rng, device=rng.device, dtype=dtype), device)


def rand(shape: Sequence[int], rng: Rng) -> Tensor:
    """Uniform numbers of `shape` [n, ...] in [0, 1), on the host."""
    return rng.uniform(shape, torch.get_default_dtype()) if isinstance(rng, SampleStreams) else torch.rand(tuple(shape), generator=rng)


def randint(high: int, n: int, rng: Rng) -> Tensor:
    """Integers [n] from 0 to high - 1, each as likely, on the host."""
    return rng.integers(high, n) if isinstance(rng, SampleStreams) else torch.randint(high, (n,), generator=rng)


def beta(a: float, b: float, n: int, rng: Rng) -> Tensor:
    """Numbers [n] of the distribution Beta(a, b) for a and b of 1 or more, on the host: X / (X + Y) of two gamma variables.

    These are Marsaglia and Tsang's (2000): d v of the first candidate v = (1 + z / sqrt(9 d))^3 with ln u < z^2 / 2 + d - d v + d ln v, where d is the shape
    less 1/3. A fixed number of candidates is drawn, so that draws stay in step; if all are refused, with a probability below 1e-10, the last one is taken.
    """
    d = torch.tensor([a, b], dtype=torch.float64)[:, None] - 1 / 3
    z, u = randn((n, 2, CANDIDATES), rng, "cpu", torch.float64), rand((n, 2, CANDIDATES), rng).double()
    v = (1 + z / (9 * d).sqrt()) ** 3
    taken = (v > 0) & (u.log() < z.square() / 2 + d - d * v + d * v.clamp(min=1e-300).log())
    taken[..., -1] = True
    x, y = (d * v.clamp(min=1e-300)).gather(2, taken.int().argmax(2, keepdim=True))[..., 0].unbind(1)
    return (x / (x + y)).to(torch.get_default_dtype())


def shared(rng: Rng) -> torch.Generator:
    """The generator of what all processes of a run draw alike."""
    return rng.shared if isinstance(rng, SampleStreams) else rng


def copy_of(rng: Rng) -> Rng:
    """One that draws again what `rng` is about to draw."""
    if isinstance(rng, SampleStreams):
        return rng.copy()
    again = torch.Generator(rng.device)
    again.set_state(rng.get_state())
    return again


def several(rngs: Sequence[Rng]) -> Rng:
    """One to draw from for several batches of one size at once, one batch after the other: each gets what its own streams draw. One generator is its own."""
    parts = [rng for rng in rngs if isinstance(rng, SampleStreams)]
    assert len(parts) == len(rngs) or all(rng is rngs[0] for rng in rngs), "several generators draw one after the other, and not together"
    return rngs[0] if len(rngs) == 1 or not parts else SeveralStreams(parts)


def branch(rng: Rng) -> Rng:
    """One to draw from any number of times; the next draws of streams do not depend on how often. A generator is its own."""
    return rng.branch() if isinstance(rng, SampleStreams) else rng
