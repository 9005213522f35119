"""What several processes send, hold and compute: 1, 2 and 4 of them share a run of each recipe, on the CPU by gloo.

    OMP_NUM_THREADS=1 python benchmarks/communication.py

A Wan transformer with random weights: full copies divided among the processes, adapters on a divided network and on a whole one. Of two iterations with other
seeds, after three others: number and bytes of the collectives; the least that the algorithm needs; bytes of weights, gradients, moments and averages that a
process holds; CPU time of all processes together. Before the first iteration: CPU time and largest memory of a process. On a machine of few cores the processes
take turns, so nothing here is a claim of speed. Writes benchmarks/results/communication.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from collectives import counted
from iteration_cost import RandomWan
from torch import Tensor, nn

from instep.core.files import write_json
from instep.core.ranks import Ranks, joined
from instep.core.shards import is_divided, local
from instep.data.prompt import as_prompts
from instep.data.samples import PairSamples, RealSamples, TeacherSamples
from instep.methods.recipe import Recipe
from instep.recipes import find
from instep.recipes.common import Common
from instep.recipes.many_step import ManySteps
from instep.training.batches import BatchSource
from instep.training.build import make_state
from instep.training.execution import Execution
from instep.training.state import TrainedParams, TrainState
from instep.training.step import iteration

RESULT = Path(__file__).parent / "results" / "communication.json"
COUNTS, BATCH, SEEDS = (1, 2, 4), 8, (1, 2)
# the iterations that are not measured: those in which terms are measured alone are among them, of a stage of so many steps
WARM_UP, STEPS = 3, 10
# each recipe's last stage, with the parts that its defaults leave out
OPTIONS: dict[str, dict[str, Any]] = {
    "dmd2": {"gan": 0.01},
    "dm-align-group": {"distil": 0, "group": 2, "top_n": 1},
    "flow-grpo": {"group": 2, "kl": 0.1},
    "amd": {"group": 2},
    "dmdr": {"warm": 0, "group": 2},
    "dollar": {"fit": 0, "cd_steps": 2},
    "apo": {"online": 1, "half_online": 0, "offline": 0, "distill_guidance": 0, "post_distillation": 0, "high": 1, "low": 1},
}
# name -> rank of the adapters (None: full copies), whether networks are divided
LAYOUTS: dict[str, tuple[int | None, Literal["on", "off"]]] = {"full, sharded": (None, "on"), "LoRA, sharded": (4, "on"), "LoRA": (4, "off")}
# what a process sends of a collective of n processes, in parts of its bytes, by the best algorithms: gathered and divided tensors count whole
SENDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1}
PROMPTS = as_prompts(["a", "b", "c", "d"])


def recipe_of(name: str, lora_rank: int | None) -> Recipe:
    many = name in ("flow-grpo", "apo")
    common = ManySteps(steps=3, batch=BATCH, lora_rank=lora_rank) if many else Common(steps=2, batch=BATCH, critic_updates=1, lora_rank=lora_rank)
    return find(name)(common, **OPTIONS[name])


class Least:
    """The bytes that an iteration cannot avoid: divided weights are gathered once for each pass of a network, and those of each block, which are freed after
    it, once more if a gradient passes back through it; gradients of trained parameters are combined once in an optimiser step."""

    def __init__(self, state: TrainState) -> None:
        self.clear()
        for module in dict.fromkeys(role.backbone.module for role in state.roles.values()):
            for part in (module, *module.blocks):
                size = sum(p.nbytes for p in part.parameters() if is_divided(p))
                part.register_forward_hook(partial(self._passed if part is module else self._passed_block, size))
        for trained in state.trained.values():
            sizes = [(p.nbytes, is_divided(p)) for p in trained.masters.values()]
            trained.optimizer.register_step_pre_hook(partial(self._stepped, sum(n for n, d in sizes if d), sum(n for n, d in sizes if not d)))

    def clear(self) -> None:
        self.gathered = self.combined = self.averaged = 0

    def _passed(self, size: int, module: nn.Module, args: Any, output: Any) -> None:
        self.gathered += size

    def _passed_block(self, size: int, block: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._went_back, size))

    def _went_back(self, size: int, grad: Tensor) -> None:
        self.gathered += size

    def _stepped(self, divided: int, whole: int, *_: Any) -> None:
        self.combined += divided
        self.averaged += whole

    def bytes(self, count: int) -> float:
        """Those that each of `count` processes sends."""
        return (count - 1) / count * (self.gathered + self.combined + 2 * self.averaged)


def inputs(family: RandomWan, recipe: Recipe, seed: int, ranks: Ranks) -> BatchSource:
    """Prompts and samples of noise."""
    rng = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(len(PROMPTS), *family.latent_shape, generator=rng) for _ in range(2))
    return BatchSource(family, PROMPTS, RealSamples(PROMPTS, a), seed, TeacherSamples(PROMPTS, b, a), PairSamples(PROMPTS, a, b), ranks)


def held(state: TrainState, gradients: int) -> dict[str, int]:
    """Bytes of a process's part of each kind of tensor."""
    weights = {p.data_ptr(): p for role in state.roles.values() for p in map(local, role.backbone.module.parameters())}
    moments = [x for trained in state.trained.values() for kept in trained.optimizer.state.values() for x in kept.values() if x.ndim]
    averages = [x for trained in state.trained.values() for x in (trained.ema or {}).values()]
    return {"weights": _bytes(weights.values()), "gradients": gradients, "moments": _bytes(moments), "averages": _bytes(averages)}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(local(x).nbytes for x in tensors)


