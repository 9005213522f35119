"""Columns of a table of metrics: what a metric is called, what it means, and how many decimals it deserves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from instep.metrics.compare import direction


@dataclass(frozen=True)
class Column:
    """A metric: its key in metrics.json, heading, explanation and decimals.

    place: in the main table of the report or in the folded one. short: the heading in the terminal, where a metric without one is not shown. caption: of the
    report's chart against cost, where a metric without one is not drawn. verdict: whether a student is compared with others by it. largest:
    what the metric cannot exceed, 1 for a share.
    """

    key: str
    head: str
    meaning: str
    decimals: int = 2
    place: Literal["main", "more"] = "more"
    short: str = ""
    caption: str = ""
    verdict: bool = False
    largest: float | None = None

    @property
    def arrow(self) -> str:
        return {1: "↑", -1: "↓", 0: ""}[direction(self.key)]

    def text(self, value: float, *, sign: bool = False) -> str:
        value = round(value, self.decimals) + 0.0  # no "−0.000"
        return f"{value:{'+' if sign and value else ''}.{self.decimals}f}".replace("-", "−")

    def json(self) -> dict[str, Any]:
        return asdict(self)
