"""Guidance scales that a student is conditioned on: their values and ranges (Diffusion-APO Eq. 4, which draws omega and lambda).

Guidance scales are a pair (guidance, skip): w of classifier-free guidance (1: none; the paper's omega is w - 1) and lambda of skip-layer guidance (0: none).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from instep.diffusion.noise import Rng, rand
from instep.diffusion.transfer import to_device

GuidanceScales = tuple[float, float]

# of each scale: itself, and so many pairs of a sine and a cosine
FREQUENCIES = 2


@dataclass(frozen=True)
class GuidanceRange:
    """What the guidance scales are drawn from: each uniformly between its two ends; equal ends: always that."""

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

    def draw(self, n: int, rng: Rng) -> Tensor:
        """n independent pairs, [n, 2]."""
        low, high = self._ends(torch.device("cpu"))
        return low + (high - low) * rand((n, 2), rng)

    def check(self, guidance_scales: GuidanceScales) -> None:
        """ValueError for guidance scales outside of the range."""
        for name, value, (low, high) in zip(("guidance", "skip"), guidance_scales, (self.guidance, self.skip), strict=True):
            if not low <= value <= high:
                raise ValueError(f"{name}: {value:g} is not allowed; the student is conditioned on {self}: stay in that range, or train with a wider one")

    def features(self, guidance_scales: Tensor) -> Tensor:
        """What an embedding reads, [B, 2] -> [B, FEATURES]: each scale taken to [-1, 1], and sines and cosines of that."""
        low, high = self._ends(guidance_scales.device)
        # of a range that is one point, the middle
        u = torch.where(high > low, 2 * (guidance_scales - low) / (high - low).clamp(min=1e-12) - 1, 0.0)
        angle = 0.5 * math.pi * u[..., None] * torch.arange(1, FREQUENCIES + 1, device=u.device)
        return torch.cat([u, angle.sin().flatten(1), angle.cos().flatten(1)], 1)

    def _ends(self, device: torch.device) -> tuple[Tensor, Tensor]:
        low, high = to_device(torch.tensor([self.guidance, self.skip]), device).T
        return low, high


def _span(ends: tuple[float, float]) -> str:
    return f"{ends[0]:g} to {ends[1]:g}" if ends[0] != ends[1] else f"{ends[0]:g}"
