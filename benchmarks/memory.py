"""Peak memory of full-copy roles against LoRA roles on one shared backbone.

    python benchmarks/memory.py

Each number is the largest resident memory of a fresh process that runs two iterations of `dmd2` on a Wan transformer with random
weights, large enough for weights to dominate, less what the process held before the network was built.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from iteration_cost import RandomWan

from instep.core.files import write_json
from instep.data.prompt import as_prompts
from instep.methods.term import Batch
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.training.build import make_state
from instep.training.execution import Execution
from instep.training.step import iteration


def peak() -> float:
    """Largest resident memory of this process so far, in GB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def child(lora_rank: int | None, checkpointing: bool, width: int, layers: int) -> None:
    torch.set_num_threads(1)
    before = peak()
    family = RandomWan(width, layers, (16, 3, 6, 6), 8)
    recipe = dmd2(Common(batch=2, critic_updates=1, lora_rank=lora_rank))
    state = make_state(recipe, family, 0, None, execution=Execution(checkpointing="on" if checkpointing else "off"))
    batch = Batch(as_prompts(["a", "b"]), family.encode(["a", "b"]), family.unconditional(["a", "b"]))
    for _ in range(2):
        iteration(state, recipe.stages[0], [batch], 0.0)
    parameters = sum(p.numel() for name, p in family.pretrained.named_parameters() if "lora_" not in name)
    trained = sum(p.numel() for role in state.trained.values() for p in role.parameters.values())
    weights = 4 * parameters / 1e9
    print(
        json.dumps(
            {
                "roles": "full copies" if lora_rank is None else f"LoRA {lora_rank} on one backbone",
                "checkpointing": checkpointing,
                "parameters_M": round(parameters / 1e6, 1),
                "trained_M": round(trained / 1e6, 1),
                "peak_GB": round(peak() - before, 2),
                "copies_of_the_weights": round((peak() - before) / weights, 2),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--child", nargs=2, metavar=("RANK", "CHECKPOINTING"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(int(args.child[0]) or None, args.child[1] == "1", args.width, args.layers)
        return
    rows = []
    for rank, checkpointing in ((0, 0), (32, 0), (32, 1)):
        size = ["--width", str(args.width), "--layers", str(args.layers)]
        command = [sys.executable, __file__, *size, "--child", str(rank), str(checkpointing)]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        print(json.dumps(rows[-1]), flush=True)
    write_json(Path(__file__).parent / "results" / "memory.json", rows)


if __name__ == "__main__":
    main()
