"""What several processes cost on the bundled digits: bytes sent, memory of a rank, CPU time a sample, and the collectives of an iteration.

python benchmarks/many_ranks_cost.py
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moving_digits import RESULTS
from torch import Tensor

from instep.bundled import find as find_world
from instep.core.files import write_json
from instep.core.ranks import Ranks, joined
from instep.core.shards import local
from instep.data.prompt import as_prompts
from instep.models.borrow import tensors_of
from instep.recipes import find
from instep.recipes.common import Common
from instep.rewards.base import FunctionReward
from instep.rewards.decoded import make_reward_fn, make_reward_grad_fn
from instep.training.batches import BatchSource
from instep.training.build import make_state
from instep.training.execution import Execution
from instep.training.state import TrainState
from instep.training.step import iteration

FILE = RESULTS / "many_ranks.json"
COUNTS, BATCH, ITERATIONS = (1, 2, 4), 16, 2
RECIPES = {"dmd2": {}, "dm-align-group": {"group": 4, "top_n": 1, "distil": 0}, "amd": {"group": 4}, "dmdr": {"group": 4, "warm": 0}}
# of what each collective is given or gives, the part that a rank sends by a ring
SENT = {"all_reduce": 2.0, "all_gather_single": 1.0, "reduce_scatter_single": 1.0}


@dataclass(frozen=True)
class Cell:
    """One way to run a recipe."""

    recipe: str
    shard: str
    lora_rank: int | None

    @property
    def name(self) -> str:
        return f"{self.recipe}, {'adapters' if self.lora_rank else 'full copies'}, {'sharded' if self.shard == 'on' else 'replicated'}"


CELLS = [Cell(name, shard, rank) for name in RECIPES for rank in (None, 4) for shard in ("off", "on")]


@contextmanager
def counted(ranks: Ranks) -> Iterator[list[tuple[str, float]]]:
    """Each collective inside, and the bytes that a rank sends in it."""
    found: list[tuple[str, float]] = []
    before = {name: getattr(dist, name) for name in SENT}

    def counting(name: str, *args: Any, **kwargs: Any) -> Any:
        size = max(x.nbytes for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        found.append((name, SENT[name] * size * (ranks.count - 1) / ranks.count))
        return before[name](*args, **kwargs)

    for name in SENT:
        setattr(dist, name, partial(counting, name))
    try:
        yield found
    finally:
        for name in SENT:
            setattr(dist, name, before[name])


def held(state: TrainState) -> int:
    """Bytes of networks, float32 weights, moments and averages on this rank, each storage once."""
    tensors = [x for role in state.roles.values() for x in tensors_of(role.backbone.module).values()]  # type: ignore[attr-defined]
    for trained in state.trained.values():
        moments = [x for kept in trained.optimizer.state.values() for x in kept.values() if isinstance(x, Tensor)]
        tensors += [*trained.parameters.values(), *trained.masters.values(), *moments, *(trained.ema or {}).values()]
    storages = {local(x.detach()).untyped_storage() for x in tensors}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure(cell: Cell, ranks: Ranks) -> dict[str, Any]:
    family = find_world("digits").load()
    execution = Execution(device="cpu", shard=cell.shard)  # type: ignore[arg-type]
    recipe = find(cell.recipe)(Common(steps=2, batch=BATCH, critic_updates=1, lora_rank=cell.lora_rank, ema=0.9), **RECIPES[cell.recipe])
    placed = execution.place(family, execution.shards(recipe, family, ranks))
    reward = FunctionReward(lambda media, prompts: media.flatten(1).mean(1), "brightness", differentiable=True)
    state = make_state(recipe, placed, 0, make_reward_fn(placed, reward), make_reward_grad_fn(placed, reward), execution=execution, ranks=ranks)
    prompts = as_prompts([f"a {word}" for word in ("zero", "one", "two", "three")])
    stage, source = next(stage for stage in recipe.stages if stage.steps), BatchSource(placed, prompts, None, 0, None, None, ranks)
    iteration(state, stage, source.next(stage), 0.0)  # AdamW makes its moments
    with counted(ranks) as sent:
        began = time.process_time()
        for _ in range(ITERATIONS):
            iteration(state, stage, source.next(stage), 0.5)
        cpu = time.process_time() - began
    updates = {"student": stage.inner_epochs} | {critic.role: critic.updates for critic in stage.critics}
    gradients = sum(times * sum(p.numel() * p.element_size() for p in state.trained[name].masters.values()) for name, times in updates.items())
    return {
        "bytes": sum(size for _, size in sent) / ITERATIONS,
        "least": 2 * (ranks.count - 1) / ranks.count * gradients,
        "memory": held(state),
        "cpu_s": cpu / ITERATIONS * ranks.count / BATCH,
        "collectives": [len([1 for kind, _ in sent if kind == name]) / ITERATIONS for name in SENT],
    }


def of_processes(count: int) -> list[dict[str, Any]]:
    """What rank 0 of `count` measures in each cell."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = Path(tempfile.mkdtemp()) / "measured.json"
    children = []
    for rank in range(count):
        if (child := os.fork()) == 0:
            there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in there.items()})
            status = 1
            try:
                with joined() as ranks:
                    found = [measure(cell, ranks) for cell in CELLS]
                if rank == 0:
                    write_json(out, found)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise SystemExit(f"a process of {count} failed")
    return json.loads(out.read_text(encoding="utf-8"))


def main() -> None:
    torch.set_num_threads(1)
    write_json(FILE, {str(count): {cell.name: one for cell, one in zip(CELLS, of_processes(count), strict=True)} for count in COUNTS})


if __name__ == "__main__":
    main()
