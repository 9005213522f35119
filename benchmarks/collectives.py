"""What the processes of a run send each other in an iteration: the collectives of every recipe, counted for several numbers of processes.

    python benchmarks/collectives.py      # about two minutes; the table of docs/how_to/many_gpus.md

One process counts for all: each collective gets the answer of processes that hold the same, so that nothing is sent and the iteration goes on. Each process
has 4 samples. Adapters of rank 8 on the embedded default; the number and size of collectives must be the same for 2, 8 and 64 processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from instep.bundled.worlds import moving_digits
from instep.core.ranks import Ranks
from instep.methods.recipe import Recipe
from instep.recipes import NAMES, find
from instep.recipes.common import Common
from instep.rewards.base import as_reward
from instep.rewards.decoded import make_reward_fn, make_reward_grad_fn
from instep.training.batches import BatchSource
from instep.training.build import make_state
from instep.training.step import iteration

COUNTS, SAMPLES = (2, 8, 64), 4
RECIPES = {
    "dmd2": {},
    "dm-align-group": {"distil": 0, "group": 4},
    "amd": {"group": 4},
    "dmdr": {"warm": 0, "group": 4},
    "rl-after": {"distil": 0, "group": 4},
}


@contextmanager
def counted(count: int) -> Iterator[list[int]]:
    """The bytes of each collective inside, in a process among `count` that hold the same."""
    sizes: list[int] = []

    def alike(x: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        sizes.append(x.nbytes)
        if op == dist.ReduceOp.SUM:
            x *= count

    real, dist.all_reduce = dist.all_reduce, alike
    try:
        yield sizes
    finally:
        dist.all_reduce = real


def recipe_of(name: str, count: int) -> Recipe:
    common = Common(steps=4, batch=SAMPLES * count, critic_updates=5, lora_rank=8)
    return find(name)(common, iterations=5, **RECIPES[name])


def sent(name: str, count: int) -> tuple[list[int], int, int]:
    """The bytes of each collective of an iteration that measures no gradient alone; the bytes of the trained roles' gradients, and their optimiser steps."""
    world = moving_digits()
    reward, recipe = as_reward(world.reward), recipe_of(name, count)
    ranks = Ranks(count - 1, count)
    state = make_state(recipe, world.family, 0, make_reward_fn(world.family, reward), make_reward_grad_fn(world.family, reward), ranks=ranks)
    stage = replace(recipe.stages[-1], steps=5)
    source = BatchSource(world.family, world.prompts, None, 0, ranks=ranks)
    with counted(count) as sizes:
        iteration(state, stage, source.next(stage), 0.6)
    steps = {"student": 1} | {critic.role: critic.updates for critic in stage.critics}
    gradients = sum(times * sum(p.nbytes for p in state.trained[role].masters.values()) for role, times in steps.items())
    return sizes, gradients, sum(steps.values())


def main() -> None:
    torch.set_num_threads(1)
    print("| recipe | optimiser steps | collectives | MB | of these gradients |\n|---|---|---|---|---|")
    for name in RECIPES:
        assert name in NAMES
        sizes, gradients, steps = sent(name, COUNTS[0])
        for count in COUNTS[1:]:
            assert sent(name, count)[0] == sizes, f"{name} sends something else with {count} processes"
        print(f"| {name} | {steps} | {len(sizes)} | {sum(sizes) / 1e6:.3f} | {gradients / sum(sizes):.2%} |")


if __name__ == "__main__":
    main()
