"""What several processes compute, for `test_ranks.py`; run by hand: RANK=0 WORLD_SIZE=1 python tests/many_ranks.py FILE CASE..."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import every_recipe
import torch
from safetensors.torch import save_file
from tiny import tiny_sd3_pipeline, tiny_wan22_pipeline
from torch import Tensor

from instep.core.ranks import Ranks, joined
from instep.core.shards import whole
from instep.core.size import Size
from instep.lab.networks import VelocityMLP
from instep.lab.run import common, ensemble_state
from instep.lab.spec import build
from instep.lab.world import World
from instep.methods.recipe import Recipe
from instep.methods.term import Batch, Stored
from instep.models import role
from instep.models.family import Family
from instep.models.sd3 import SD3Family
from instep.models.sharded import Mismatch
from instep.models.wan22 import Wan22Family
from instep.recipes import find
from instep.recipes.common import Common
from instep.rewards.base import FunctionReward
from instep.training.execution import Execution
from instep.training.loop import Interrupted
from instep.training.options import RunOptions
from instep.training.run import Run, train
from instep.training.state import TrainState
from instep.training.step import iteration

BATCH = 32
# of recipes whose defaults leave a part out, or are too many samples for a test
OPTIONS = {
    "dmd2": ":gan=0.01",
    "dmdr": ":tilt=literal,group=4",
    "dm-align-group": ":group=4",
    "amd": ":group=4",
    "dollar": ":cd_steps=2",
    "apo": ":steps=8,online=3,half_online=3,offline=3,guidance=3.0,distill_guidance=3,post_distillation=3",
}
LAB = ("dmd2", "dm-align-group", "dm-align-pair", "amd", "dmdr", "dollar", "refl", "rl-after", "flow-grpo", "apo")
NETWORKS = ("dmd2", "dm-align-group", "amd", "dmdr", "dollar", "apo")


@contextmanager
def double() -> Iterator[None]:
    """New tensors are in double precision, and so is what networks cast to float32, whatever the rest is in."""
    before, single, head = torch.get_default_dtype(), Tensor.float, role.Head
    torch.set_default_dtype(torch.float64)
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    role.Head = lambda width: head(width).double()  # type: ignore[assignment]
    try:
        yield
    finally:
        Tensor.float, role.Head = single, head  # type: ignore[method-assign]
        torch.set_default_dtype(before)


def laboratory(name: str, ranks: Ranks) -> dict[str, Tensor]:
    """Three iterations of each stage of a recipe in the exact laboratory."""
    world = World.named("ring8", members=1, reward="half")
    recipe = build(name + OPTIONS.get(name, ""), replace(common(steps=2), batch=BATCH), 3)
    torch.manual_seed(0)
    state = ensemble_state(recipe, world, VelocityMLP(world.path, width=16), 0)
    state.ranks = ranks
    rows = {}
    for stage in (replace(stage, steps=3) for stage in recipe.stages if stage.steps):
        for n in range(3):
            batches = [_share(world.batch(stage, recipe.guidance, state.rng), ranks) for _ in range(stage.accumulate)]
            rows |= {f"{stage.name}/{n}/{key}": value for key, value in iteration(state, stage, batches, n / 3).items()}
    return _everything(state, rows)


def _share(batch: Batch, ranks: Ranks) -> Batch:
    n = len(batch.prompts)
    mine = ranks.share(n)
    stored = batch.stored and Stored(batch.stored.cond[mine], batch.stored.noise[mine], batch.stored.x0[mine])
    following = (batch.prompts[mine.stop % n], batch.cond[torch.tensor([mine.stop % n])])
    return replace(batch.rows(mine), stored=stored, following=following if ranks.count > 1 else None)


def wide(family: Family) -> Family:
    """The family in double precision."""
    for part in (*family.parts(family.pretrained).values(), *family.vaes):
        part.to(torch.float64)
    return family


def network(recipe: Recipe, family: Family, ranks: Ranks, execution: Execution = Execution(device="cpu")) -> dict[str, Tensor]:
    """Two iterations of every stage of a recipe on a miniature model, in double precision unless its execution names another."""
    placed = execution.place(family if execution.dtype else wide(family))
    state = every_recipe.state_of(recipe, placed, execution, ranks=ranks)
    source, rows = every_recipe.batches_of(placed, ranks=ranks), {}
    for i, stage in enumerate(stage for stage in recipe.stages if stage.steps):
        for n in range(2):
            rows |= {f"{i}/{n}/{key}": value for key, value in iteration(state, stage, source.next(stage), 0.0).items()}
    return _everything(state, rows)


def _everything(state: TrainState, rows: Mapping[str, float]) -> dict[str, Tensor]:
    """Weights, moments and averages, and what the log has."""
    found = {}
    for name, trained in state.trained.items():
        found |= {f"{name}/{key}": value for key, value in trained.state().items()}
        found |= {f"{name}/moments/{i}/{key}": x for i, kept in enumerate(trained.optimizer.state.values()) for key, x in kept.items()}
        found |= {f"{name}/average/{key}": x for key, x in (trained.ema or {}).items()}
    if state.sharded:
        found = {key: whole(x) for key, x in found.items()}
    if state.latent_reward is not None:
        found |= {f"latent_reward/{key}": x for key, x in state.latent_reward.state().items()}
    # correlations within a share have a mean over ranks, which is another number
    found |= {f"log/{key}": torch.tensor(x) for key, x in rows.items() if "correlation" not in key}
    return {key: x.detach().double().contiguous().clone() for key, x in found.items()}


def _tiny(name: str, ranks: Ranks, lora_rank: int | None = None, execution: Execution = Execution(device="cpu")) -> dict[str, Tensor]:
    return network(every_recipe.small(name, lora_rank=lora_rank), every_recipe.family(), ranks, execution)


def _experts(ranks: Ranks, lora_rank: int | None = None, execution: Execution = Execution(device="cpu")) -> dict[str, Tensor]:
    """Two experts of equal shape: one that is called in place of the other raises no error."""
    family = Wan22Family(tiny_wan22_pipeline(), every_recipe.SIZE, name="tiny")
    return network(every_recipe.small("dm-align-group", lora_rank=lora_rank), family, ranks, execution)


def _images(ranks: Ranks, lora_rank: int | None = None, execution: Execution = Execution(device="cpu")) -> dict[str, Tensor]:
    family = SD3Family(tiny_sd3_pipeline(), Size(16, 16, 1), name="tiny")
    return network(every_recipe.small("dm-align-group", lora_rank=lora_rank), family, ranks, execution)


# in each process one block's weights whole at a time
SHARDED = Execution(device="cpu", shard="on")
# blocks and rows are computed again in the backward pass
SHARDED_ROWS = Execution(device="cpu", shard="on", checkpointing="on", micro_batch=1)
SHARDED_BFLOAT16 = "wan/dm-align-group/shard/bfloat16"
CASES: dict[str, Callable[[Ranks], dict[str, Tensor]]] = {
    **{f"lab/{name}": partial(laboratory, name) for name in LAB},
    **{f"wan/{name}": partial(_tiny, name) for name in NETWORKS},
    **{f"wan/{name}/lora": partial(_tiny, name, lora_rank=2, execution=Execution(device="cpu", checkpointing="on")) for name in NETWORKS},
    "wan22/dm-align-group": _experts,
    "wan22/dm-align-group/lora": partial(_experts, lora_rank=2),
    "sd3/dm-align-group": _images,
    "sd3/dm-align-group/lora": partial(_images, lora_rank=2),
    **{f"wan/{name}/shard": partial(_tiny, name, execution=SHARDED) for name in NETWORKS},
    **{f"wan/{name}/shard/lora": partial(_tiny, name, lora_rank=2, execution=SHARDED) for name in NETWORKS},
    **{f"wan/{name}/shard/rows": partial(_tiny, name, execution=SHARDED_ROWS) for name in NETWORKS},
    **{f"wan/{name}/shard/lora/rows": partial(_tiny, name, lora_rank=2, execution=SHARDED_ROWS) for name in NETWORKS},
    "wan22/dm-align-group/shard": partial(_experts, execution=SHARDED),
    "wan22/dm-align-group/shard/lora": partial(_experts, lora_rank=2, execution=SHARDED),
    "sd3/dm-align-group/shard": partial(_images, execution=SHARDED_ROWS),
    SHARDED_BFLOAT16: partial(_tiny, "dm-align-group", execution=replace(SHARDED_ROWS, dtype="bfloat16")),
}


def guarded(ranks: Ranks) -> str:
    """What comes of two processes that call two experts of equal shape, each another one."""
    family = Wan22Family(tiny_wan22_pipeline(), every_recipe.SIZE, name="tiny")
    state = every_recipe.state_of(every_recipe.small("dm-align-group"), family, SHARDED, ranks=ranks)
    x, level = torch.zeros(2, *family.latent_shape), 0.95 if ranks.first else 0.5
    try:
        with torch.no_grad():
            state.roles["teacher"](x, torch.full((2,), level), family.encode(every_recipe.PROMPTS[:2]))
    except Mismatch as error:
        return str(error)
    return "no error"


def results(case: str, ranks: Ranks) -> dict[str, Tensor]:
    with nullcontext() if case == SHARDED_BFLOAT16 else double():
        return CASES[case](ranks)


RUN, SHARDED_RUN, GUARD, COLLECTIVES = "run", "run/shard", "guard", "collectives"
STEPS, STOPS_AT = 4, 2


def run(out: Path, stops: bool = False, shard: str = "off") -> Run:
    """A short run, which ends in a student; with `stops` the last rank gets SIGTERM in its iteration to the step `STOPS_AT`."""
    recipe = find("dm-align-group")(Common(steps=2, batch=4, critic_updates=1, ema=0.9), distil=0, iterations=STEPS, group=2, top_n=1)
    seen: list[int] = []

    def brightness(media: Tensor, prompts: object) -> Tensor:
        seen.append(len(media))
        # it scored once before the first step, to be tried
        if stops and len(seen) == 1 + STOPS_AT and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1 > 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return media.mean((1, 2, 3, 4))

    options = RunOptions(save_every=1, keep=9, probe_every=STEPS, terms_every=0, execution=Execution(device="cpu", shard=shard))
    return train(recipe, every_recipe.family(), out=out, prompts=every_recipe.PROMPTS, reward=FunctionReward(brightness, "brightness"), options=options)


OLDER = ("all_gather_into_tensor", "reduce_scatter_tensor")  # of torch before 2.13


@contextmanager
def counted() -> Iterator[list[int]]:
    """The numbers that each collective inside sends or, of a sharded network's, brings together."""
    sizes: list[int] = []
    names = ("all_reduce", *(("all_gather_single", "reduce_scatter_single") if hasattr(torch.distributed, "all_gather_single") else OLDER))
    before = {name: getattr(torch.distributed, name) for name in names}

    def counting(name: str, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        sizes.append(max(x.numel() for x in tensors))
        return before[name](*args, **kwargs)

    for name in names:
        setattr(torch.distributed, name, partial(counting, name))
    try:
        yield sizes
    finally:
        for name in names:
            setattr(torch.distributed, name, before[name])


def main(file: str, *cases: str) -> None:
    torch.set_num_threads(1)
    with joined() as ranks:
        found = {}
        for case in (case for case in cases if case in CASES):
            with counted() as sizes:
                found |= {f"{case}|{key}": x for key, x in results(case, ranks).items()}
            found[f"{case}|{COLLECTIVES}"] = torch.tensor(sizes)
        save_file(found, Path(f"{file}-{ranks.rank}.safetensors"))
        if GUARD in cases:
            Path(f"{file}-{ranks.rank}.guard").write_text(guarded(ranks), encoding="utf-8")
        if SHARDED_RUN in cases:
            for _ in range(2):  # the second one resumes what is finished
                run(Path(f"{file}-shard"), shard="on")
        if RUN in cases:
            try:
                run(Path(f"{file}-run"), stops=True)
            except Interrupted as stopped:
                Path(f"{file}-{ranks.rank}.stopped").write_text(str(stopped), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
