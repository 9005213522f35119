"""A run's logged rows, in the form that the health checks read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instep.methods.recipe import Recipe, Stage

PERSIST = 2  # consecutive probes that must agree: one noisy probe of a few dozen samples is weak evidence
WINDOW = 20  # iterations of a rolling mean: one batch's cosine, loss or share of constant groups is noise

Row = Mapping[str, Any]


@dataclass(frozen=True)
class History:
    """All rows so far (oldest first), those of the present stage, the probes, and the probes of this stage with the one before it.

    Without `recipe` the checks that depend on a run's length are skipped. Probes of stages in which only critics learn are left out: the student
    does not change there.
    """

    rows: Sequence[Row]
    stage: Sequence[Row]
    probes: Sequence[Row]
    since: Sequence[Row]
    recipe: Recipe | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], recipe: Recipe | None = None) -> History:
        stage = [row for row in rows if row.get("stage") == rows[-1].get("stage")]
        idle = {s.name for s in recipe.stages if not s.terms} if recipe else set()
        seen = [row for row in probes(rows) if row.get("stage") not in idle]
        before = [row for row in seen if row["step"] < stage[0]["step"]]
        return cls(rows, stage, seen, before[-1:] + [row for row in seen if row["step"] >= stage[0]["step"]], recipe)

    @property
    def recipe_stage(self) -> Stage | None:
        """The recipe's stage that the newest row belongs to."""
        return next((s for s in self.recipe.stages if s.name == self.rows[-1].get("stage")), None) if self.recipe else None


def number(row: Row, key: str) -> float | None:
    """The scalar at `key`, or None where it is missing or not finite (the log writes null for those)."""
    value = row.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def probes(rows: Sequence[Row]) -> list[Row]:
    """Rows that carry probe metrics."""
    return [row for row in rows if number(row, "probe/mean_brightness") is not None]


def mean(rows: Sequence[Row], key: str) -> float | None:
    """Mean of a scalar over the rows that have it."""
    values = [value for row in rows if (value := number(row, key)) is not None]
    return sum(values) / len(values) if values else None