def measured(name: str, layout: str, size: Sequence[int], ranks: Ranks) -> dict[str, Any]:
    """Two iterations of a recipe's last stage, after `WARM_UP` others."""
    lora_rank, shard = LAYOUTS[layout]
    recipe, execution = recipe_of(name, lora_rank), Execution(device="cpu", shard=shard)
    state = state_of(recipe, size, execution, ranks)
    family = state.roles["student"].backbone.family  # type: ignore[attr-defined]
    stage = replace([stage for stage in recipe.stages if stage.steps][-1], steps=STEPS)
    gradients: dict[str, int] = {}
    for role, trained in state.trained.items():
        trained.optimizer.register_step_pre_hook(partial(_note_gradients, gradients, role, trained))
    source = inputs(family, recipe, 0, ranks)
    for n in range(WARM_UP):
        iteration(state, stage, source.next(stage), n / STEPS)
    sent, seconds, least = [], [], Least(state)
    for seed in SEEDS:
        batches, _ = inputs(family, recipe, seed, ranks).next(stage), state.rng.manual_seed(seed)
        least.clear()
        with counted() as collectives:
            began = time.process_time()
            iteration(state, stage, batches, WARM_UP / STEPS)
            seconds.append(time.process_time() - began)
        sent.append(collectives)
    return {
        "recipe": name,
        "layout": layout,
        "sent": sent,
        "least": least.bytes(ranks.count),
        "held": held(state, sum(gradients.values())),
        "cpu_s": sum(seconds) / len(seconds),
    }


def state_of(recipe: Recipe, size: Sequence[int], execution: Execution, ranks: Ranks) -> TrainState:
    """The state of a run at its beginning, on a network of `size` (width, layers)."""
    family = RandomWan(*size, (16, 3, 6, 6), 8)
    family.pipe = None
    return make_state(recipe, execution.place(family, execution.shards(recipe, family, ranks)), 0, brightness, brightness, execution=execution, ranks=ranks)


def brightness(x: Tensor, prompts: object) -> Tensor:
    """A reward of latents."""
    return x.flatten(1).mean(1)


def _note_gradients(found: dict[str, int], role: str, trained: TrainedParams, *_: Any) -> None:
    found[role] = _bytes(p.grad for p in trained.masters.values() if p.grad is not None)


def child(file: Path, size: Sequence[int], recipes: Sequence[str]) -> None:
    """What one process measures."""
    torch.set_num_threads(1)
    with joined() as ranks:
        rows = [measured(name, layout, size, ranks) for name in recipes for layout in LAYOUTS]
        write_json(file.with_name(f"{file.name}-{ranks.rank}.json"), rows)


