"""The section of docs/results.md on long runs under signals, from what benchmarks/soak.py measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from soak import CASES, RESULTS, TOLERANCE, flat, growth

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
        "started again after each. Growth in the undisturbed run is from the first quarter of its process to the last one. In the killed run it is from the "
        "most that one of the first half of its processes held to the most of the second half: each is short, and it counts whether a later one needs more. "
        "Growth of the log is that of its "
        f"bytes a row, from the first half of the run to the second. 'Flat' means that nothing grew by more than {TOLERANCE:.0%}; 'same' that all weights, "
        "averages and moments are the same bytes, and the log too, but for its seconds.",
        "",
        "| world | iterations | signals | processes | memory, most | its growth | open files, most | their growth | threads, most | their growth | "
        "log, bytes a row | its growth | flat | weights | log | temporary files left |",
        "|---" * 16 + "|",
    ]
    for one in found:
        for name in ("undisturbed", "killed"):
            text.append(f"| {WORLDS[one['case']]}, {name} | {one['iterations']} | {_row(one, name)} |")
    return [*text, ""]


def _row(one: Mapping[str, Any], name: str) -> str:
    got, disturbed, grown = one[name], name == "killed", growth(one, name)
    sent = ", ".join(f"{count} {signal}" for signal, count in one["signals"].items()) if disturbed else "-"
    most = {key: max(values) for key, values in got["most"].items()}
    cells = [
        sent,
        str(len(got["most"]["memory"])),
        f"{most['memory'] / 1e6:.0f} MB",
        f"{grown['memory']:+.1%}",
        str(most["files"]),
        f"{grown['files']:+.1%}",
        str(most["threads"]),
        f"{grown['threads']:+.1%}",
        f"{got['log'][1]:.0f}",
        f"{grown['log']:+.1%}",
        "yes" if flat(one) else "no",
        ("same" if one["same_weights"] else "differ") if disturbed else "-",
        ("same" if one["same_log"] else "differs") if disturbed else "-",
        str(len(one["left"])) if disturbed else "-",
    ]
    return " | ".join(cells)
