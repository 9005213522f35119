"""The section of docs/results.md on several processes, from what benchmarks/many_ranks_cost.py measured."""

from __future__ import annotations

import json

from many_ranks_cost import BATCH, FILE


def lines() -> list[str]:
    """The section; empty as long as nothing was measured."""
    if not FILE.is_file():
        return []
    found = json.loads(FILE.read_text(encoding="utf-8"))
    counts = [count for count in found if count != "1"]
    text = [
        "## Several processes",
        "",
        f"`python benchmarks/many_ranks_cost.py`: one iteration of {BATCH} samples on the bundled digits, on a CPU (gloo), each process with one thread. MB "
        "sent: what a rank sends by a ring, and in brackets its ratio to the mean of all gradients once in each optimiser step. Memory: networks, float32 "
        "weights, moments and averages of a rank, as a part of those of one process. CPU time: of all processes, a sample, in one process's. These networks "
        "are small: no speed-up is claimed. Collectives: averages, gathers and divisions in an iteration, of each number of processes where they differ.",
        "",
        "| run | " + " | ".join(f"MB sent, {n} | memory, {n} | CPU time, {n}" for n in counts) + " | collectives |",
        "|---" * (3 * len(counts) + 2) + "|",
    ]
    for name, alone in found["1"].items():
        cells = []
        for n in counts:
            one = found[n][name]
            cells += [
                f"{one['bytes'] / 1e6:.2f} ({one['bytes'] / one['least']:.2f})",
                f"{one['memory'] / alone['memory']:.2f}",
                f"{one['cpu_s'] / alone['cpu_s']:.2f}",
            ]
        each = {" + ".join(f"{number:g}" for number in found[n][name]["collectives"]) for n in counts}
        text.append(f"| {name} | " + " | ".join(cells) + f" | {' / '.join(sorted(each))} |")
    return [*text, ""]
