"""Rows of several runs in one table: seeds of one recipe as their mean, baselines that runs share once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

from instep.metrics.compare import Kind, Row, combined
from instep.report.read import RunRecord


def by_protocol(runs: Sequence[RunRecord]) -> list[tuple[str, list[RunRecord]]]:
    """Runs that were measured in the same way; distances at other numbers of samples cannot be compared."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        if run.metrics and run.metrics.rows:
            groups.setdefault(run.metrics.protocol, []).append(run)
    return list(groups.items())


def role_in(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """`student` if the run differs from the first of `runs` in its seed at most, else `control`."""
    return "student" if settings(run) == settings(runs[0]) else "control"


def settings(run: RunRecord) -> str:
    """What makes two runs the same up to their seed: recipe, levels and every setting."""
    recipe = run.recipe or {"unknown": str(run.folder)}
    return json.dumps({key: recipe.get(key) for key in ("unknown", "recipe", "model", "levels", "prompts", "start_from", "config")}, sort_keys=True)


def students(runs: Sequence[RunRecord]) -> list[Row]:
    """The first run's student, then its controls: students of other settings. Runs that differ in nothing but the seed are one row, their mean.

    Equal names of different settings are told apart by the run.
    """
    groups: dict[tuple[str, str], list[tuple[Row, RunRecord]]] = {}
    for run, row in _rows(runs):
        if row.kind == "student":
            groups.setdefault((row.name, settings(run)), []).append((row, run))
    names = [name for name, _ in groups]
    found = []
    for (name, _), members in groups.items():
        row, run = _mean([row for row, _ in members]), members[0][1]
        kind: Kind = "student" if role_in(run, runs) == "student" else "control"
        found.append(replace(row, kind=kind, name=f"{name}, {run.folder.name}" if names.count(name) > 1 else name))
    return found


def rows_of(runs: Sequence[RunRecord]) -> list[Row]:
    """All models by NFE, students first; a baseline that was measured several times as the mean of its different measurements."""
    rows = students(runs) + [row for row in _others(runs) if row.kind != "real"]
    return sorted(rows, key=lambda row: (row.nfe, row.kind != "student", row.name))


def real_rows(runs: Sequence[RunRecord]) -> list[Row]:
    """What no model made, in no competition with models: real videos through the VAE, then real-vs-real."""
    real_vs_real = real_vs_real_of(runs)
    return [row for row in _others(runs) if row.kind == "real"] + ([real_vs_real] if real_vs_real else [])


def real_vs_real_of(runs: Sequence[RunRecord]) -> Row | None:
    """The real-against-real row of the first run that has one."""
    return next((run.metrics.real_vs_real for run in runs if run.metrics and run.metrics.real_vs_real), None)


def _others(runs: Sequence[RunRecord]) -> list[Row]:
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for _, row in _rows(runs):
        if row.kind != "student":
            groups.setdefault((row.name, row.kind, row.nfe), []).append(row)
    return [_mean(same) for same in groups.values()]


def _rows(runs: Sequence[RunRecord]) -> Iterator[tuple[RunRecord, Row]]:
    for run in runs:
        for row in run.metrics.rows if run.metrics else ():
            yield run, row


def _mean(rows: Sequence[Row]) -> Row:
    different = [row for i, row in enumerate(rows) if row not in rows[:i]]
    return different[0] if len(different) == 1 else combined(different)
