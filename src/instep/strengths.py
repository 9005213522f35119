"""Strengths of guidance that a student is told: their ranges, and the embedding that tells them (Diffusion-APO Eq. 4, which draws omega and lambda).

Strengths are a pair (guidance, skip): w of classifier-free guidance (1: none; the paper's omega is w - 1) and lambda of skip-layer guidance (0: none).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

Strengths = tuple[float, float]

# of each strength: itself, and so many pairs of a sine and a cosine
PAIRS = 2
FEATURES = 2 * (1 + 2 * PAIRS)


@dataclass(frozen=True)
class Ranges:
    """What the strengths of guidance are drawn from: each uniformly between its two ends; equal ends: always that."""

    guidance: tuple[float, float]
    skip: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name, (low, high), least in (("draw", self.guidance, -math.inf), ("draw_skip", self.skip, 0.0)):
            if not least <= low <= high < math.inf:
                raise ValueError(f"{name}: {low:g} {high:g} is not allowed; two numbers{' from 0 on' if least == 0 else ''}, the lower one first")

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Self:
        """From its entry in a run's recipe.json."""
        (a, b), (c, d) = value["guidance"], value["skip"]
        return cls((float(a), float(b)), (float(c), float(d)))

    def __str__(self) -> str:
        skip = f", skip-layer guidance {_span(self.skip)}" if self.skip != (0, 0) else ""
        return f"guidance {_span(self.guidance)}{skip}"

    def draw(self, n: int, rng: torch.Generator) -> Tensor:
        """n independent pairs, [n, 2]."""
        low, high = self._ends(rng.device)
        return low + (high - low) * torch.rand(n, 2, generator=rng, device=rng.device)

    def check(self, strengths: Strengths) -> None:
        """ValueError for strengths outside of the ranges."""
        for name, value, (low, high) in zip(("guidance", "skip"), strengths, (self.guidance, self.skip), strict=True):
            if not low <= value <= high:
                raise ValueError(f"{name}: {value:g} is not allowed; the student is told {self}: stay in that range, or train with a wider one")

    def features(self, strengths: Tensor) -> Tensor:
        """What an embedding reads, [B, 2] -> [B, FEATURES]: each strength taken to [-1, 1], and sines and cosines of that."""
        low, high = self._ends(strengths.device)
        # of a range that is one point, the middle
        u = torch.where(high > low, 2 * (strengths - low) / (high - low).clamp(min=1e-12) - 1, 0.0)
        angle = 0.5 * math.pi * u[..., None] * torch.arange(1, PAIRS + 1, device=u.device)
        return torch.cat([u, angle.sin().flatten(1), angle.cos().flatten(1)], 1)

    def _ends(self, device: torch.device) -> tuple[Tensor, Tensor]:
        low, high = torch.tensor([self.guidance, self.skip], device=device).T
        return low, high


def _span(ends: tuple[float, float]) -> str:
    return f"{ends[0]:g} to {ends[1]:g}" if ends[0] != ends[1] else f"{ends[0]:g}"


class GuidanceEmbedding(nn.Module):
    """Strengths [B, 2] to what is added to the time embedding, [B, width]; float32. The last layer starts at zero: at first it says nothing.

    Meng et al. (2023, On Distillation of Guided Diffusion Models) tell w in the same place.
    """

    def __init__(self, ranges: Ranges, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.ranges = ranges
        self.hidden = nn.Linear(FEATURES, hidden, dtype=torch.float32)
        self.out = nn.Linear(hidden, width, dtype=torch.float32)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, strengths: Tensor) -> Tensor:
        return self.out(nn.functional.silu(self.hidden(self.ranges.features(strengths).to(self.hidden.weight))))


@torch.no_grad()
def fold(embedders: Sequence[nn.Module], embedding: GuidanceEmbedding, strengths: Strengths) -> None:
    """The time embedders (`Family.time_embedders`) say untold what they said when told `strengths`: it is added to their last layers' biases, in place."""
    told = embedding(torch.tensor([strengths], device=embedding.out.bias.device))[0]
    for embedder in embedders:
        bias: Any = embedder.linear_2.bias  # type: ignore[union-attr]
        bias.add_(told.to(bias))
