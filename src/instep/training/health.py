"""Health findings of a run: each is printed once when it begins and once when it clears, and is kept in health.jsonl. The checks are in `findings.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from instep.core.files import append_text
from instep.methods.recipe import Recipe
from instep.training.findings import CHECKS, Level
from instep.training.history import WINDOW, History, Row


@dataclass(frozen=True)
class Finding:
    """One finding: its level, a stable flag, and a sentence that describes it and what to do."""

    step: int
    level: Level
    flag: str
    text: str


@dataclass(frozen=True)
class Raised:
    """A flag that a run raised, with the steps at which it began and cleared (None: it was open at the end)."""

    flag: str
    level: Level
    step: int
    cleared: int | None
    text: str


def flags(folder: Path) -> list[Raised]:
    """Returns every flag that the run in `folder` raised, in order, from its health.jsonl; the run need not have been evaluated."""
    from instep.core.json_lines import read_rows

    raised: list[Raised] = []
    for row in read_rows(folder / "health.jsonl"):
        if row["level"] != "ok":
            raised.append(Raised(row["flag"], row["level"], row["step"], None, row["text"]))
        else:
            raised = [replace(r, cleared=row["step"]) if r.flag == row["flag"] and r.cleared is None else r for r in raised]
    return raised


def examine(rows: Sequence[Row], recipe: Recipe | None = None) -> list[Finding]:
    """Returns all findings at the last of `rows` (oldest first); without `recipe` the checks that depend on a run's length are left out."""
    if not rows:
        return []
    seen = History.of(rows, recipe)
    return [Finding(int(rows[-1]["step"]), level, flag, text) for check in CHECKS for level, flag, text in check(seen)]


def thin(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows that a check can still need: every probe, the beginning of each stage, and the newest rows. A long run has many more."""
    seen: dict[Any, int] = {}
    kept = []
    for i, row in enumerate(rows):
        seen[row.get("stage")] = seen.get(row.get("stage"), 0) + 1
        if "probe/mean_brightness" in row or seen[row.get("stage")] <= WINDOW or i >= len(rows) - 3 * WINDOW:
            kept.append(row)
    return kept


class HealthMonitor:
    """Checks a run's rows as they arrive; returns each finding when it begins and a notice when it clears, and keeps both in health.jsonl."""

    def __init__(self, folder: Path, *, resume_step: int = 0, recipe: Recipe | None = None) -> None:
        from instep.core.json_lines import read_rows, trim

        self._file = folder / "health.jsonl"
        trim(self._file, resume_step if resume_step else -1)
        self._recipe = recipe
        self._rows: list[Row] = []
        self._open: dict[str, Finding] = {}
        self._thin_at = 10 * WINDOW
        for row in read_rows(folder / "log.jsonl") if resume_step else ():
            if row["step"] <= resume_step:
                self._take(row)

    def _take(self, row: Row) -> list[Finding]:
        """Adds a row and returns its new findings. A flag can clear only at a probe."""
        self._rows.append(row)
        if len(self._rows) >= self._thin_at:  # only now and then: otherwise every row would scan the whole run
            self._rows = thin(self._rows)
            self._thin_at = len(self._rows) + 10 * WINDOW
        now, step = {finding.flag: finding for finding in examine(self._rows, self._recipe)}, int(row["step"])
        news = [finding for flag, finding in now.items() if flag not in self._open]
        if "probe/mean_brightness" in row:
            news += [Finding(step, "ok", flag, f"cleared: {flag}") for flag in self._open if flag not in now]
            self._open = now
        else:
            self._open = {**now, **self._open}
        return news

    def row(self, step: int, scalars: Row) -> list[Finding]:
        """Returns the findings that begin with this row, and the flags that clear with it."""
        news = self._take({"step": step, **scalars})
        if news:
            append_text(self._file, "".join(json.dumps(asdict(finding)) + "\n" for finding in news))
        return news
