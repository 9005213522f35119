"""The section of docs/results.md on DM-Align's readings, from what benchmarks/align.py measured."""

from __future__ import annotations

import json
import statistics

from align import LAB_STEPS, READINGS, RESULTS

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


def lines() -> list[str]:
    """The section; empty as long as nothing was measured."""
    lab = lab_table()
    if not lab:
        return []
    about = "In the exact laboratory (ring8, half of the modes rewarded, 1,500 iterations, three members):"
    return ["## Readings of DM-Align", "", "`python benchmarks/align.py`. What each reading is: [errata.md](errata.md).", "", about, "", *lab, ""]
