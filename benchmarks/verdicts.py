"""What the sections of docs/results.md share: claims beside what was found, and how a difference is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from instep.metrics.compare import Row, difference
from instep.metrics.figures import Value

Claim = tuple[str, Callable[[], tuple[str, str]]]


def word(yes: bool, partly: bool = False) -> str:
    return "reproduced" if yes else "partly" if partly else "not reproduced"


def claims_table(claims: Sequence[Claim]) -> list[str]:
    """The table of claims: each one's verdict and numbers; "not measured" where it misses a row or a metric (KeyError)."""
    lines = ["| claim | here | numbers |", "|---|---|---|"]
    for text, check in claims:
        try:
            verdict, numbers = check()
        except KeyError:
            verdict, numbers = "not measured", ""
        lines.append(f"| {text} | {verdict} | {numbers} |")
    return lines


def measured(names: Sequence[str], cell: Callable[[str], Row | None]) -> list[Row]:
    """The rows of cells; KeyError if one was not measured."""
    found = [cell(name) for name in names]
    for name, row in zip(names, found, strict=True):
        if row is None:
            raise KeyError(name)
    return [row for row in found if row]


def signed(value: Value) -> str:
    """A difference and its error, with its sign."""
    return f"{value.value:+.3f} ± {value.se:.3f}"


def differences(row: Row, other: Row, keys: Iterable[str], columns: Mapping[str, str]) -> str:
    """row - other with its error, metric by metric."""
    parts = []
    for key in keys:
        parts.append(f"{columns.get(key, key)} {signed(difference(row, other, key))}")
    return ", ".join(parts)
