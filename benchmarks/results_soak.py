"""The section of docs/results.md on long runs under signals, from what benchmarks/soak.py measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from soak import CASES, RESULTS, TOLERANCE, flat

WORLDS = {"lab": "the laboratory", "world": "moving-digits"}


def lines() -> list[str]:
    """The section; empty as long as nothing was measured."""
    found = [json.loads((RESULTS / f"{name}.json").read_text()) for name in CASES if (RESULTS / f"{name}.json").is_file()]
    if not found:
        return []
    text = [
        "## Long runs under signals",
        "",
        "`python benchmarks/soak.py lab` and `python benchmarks/soak.py world`: a run that nobody disturbs, and the same run under signals at random moments, "
        "started again after each. Growth is from the first to the last quarter of a process, without its first iterations, and of the killed ones "
        "the most; for the log it is that of the bytes a row from the first to the second half of the run. "
        f"'Flat' means that nothing grew by more than {TOLERANCE:.0%}; 'same' that all weights, averages and moments are the same bytes, and the log "
        "too, but for its seconds.",
        "",
        "| world | iterations | signals | processes | memory, most | its growth | open files, most | threads, most | log, bytes a row | its growth | flat | "
        "weights | log | temporary files left |",
        "|---" * 14 + "|",
    ]
    for one in found:
        for name in ("undisturbed", "killed"):
            text.append(f"| {WORLDS[one['case']]}, {name} | {one['iterations']} | {_row(one, name)} |")
    return [*text, ""]


def _row(one: Mapping[str, Any], name: str) -> str:
    got, disturbed = one[name], name == "killed"
    sent = ", ".join(f"{count} {signal}" for signal, count in one["signals"].items()) if disturbed else "-"
    cells = [
        sent,
        str(got["processes"]),
        f"{got['memory']['most'] / 1e6:.0f} MB",
        _percent(got["memory"]["growth"]),
        str(got["files"]["most"]),
        str(got["threads"]["most"]),
        f"{got['log']['bytes']:.0f}",
        _percent(got["log"]["growth"]),
        "yes" if flat(one) else "no",
        ("same" if one["same_weights"] else "differ") if disturbed else "-",
        ("same" if one["same_log"] else "differs") if disturbed else "-",
        str(len(one["left"])) if disturbed else "-",
    ]
    return " | ".join(cells)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"
