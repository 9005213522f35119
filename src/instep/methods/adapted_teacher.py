"""The teacher of a matching force: fixed, or adapted to the student by an adapter that is annealed away (MagicDistillation, DynaDG)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Annealed:
    """Scale of the teacher's adapter over a stage: `start` x half-cosine to 0 at `until` of it, and 0 from there on.

    At 0 the teacher is the pretrained one again, so the final target is the real distribution. Near the scale of the fake's own adapter (1)
    teacher and fake would agree and the force would vanish; MagicDistillation stays well below.
    """

    start: float = 0.5
    """Scale at the start of the stage."""
    until: float = 0.75
    """Fraction of the stage at which it reaches zero."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise ValueError(f"start: {self.start} is not allowed; the adapter's scale lies in [0, 1), at 1 the teacher is as adapted as the fake")
        if not 0 < self.until <= 1:
            raise ValueError(f"until: {self.until} is not allowed; it is a fraction of the stage in (0, 1]")

    def at(self, progress: float) -> float:
        """The scale at `progress` in [0, 1] of the stage."""
        return self.start * 0.5 * (1 + math.cos(math.pi * min(progress / self.until, 1.0)))