def started(file: Path, size: Sequence[int]) -> None:
    """CPU time and largest resident memory of a process that is about to take its first iteration of sharded full copies."""
    torch.set_num_threads(1)
    with joined() as ranks:
        imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        state = state_of(recipe_of("dmd2", None), size, Execution(device="cpu", shard="on"), ranks)
        found = {
            "cpu_s": time.process_time(),
            "imports_MB": imported / 1024,
            "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "held_MB": sum(held(state, 0).values()) / 2**20,
        }
        write_json(file.with_name(f"{file.name}-{ranks.rank}.json"), found)


def spawned(count: int, what: str, folder: Path, *args: str) -> list[Any]:
    """What each of `count` processes writes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(count):
        there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, __file__, "--child", what, str(folder / f"{what}-{count}"), *args]
        running.append(subprocess.Popen(command, env={**os.environ, **{key: str(value) for key, value in there.items()}}))
    try:
        ended = [process.wait() for process in running]
        if any(ended):
            raise RuntimeError(f"{what}: of {count} processes one failed: {ended}")
    finally:
        for process in running:
            process.kill()
    return [json.loads((folder / f"{what}-{count}-{rank}.json").read_text()) for rank in range(count)]


def row_of(count: int, found: Sequence[Mapping[str, Any]], alone: Mapping[str, Any] | None) -> dict[str, Any]:
    """A recipe in a layout on `count` processes, from what each measured; `alone`: the row of one process."""
    first, sent = found[0], [one for rank in found for one in rank["sent"]]
    kinds = {kind: [size for what, size in sent[0] if what == kind] for kind in SENDS}
    total = sum(SENDS[kind] * (count - 1) / count * sum(sizes) for kind, sizes in kinds.items())
    here = max(sum(one["held"].values()) for one in found)
    return {
        "recipe": first["recipe"],
        "layout": first["layout"],
        "processes": count,
        "gathers": len(kinds["all_gather"]),
        "reduce_scatters": len(kinds["reduce_scatter"]),
        "others": len(kinds["all_reduce"]) + len(kinds["broadcast"]),
        "same": all(one == sent[0] for one in sent),
        "sent_bytes": total,
        "least_bytes": first["least"],
        "held_bytes": here,
        "held_of_alone": here / alone["held_bytes"] if alone else 1.0,
        "cpu_s_a_sample": sum(one["cpu_s"] for one in found) / BATCH,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--start-width", type=int, default=512, help="of the network whose start is measured")
    parser.add_argument("--recipes", nargs="+", default=list(OPTIONS), help="the rows of others stay as they were measured before")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, file = args.child[0], Path(args.child[1])
        child(file, (args.width, args.layers), args.recipes) if what == "iterations" else started(file, (args.start_width, args.layers))
        return
    before = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
    rows: list[dict[str, Any]] = [row for row in before if row["recipe"] not in args.recipes]
    starts = []
    with tempfile.TemporaryDirectory() as folder:
        for count in COUNTS:
            found = spawned(count, "start", Path(folder), "--start-width", str(args.start_width), "--layers", str(args.layers))
            starts.append({"processes": count, **{key: max(one[key] for one in found) for key in found[0]}})
            print(json.dumps(starts[-1]), flush=True)
        for count in COUNTS:
            found = spawned(count, "iterations", Path(folder), "--width", str(args.width), "--layers", str(args.layers), "--recipes", *args.recipes)
            for each in zip(*found, strict=True):
                name, layout = each[0]["recipe"], each[0]["layout"]
                alone = next((row for row in rows if (row["recipe"], row["layout"], row["processes"]) == (name, layout, 1)), None)
                rows.append(row_of(count, each, alone))
                print(json.dumps(rows[-1]), flush=True)
    rows.sort(key=lambda row: (list(OPTIONS).index(row["recipe"]), list(LAYOUTS).index(row["layout"]), row["processes"]))
    write_json(RESULT, {"rows": rows, "starts": starts, "width": args.width, "layers": args.layers, "start_width": args.start_width})


if __name__ == "__main__":
    main()
