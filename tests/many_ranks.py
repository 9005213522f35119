"""What several processes compute, for `test_ranks.py`; run by hand: RANK=0 WORLD_SIZE=1 python tests/many_ranks.py FILE CASE..."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import every_recipe
import torch
from little_drawn import shorten, whole_probes
from safetensors.torch import save_file
from tiny import tiny_sd3_pipeline, tiny_wan22_pipeline, tiny_wan_pipeline
from torch import Tensor

from instep.core.ranks import ALONE, Ranks, joined
from instep.core.shards import whole
from instep.core.size import Size
from instep.data.prompt import Prompt
from instep.lab.networks import VelocityMLP
from instep.lab.run import common, ensemble_state
from instep.lab.spec import build
from instep.lab.world import World
from instep.methods import align, matching, reward_gradient
from instep.methods.latent_reward_model import LatentReward
from instep.methods.recipe import Recipe
from instep.methods.term import Batch, Stored
from instep.models import role
from instep.models.family import Family
from instep.models.sd3 import SD3Family
from instep.models.sharded import Mismatch
from instep.models.wan import WanFamily
from instep.models.wan22 import Wan22Family
from instep.recipes import find
from instep.recipes.common import Common
from instep.rewards.base import FunctionReward
from instep.training import hold, step
from instep.training import state as training_state
from instep.training.execution import Execution
from instep.training.loop import Interrupted
from instep.training.options import RunOptions
from instep.training.run import Run, train
from instep.training.scalars import Scalars
from instep.training.state import RewardFn, TrainState
from instep.training.step import iteration

BATCH, ITERATIONS = 32, 3
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
NETWORKS = ("dmd2", "dm-align-group", "flow-grpo", "amd", "dmdr", "dollar", "apo")


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


def laboratory(name: str, how: Collection[str], ranks: Ranks) -> dict[str, Tensor]:
    """Three iterations of each stage of a recipe in the exact laboratory; `how`: see `case`."""
    world = World.named("ring8", members=1, reward="half")
    recipe = build(name + OPTIONS.get(name, ""), replace(common(steps=2), batch=BATCH), 3)
    torch.manual_seed(0)
    state = ensemble_state(recipe, world, VelocityMLP(world.path, width=16), 0)
    state.ranks = ranks
    reward(state, how)
    rows = {}
    for stage in (replace(stage, steps=ITERATIONS) for stage in recipe.stages if stage.steps):
        for n in range(ITERATIONS):
            batches = [_share(world.batch(stage, recipe.guidance, state.rng), ranks) for _ in range(stage.accumulate)]
            rows |= {f"{stage.name}/{n}/{key}": value for key, value in iteration(state, stage, batches, n / ITERATIONS).items()}
    return _everything(state, rows)


def reward(state: TrainState, how: Collection[str]) -> None:
    """`two`: a second reward beside a state's own. `nan`: in the second iteration the gradient of the last sample of the batch is not finite."""
    scored, climbed, calls = state.reward_fn, state.reward_grad_fn, []
    assert scored is not None and climbed is not None

    def two(score: RewardFn) -> RewardFn:
        return lambda x, prompts: torch.stack([score(x, prompts), x.flatten(1).square().mean(1)], 1)

    def nan(x: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append(len(x))
        scores = climbed(x, prompts)
        broken = len(calls) == 2 and state.ranks.rank == state.ranks.count - 1
        return torch.cat([scores[:-1], scores[-1:] * math.nan]) if broken else scores

    if "two" in how:
        state.weights, state.reward_fn, state.reward_grad_fn = (1.0, 0.5), two(scored), two(climbed)
    if "nan" in how:
        state.reward_grad_fn = nan


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


def network(recipe: Recipe, family: Family, how: Collection[str], ranks: Ranks, execution: Execution) -> dict[str, Tensor]:
    """Three iterations of each stage of a recipe on a miniature model, in double precision unless its execution names another; `how`: see `case`."""
    placed = execution.place(family if execution.dtype else wide(family))
    state = every_recipe.state_of(recipe, placed, execution, ranks=ranks)
    reward(state, how)
    source, rows = every_recipe.batches_of(placed, ranks=ranks), {}
    for stage in (replace(stage, steps=ITERATIONS) for stage in recipe.stages if stage.steps):
        for n in range(ITERATIONS):
            rows |= {f"{stage.name}/{n}/{key}": value for key, value in iteration(state, stage, source.next(stage), n / ITERATIONS).items()}
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


def _experts() -> Family:
    """Two experts of equal shape: one that is called in place of the other raises no error."""
    return Wan22Family(tiny_wan22_pipeline(), every_recipe.SIZE, name="tiny")


def _images() -> Family:
    return SD3Family(tiny_sd3_pipeline(), Size(16, 16, 1), name="tiny")


def _even() -> Family:
    """Samples of 36 tokens."""
    return WanFamily(tiny_wan_pipeline(), EVEN, name="tiny")


def _even_experts() -> Family:
    return Wan22Family(tiny_wan22_pipeline(), EVEN, name="tiny")


EVEN = Size(48, 64, 9)
MODELS: dict[str, Callable[[], Family]] = {"wan": every_recipe.family, "wan22": _experts, "sd3": _images, "even": _even, "even22": _even_experts}
# what a case MODEL/RECIPE/... adds to its recipe and its execution. shard: in each process one block's weights whole at a time; rows: blocks and rows are
# computed again in the backward pass
COMMON: dict[str, dict[str, Any]] = {"lora": {"lora_rank": 2}, "eight": {"batch": 8}}
HOW: dict[str, dict[str, Any]] = {"shard": {"shard": "on"}, "rows": {"checkpointing": "on", "micro_batch": 1}, "bfloat16": {"dtype": "bfloat16"}}


def case(name: str, ranks: Ranks) -> dict[str, Tensor]:
    """A recipe in the laboratory (lab/RECIPE/HOW...) or on a miniature model (MODEL/RECIPE/HOW...): weights, moments, averages and the log's scalars."""
    model, recipe, *how = name.split("/")
    if model == "lab":
        return laboratory(recipe, how, ranks)
    common: dict[str, Any] = {key: value for one in how for key, value in COMMON.get(one, {}).items()}
    execution = Execution(device="cpu", **{key: value for one in how for key, value in HOW.get(one, {}).items()})
    if "context" in how and ranks.count > 1 == ranks.context:
        with joined(context=2) as ranks:
            return case(name, ranks)
    return network(every_recipe.small(recipe, images=model == "sd3", **common), MODELS[model](), how, ranks, execution)


SHARDED_BFLOAT16 = "wan/dm-align-group/shard/rows/bfloat16"
# each sample's tokens divided between two processes: a discriminator's features, rows that are computed again, a reward's gradient, two experts
CONTEXT = (
    "even/dmd2/context",
    "even/dm-align-group/lora/rows/context",
    "even/dollar/rows/context",
    "even/refl/shard/context",
    "even22/dm-align-group/shard/context",
    "even/dmd2/shard/lora/rows/context",
)
# of sharded networks every recipe, full copies and adapters, with and without computing blocks and rows again; on other models both at once; and what is whole
CASES = (
    *(f"lab/{name}" for name in LAB),
    *(f"wan/{name}{how}" for name in NETWORKS for how in ("", "/lora/rows")),
    *(f"{model}/{name}{how}" for model in ("wan22", "sd3") for name in ("dm-align-group", "dollar") for how in ("", "/lora")),
    *(f"wan/{name}/shard{lora}{rows}" for name in NETWORKS for lora in ("", "/lora") for rows in ("", "/rows")),
    *(f"{model}/{name}/shard{how}" for model in ("wan22", "sd3") for name in NETWORKS for how in ("", "/lora/rows")),
    *CONTEXT,
)
# what four processes share
FOUR = (
    *(f"lab/{name}" for name in LAB),
    *(f"wan/{name}/shard{how}/eight" for name in NETWORKS for how in ("/rows", "/lora")),
    "wan22/dmd2/shard/eight",
    *(f"{name}/eight" for name in ("even/dmd2/context", "even/dm-align-group/lora/rows/context", "even22/dm-align-group/shard/context")),
)


# each statistic of a batch: a case that depends on it, and what computes it, where it would be that of one process's share
STATISTICS: dict[str, tuple[str, Any, str, Callable[[Any], Any]]] = {
    "gradients": ("lab/dmd2", Ranks, "average", lambda real: lambda self, tensors: None),
    "norm of divided gradients": ("wan/dmd2/shard", training_state, "total_norm", lambda real: lambda tensors, ranks: real(tensors, ALONE)),
    "norm of each term's gradient": ("lab/dmdr", step, "TermGradients", lambda real: lambda trained, ranks: real(trained)),
    "running spread of rewards": ("lab/dm-align-group", step, "score_rollout", lambda real: partial(_alone, real)),
    "running spread of several rewards": ("lab/dm-align-group/two", step, "score_rollout", lambda real: partial(_alone, real)),
    "norm of reward-tilted matching": ("lab/dmdr", matching, "relative", lambda real: lambda reward, ranks: real(reward)),
    "distance to preferred samples": ("lab/dm-align-pair", align, "resembling", lambda real: lambda squared, within, ranks: real(squared, within)),
    "norms of several rewards' gradients": (
        "lab/refl/two",
        reward_gradient,
        "balanced",
        lambda real: lambda gradients, weights, ranks: real(gradients, weights),
    ),
    "moments of the latent reward's labels": ("lab/dollar", LatentReward, "settle", lambda real: lambda self, reward, ranks: real(self, reward)),
    "scalars of the log": ("lab/dmd2", Scalars, "_of_all", lambda real: lambda self, known, flags, waiting: known),
}


def _alone(real: Callable[..., Any], state: TrainState, *args: Any) -> Any:
    ranks, state.ranks = state.ranks, ALONE
    try:
        return real(state, *args)
    finally:
        state.ranks = ranks


def of_each_process(statistic: str, ranks: Ranks) -> dict[str, Tensor]:
    """The results of a statistic's case if it were that of each process's share."""
    name, owner, attribute, local = STATISTICS[statistic]
    before = getattr(owner, attribute)
    setattr(owner, attribute, local(before))
    try:
        return results(name, ranks)
    finally:
        setattr(owner, attribute, before)


def guarded(ranks: Ranks) -> str:
    """What comes of two processes that call two networks of equal shape, each another one."""
    family = _experts()
    state = every_recipe.state_of(every_recipe.small("dm-align-group"), family, Execution(device="cpu", shard="on"), ranks=ranks)
    x, name = torch.zeros(2, *family.latent_shape), "teacher" if ranks.first else "fake"
    try:
        with torch.no_grad():
            state.roles[name](x, torch.full((2,), 0.95), family.encode(every_recipe.PROMPTS[:2]))
    except Mismatch as error:
        return str(error)
    return "no error"


def results(name: str, ranks: Ranks) -> dict[str, Tensor]:
    with nullcontext() if name == SHARDED_BFLOAT16 else double():
        return case(name, ranks)


RUN, SHARDED_RUN, STARTED_RUN, CONTEXT_RUN, GUARD, COLLECTIVES = "run", "sharded run", "started run", "context run", "guard", "collectives"
STEPS, STOPS_AT = 4, 2


def run(out: Path, stops: bool = False, start_from: Path | None = None, model: str = "wan", **execution: Any) -> Run:
    """A short run, which ends in a student; with `stops` the last rank gets SIGTERM in its iteration to the step `STOPS_AT`."""
    recipe = find("dm-align-group")(Common(steps=2, batch=4, critic_updates=1, ema=0.9), distil=0, iterations=STEPS, group=2, top_n=1)
    seen: list[int] = []

    def brightness(media: Tensor, prompts: object) -> Tensor:
        seen.append(len(media))
        # it scored twice before the first step, to be tried and for the figures that are held
        if stops and len(seen) == 2 + STOPS_AT and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1 > 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return media.mean((1, 2, 3, 4))

    # a controller moves the reward's weight after each probe
    held, where = hold.parse("diversity=0.95"), Execution(device="cpu", **execution)
    options = RunOptions(save_every=1, keep=9, probe_every=STEPS // 2, terms_every=0, hold=held, execution=where)
    scored = FunctionReward(brightness, "brightness")
    with whole_probes():
        return train(recipe, MODELS[model](), out=out, prompts=every_recipe.PROMPTS, reward=scored, options=options, start_from=start_from)


def main(file: str, *cases: str) -> None:
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    from collectives import counted

    shorten()
    torch.set_num_threads(1)
    with joined() as ranks:
        found = {}
        for name in (name for name in cases if "/" in name):
            with counted() as collectives:
                found |= {f"{name}|{key}": x for key, x in results(name, ranks).items()}
            found[f"{name}|{COLLECTIVES}"] = torch.tensor([size for kind, size in collectives if kind != "broadcast"])
        for name in (name for name in cases if name in STATISTICS):
            found |= {f"{name}|{key}": x for key, x in of_each_process(name, ranks).items()}
        save_file(found, Path(f"{file}-{ranks.rank}.safetensors"))
        if GUARD in cases:
            Path(f"{file}-{ranks.rank}.guard").write_text(guarded(ranks), encoding="utf-8")
        if SHARDED_RUN in cases:
            for _ in range(2):  # the second one resumes what is finished
                run(Path(f"{file}-shard"), shard="on")
        if CONTEXT_RUN in cases:
            run(Path(f"{file}-context"), model="even", context_parallel=2)
        if STARTED_RUN in cases:
            run(Path(f"{file}-first"), shard="on")
            run(Path(f"{file}-started"), shard="on", start_from=Path(f"{file}-first"))
        if RUN in cases:
            try:
                run(Path(f"{file}-run"), stops=True)
            except Interrupted as stopped:
                Path(f"{file}-{ranks.rank}.stopped").write_text(str(stopped), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
