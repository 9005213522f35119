"""The section of docs/results.md on several processes, from what benchmarks/communication.py measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from communication import RESULT

MB = 2**20


def lines() -> list[str]:
    """The section; empty as long as nothing was measured."""
    if not RESULT.is_file():
        return []
    found = json.loads(RESULT.read_text())
    cells: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in found["rows"]:
        cells.setdefault((row["recipe"], row["layout"]), {})[row["processes"]] = row
    same = all(row["same"] for row in found["rows"])
    return [
        "## Several processes",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/communication.py`: 1, 2 and 4 processes on the CPU (gloo) share an iteration of 8 samples, on a Wan "
        f"transformer of width {found['width']} and {found['layers']} blocks with random weights. *Least*: each weight is gathered once for a pass and, in "
        "blocks, once more for the backward pass; each gradient is combined once in an optimiser step. Bytes are those that a process sends by the best "
        "algorithms. Held are weights, gradients, moments and averages, as a part of what one process holds. Number and sizes of the collectives were "
        + ("the same" if same else "**not** the same")
        + " on all processes and for both seeds, in every row. The processes take turns on two cores, so there is no claim of speed.",
        "",
        "Beside the padding of shards, what is above the least are reduce-scatters: each loss has a backward pass of its own (a discriminator has two, a "
        "policy one a transition), after which its gradient is divided, so that no process ever holds a whole one. Whole on each are adapters, heads and "
        "DOLLAR's latent reward model. The CPU time a sample rises with the processes because each call of a network of this size costs the same for two rows "
        "as for eight.",
        "",
        "| recipe | networks | gathers | reduce-scatters | all-reduces | the same number on 4 | MB sent on 2, on 4 | of the least | held on 2, on 4 | "
        "CPU s a sample on 1, 2, 4 |",
        "|---" * 10 + "|",
        *(_row(name, layout, rows) for (name, layout), rows in cells.items()),
        "",
        f"Before the first iteration, with full copies of a network of width {found['start_width']} divided (the largest of all processes):",
        "",
        "| processes | CPU s of a process | memory after imports, MB | peak, MB | of it held, MB |",
        "|---" * 5 + "|",
        *(f"| {s['processes']} | {s['cpu_s']:.1f} | {s['imports_MB']:.0f} | {s['peak_MB']:.0f} | {s['held_MB']:.0f} |" for s in found["starts"]),
        "",
    ]


def _row(name: str, layout: str, rows: Mapping[int, Mapping[str, Any]]) -> str:
    two, four = rows[2], rows[4]
    kinds = ("gathers", "reduce_scatters", "others")
    alike = "yes" if all(two[kind] == four[kind] for kind in kinds) else "no: " + ", ".join(str(four[kind]) for kind in kinds)
    parts = [
        f"{two['sent_bytes'] / MB:.2f}, {four['sent_bytes'] / MB:.2f}",
        _pair([row["sent_bytes"] / row["least_bytes"] for row in (two, four)]),
        _pair([row["held_of_alone"] for row in (two, four)]),
        _pair([rows[count]["cpu_s_a_sample"] for count in sorted(rows)]),
    ]
    return f"| {name} | {layout} | " + " | ".join(str(two[kind]) for kind in kinds) + f" | {alike} | " + " | ".join(parts) + " |"


def _pair(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
