"""Random numbers of the samples of an iteration, each from a stream of its own.

Each number is a function of the iteration's key, of the number of the draw, and of the sample's place in the iteration's global batch (Philox, a counter-based
generator: Salmon et al. 2011). So a sample is drawn alike however many processes and micro-batches share the batch, and a process draws only its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# numbers that are made at a time: the intermediate ones are in double precision
CHUNK = 2**20
# of a draw that is repeated until it fits (`branch`): the numbers of its parts
BRANCH = 2**32
_LOW = 2**32 - 1


class SampleStreams:
    """The streams of one part of an iteration's samples: a micro-batch, or one process's share of it.

    `part` counts the parts of equal size in the order of their samples. Draws are made in one order by all parts, of rows in proportion to their samples:
    one a sample, or one a group. `shared` is the generator of what all processes draw alike, such as exits; `draws`
    counts those made so far.
    """

    def __init__(self, key: int, part: int, shared: torch.Generator, draws: int = 0) -> None:
        self.key, self.part, self.shared, self.draws = key, part, shared, draws

    def copy(self) -> SampleStreams:
        """Streams that go on from the same place."""
        return SampleStreams(self.key, self.part, self.shared, self.draws)

    def branch(self) -> SampleStreams:
        """Streams of which any number of draws may be made: these go on as after one draw."""
        self.draws += 1
        return SampleStreams(self.key, self.part, self.shared, self.draws * BRANCH)

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Standard normal numbers of `shape` [n, ...], on the host, by Box and Muller's method from 32 bits each."""
        n, size = shape[0], math.prod(shape[1:])
        half, exact = -(-size // 2), dtype if dtype == torch.float64 else torch.float32
        out = torch.empty(n, size, dtype=dtype)
        for rows, bits in self._bits(n, half):
            u, v = bits.view(torch.int32).to(exact).mul_(2.0**-32).split(half, 1)  # in [-1/2, 1/2]
            radius = (u + 0.5).clamp_(min=2.0**-33).log_().mul_(-2).sqrt_()
            angle = v * (2 * math.pi)
            out[rows] = torch.cat([radius * angle.cos(), radius.mul_(angle.sin_())], 1)[:, :size]
        return out.reshape(tuple(shape))

    def uniform(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Numbers of `shape` [n, ...] in [0, 1), on the host, multiples of 2^-24."""
        out = torch.empty(shape[0], math.prod(shape[1:]), dtype=dtype)
        for rows, bits in self._bits(*out.shape):
            out[rows] = ((bits >> 40) & (2**24 - 1)).to(dtype) * 2.0**-24
        return out.reshape(tuple(shape))

    def integers(self, high: int, n: int) -> Tensor:
        """Integers [n] from 0 to high - 1, each as likely, on the host."""
        out = torch.empty(n, dtype=torch.long)
        for rows, bits in self._bits(n, 1):
            out[rows] = (((bits[:, 0] >> 11) & (2**53 - 1)).double() * (high * 2.0**-53)).long()
        return out

    def _bits(self, n: int, size: int) -> Iterator[tuple[slice, Tensor]]:
        """64 random bits [rows, size] for each of this part's n rows, some rows at a time."""
        blocks = max(1, -(-size // 4))  # Philox makes four numbers at a time
        philox = np.random.Philox(key=np.array([self.key, self.draws], dtype=np.uint64), counter=np.array([self.part * n * blocks, 0, 0, 0], dtype=np.uint64))
        self.draws += 1
        each = max(1, CHUNK // max(size, 1))
        for start in range(0, n, each):
            rows = slice(start, min(start + each, n))
            bits = philox.random_raw((rows.stop - start) * blocks * 4).view(np.int64)
            yield rows, torch.from_numpy(bits).reshape(-1, blocks * 4)[:, :size].contiguous()


class SeveralStreams(SampleStreams):
    """The streams of several parts, whose rows come one part after the other: as many of each part, drawn as that part alone draws them."""

    def __init__(self, parts: Sequence[SampleStreams]) -> None:
        self.parts = list(parts)

    def copy(self) -> SeveralStreams:
        return SeveralStreams([part.copy() for part in self.parts])

    def branch(self) -> SeveralStreams:
        return SeveralStreams([part.branch() for part in self.parts])

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.cat([part.normal((shape[0] // len(self.parts), *shape[1:]), dtype) for part in self.parts])

    def uniform(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.cat([part.uniform((shape[0] // len(self.parts), *shape[1:]), dtype) for part in self.parts])

    def integers(self, high: int, n: int) -> Tensor:
        return torch.cat([part.integers(high, n // len(self.parts)) for part in self.parts])
