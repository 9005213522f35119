"""The section of docs/results.md on precision, from what benchmarks/precision.py measured."""

from __future__ import annotations

import json
from typing import get_args

from precision import ITERATIONS, RESULTS, Dtype
from stored import row_of

from instep.metrics.compare import combined

# what is better if it is higher (1) or lower (-1)
COLUMNS = {"heldout_both": ("right, held-out classifier", 1), "monitor_both": ("right, monitor", 1), "fd": ("FD", -1), "modes_motion": ("motions of 9", 1)}


def lines() -> list[str]:
    """The section; empty as long as nothing was measured."""
    found = {dtype: [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{dtype}-[0-9].json"))] for dtype in get_args(Dtype)}
    if not all(found.values()):
        return []
    text = [
        "## bfloat16 against float32",
        "",
        f"`python benchmarks/precision.py`: `dmd2`, {ITERATIONS} iterations on `moving-digits`, 612 samples a seed; trained weights, moments and "
        "averages are float32 in both. The last row is the difference in its standard errors; above 2, bfloat16 would be better than float32, below -2 worse.",
        "",
        "| computed in | seeds | " + " | ".join(what for what, _ in COLUMNS.values()) + " | CPU-s a run |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    values = {dtype: combined([row_of(one["row"]) for one in runs]).values for dtype, runs in found.items()}
    for dtype, runs in found.items():
        cells = [f"{values[dtype][key].value:.3f} ± {values[dtype][key].se:.3f}" for key in COLUMNS]
        seconds = sum(one["train_cpu_s"] for one in runs) / len(runs)
        text.append(f"| {dtype} | {len(runs)} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    wide, narrow = (values[dtype] for dtype in get_args(Dtype))
    errors = {key: (wide[key].se ** 2 + narrow[key].se ** 2) ** 0.5 for key in COLUMNS}
    better = [f"{sign * (narrow[key].value - wide[key].value) / errors[key]:+.1f}" for key, (_, sign) in COLUMNS.items()]
    return [*text, "| difference, standard errors | | " + " | ".join(better) + " | |", ""]
