"""A bundled model distilled in float32 and in bfloat16, by the same recipe, prompts and noise: is the student of either worse?

    python benchmarks/precision.py --seeds 0 1 2     # about 4 minutes of CPU time a run
    make results                                     # docs/results.md from what was measured

A run is kept as benchmarks/results/precision/DTYPE-SEED.json; what is there is not run again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Literal, get_args

import torch
from measured import store

from instep.bundled import MOVING_DIGITS, find
from instep.recipes.dmd import dmd2
from instep.training.execution import Execution
from instep.training.options import RunOptions
from instep.training.run import train

RESULTS = Path(__file__).parent / "results" / "precision"
ITERATIONS = 60
Dtype = Literal["float32", "bfloat16"]


def run(dtype: Dtype, seed: int, runs: Path) -> None:
    """Trains and measures one student, unless its result is there. It is measured in the dtype that it computes in."""
    file = RESULTS / f"{dtype}-{seed}.json"
    if file.is_file():
        return
    place, began = find(MOVING_DIGITS), time.process_time()
    ready, recipe = place.ready(), dmd2(iterations=ITERATIONS)
    options = RunOptions(seed=seed, probe_every=ITERATIONS, save_every=ITERATIONS, keep=1, execution=Execution(dtype=dtype))
    done = train(recipe, ready.family, out=runs / f"{dtype}-{seed}", prompts=ready.prompts, reward=ready.reward, monitor=ready.monitor, options=options)
    store(file, done, recipe, place, dtype, seed=seed, began=began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/precision"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for dtype in get_args(Dtype):
            run(dtype, seed, args.runs)


if __name__ == "__main__":
    main()
