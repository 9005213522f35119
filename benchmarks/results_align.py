"""The section of docs/results.md on DM-Align's readings, from what benchmarks/align.py measured."""

from __future__ import annotations

import json
import statistics

from align import CELLS, LAB_STEPS, OPTIONS, READINGS, RESULTS
from stored import row_of

from instep.metrics.compare import combined

COLUMNS = {
    "heldout_both": "right, held-out classifier",
    "monitor_both": "right, monitor",
    "fd": "FD",
    "modes_motion": "motions of 9",
    "modes_digit": "digits of 10",
    "mean_brightness": "mean brightness",
}
# of the laboratory: share of samples on a mode, share of those that is on a rewarded one, modes with samples
LAB = {"quality": "quality", "share": "rewarded share", "reached": "modes of 8"}
UNMEASURED = " | ".join("-" for _ in LAB)


def _lab(name: str, steps: int) -> str:
    """The metrics in LAB of one reading, means over its members."""
    file = RESULTS / f"lab-{steps}-{name}.json"
    if not file.is_file():
        return UNMEASURED
    end = json.loads(file.read_text())["runs"][0]["curve"][-1]["figures"]
    # a member without a sample on any mode has no share
    means = [[member[key] for member in end if member[key] is not None] for key in LAB]
    return " | ".join(f"{statistics.mean(values):.3f}" if values else "-" for values in means)


def lab_table() -> list[str]:
    """Every reading that was measured in the laboratory."""
    heads = [f"{what}, {steps} step{'s' * (steps > 1)}" for steps in LAB_STEPS for what in LAB.values()]
    lines = ["| reading | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, (_, what) in READINGS.items():
        cells = [_lab(name, steps) for steps in LAB_STEPS]
        if any(cell != UNMEASURED for cell in cells):
            lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return lines if len(lines) > 2 else []


def world_table(world: str) -> list[str]:
    """Every cell that was measured on a world, all seeds together."""
    lines = ["| student | seeds | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, cell in CELLS.items():
        rows = [row_of(json.loads(file.read_text())["row"]) for file in sorted(RESULTS.glob(f"{world}-{name}-[0-9].json"))]
        if rows:
            values = combined(rows).values
            cells = [f"{values[key].value:.3f} ± {values[key].se:.3f}" if key in values else "-" for key in COLUMNS]
            lines.append(f"| {cell.what} | {len(rows)} | " + " | ".join(cells) + " |")
    return lines if len(lines) > 2 else []


def lines() -> list[str]:
    """The section; empty as long as nothing was measured."""
    lab, worlds = lab_table(), {world: world_table(world) for world in OPTIONS}
    if not lab and not any(worlds.values()):
        return []
    text = ["## Readings of DM-Align", "", "`python benchmarks/align.py lab` and `world`. What each reading is: [errata.md](errata.md).", ""]
    if lab:
        text += [
            "In the exact laboratory (ring8, half of the modes rewarded, 1,500 iterations, three members). Quality is the share of samples on a mode, the "
            "rewarded share is of those, and a mode counts if it holds a quarter of its due mass or more; 4 modes of 8 are rewarded:",
            "",
            *lab,
            "",
        ]
    for world, table in worlds.items():
        if table:
            text += [f"On `{world}` with guidance {OPTIONS[world].guidance:g}, 612 samples a seed:", "", *table, ""]
    return text
