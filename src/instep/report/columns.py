"""The columns of the report's tables: what the runs recorded about their metrics."""

from __future__ import annotations

from collections.abc import Sequence

from instep.metrics.columns import Column
from instep.metrics.figures import Value
from instep.report.read import RunRecord


def columns_of(runs: Sequence[RunRecord]) -> tuple[Column, ...]:
    """The columns that the runs recorded, each key once, in their order."""
    found: dict[str, Column] = {}
    for run in runs:
        for column in run.metrics.columns if run.metrics else ():
            found.setdefault(column.key, column)
    return tuple(found.values())


def with_error(column: Column, value: Value) -> str:
    """`0.912 ± 0.031`, two standard errors; the error is left out where none was estimated."""
    error = f" <small>± {column.text(2 * value.se)}</small>" if value.se else ""
    return column.text(value.value) + error
