"""The laboratory's metrics as a table: mean and deviation over seeds, with exact samples beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from instep.lab.metrics import mean_sd, measure_exact
from instep.lab.run import SAMPLES, LabRun
from instep.lab.world import World
from instep.methods.recipe import describe

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {
    "quality": "within 3 sigma of a mode",
    "tv": "total variation of mass per mode",
    "energy": "squared energy distance",
    "rkl": "reverse KL",
    "spread": "squared radius on a mode, true .949",
    "share": "rewarded part of what is on a mode",
    "reached": "modes with a quarter of their mass",
}
EXACT = "exact"
SHOWN = ("quality", "tv", "share", "reached")


def rows(runs: Sequence[LabRun], world: World) -> list[tuple[str, dict[str, tuple[float, float]]]]:
    """Name and mean and deviation of every metric, exact samples first."""
    exact = [measure_exact(world.mixture, SAMPLES, seed, world.rewarded) for seed in range(max(2, world.members))]
    return [(EXACT, mean_sd(exact)), *((run.name, mean_sd(run.metrics)) for run in runs)]


def _columns(table: list[tuple[str, dict[str, tuple[float, float]]]]) -> list[str]:
    return [key for key in COLUMNS if key in table[0][1]]


def _cell(value: tuple[float, float], key: str) -> str:
    digits = 1 if key == "reached" else 4 if key == "energy" else 3
    return f"{value[0]:.{digits}f}" + ("" if math.isnan(value[1]) else f" ± {value[1]:.{digits}f}")


def markdown(runs: Sequence[LabRun], world: World) -> str:
    """The table as Markdown."""
    table = rows(runs, world)
    keys = _columns(table)
    lines = [f"| recipe | {' | '.join(keys)} | CPU s |", "|---" * (len(keys) + 2) + "|"]
    seconds = ["", *(f"{run.cpu_s:.0f}" for run in runs)]
    lines += [f"| {name} | {' | '.join(_cell(v[key], key) for key in keys)} | {s} |" for (name, v), s in zip(table, seconds, strict=True)]
    return "\n".join([*lines, "", *(f"- {key}: {COLUMNS[key]}" for key in keys), ""])


def rich_table(runs: Sequence[LabRun], world: World) -> Table:
    """The metrics that matter most, for the terminal; table.md has all of them."""
    from rich.table import Table

    table = rows(runs, world)
    keys = [key for key in _columns(table) if key in SHOWN]
    shown = Table("recipe", caption=f"mean ± deviation over {runs[0].world.members} seed(s); all metrics in table.md")
    for key in [*keys, "CPU s"]:
        shown.add_column(key, no_wrap=True)
    for (name, values), s in zip(table, ["", *(f"{run.cpu_s:.0f}" for run in runs)], strict=True):
        shown.add_row(name, *(_cell(values[key], key) for key in keys), s)
    return shown


def _plain(metrics: dict[str, float]) -> dict[str, float | None]:
    """Metrics for JSON; undefined ones (nan) are null."""
    return {key: value if math.isfinite(value) else None for key, value in metrics.items()}


def as_json(runs: Sequence[LabRun], world: World, options: Any) -> dict[str, Any]:
    """Everything that was measured, with the recipes in full."""
    return {
        "options": {key: str(value) for key, value in asdict(options).items()},
        "exact_samples": [_plain(measure_exact(world.mixture, SAMPLES, seed, world.rewarded)) for seed in range(max(2, world.members))],
        "runs": [
            {
                "name": run.name,
                "cpu_s": run.cpu_s,
                "curve": [{"step": shot.step, "figures": [_plain(row) for row in shot.metrics]} for shot in run.snapshots],
                "recipe": describe(run.recipe),
            }
            for run in runs
        ],
    }
