"""What several processes compute for the cases of families, for `test_families.py`; by hand: RANK=0 WORLD_SIZE=1 python tests/family_ranks.py FILE NAME..."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import every_recipe
import many_ranks
import torch
from family_cases import CASES, prompts_of
from safetensors.torch import save_file
from torch import Tensor

from instep.core.ranks import Ranks, joined
from instep.models.families import family_of
from instep.recipes.common import Common
from instep.recipes.dm_align import dm_align_group
from instep.training.execution import Execution
from instep.training.step import iteration

KINDS: Mapping[str, int | None] = {"full": None, "LoRA": 2}  # of an adapter its rank
# every network divided, and blocks and rows computed again in the backward pass
SHARDED_ROWS = Execution(device="cpu", shard="on", checkpointing="on", micro_batch=1)


@cache
def pipeline_of(case: str) -> Any:
    """The case's pipeline in double precision, which no run changes."""
    with many_ranks.double():
        return CASES[case].make()


def trained(name: str, ranks: Ranks, execution: Execution) -> dict[str, Tensor]:
    """Weights, moments, averages and the log of one iteration of DM-Align (Group) on the tiny pipeline of CASE/KIND, in double precision."""
    case, kind = CASES[name.rpartition("/")[0]], name.rpartition("/")[2]
    shared = Common(steps=2, batch=4, critic_updates=1, shift=case.shift, guidance=case.guidance, guidance_2=case.guidance_2, lora_rank=KINDS[kind])
    recipe = dm_align_group(shared, distil=0, iterations=1, group=2, top_n=1)
    with TemporaryDirectory() as folder, many_ranks.double():  # a folder of first frames
        placed = execution.place(many_ranks.wide(family_of(pipeline_of(case.name), case.size, name="tiny")))
        state = every_recipe.state_of(recipe, placed, execution, ranks=ranks)
        source = every_recipe.batches_of(placed, ranks=ranks, prompts=prompts_of(case, Path(folder)))
        (stage,) = (stage for stage in recipe.stages if stage.steps)
        return many_ranks._everything(state, iteration(state, stage, source.next(stage), 0.0))


def check(name: str, found: Sequence[Mapping[str, Tensor]], alone: Mapping[str, Tensor]) -> None:
    """Each process, by rank, ends with what one process computes `alone`."""
    for rank, results in enumerate(found):
        mine = {key.partition("|")[2]: x for key, x in results.items() if key.startswith(f"{name}|")}
        assert mine.keys() == alone.keys() and any(key.startswith("student/") for key in alone)
        for key, x in alone.items():
            torch.testing.assert_close(
                mine[key], x, rtol=1e-9, atol=1e-11, equal_nan=True, msg=lambda text, key=key, rank=rank: f"{key} of rank {rank}: {text}"
            )


def main(file: str, *names: str) -> None:
    torch.set_num_threads(1)
    with joined() as ranks:
        found = {f"{name}|{key}": x for name in names for key, x in trained(name, ranks, SHARDED_ROWS).items()}
        save_file(found, Path(f"{file}-{ranks.rank}.safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
