"""Before anything runs: what will be in memory, how much there is to compute, how long an iteration takes, and what to change if it does not fit.

Everything is counted by tracing (`planning/trace.py`), but for what is stated here: the reward's own network (`RewardCost`), sharding, the text encoders (their
weights; 2 FLOPs a weight and token), the CUDA context and what the allocator loses (`HEADROOM`), AdamW's own arithmetic, communication between devices, moving
networks under offload. GB are 1e9 bytes. See docs/planning.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from instep.core.disk import gb
from instep.core.ranks import Ranks
from instep.methods.recipe import Recipe, Stage
from instep.models.family import Family
from instep.planning.beside import Aside, asides
from instep.planning.shares import divided, sent_bytes, share_of
from instep.planning.trace import OTHER_BATCHES, Model, Trace
from instep.training.execution import Execution
from instep.training.options import RunOptions

# share of the memory that is kept free: a plan that fills a device meets fragmentation
HEADROOM = 0.08
# rank of the adapters that advice suggests
RANK = 32
# what is not part of a network's state, and stays on the device under offload
WORKING = ("activations", "samples", "network in use", "decoder", OTHER_BATCHES)


@dataclass(frozen=True)
class Machine:
    """One device: memory in bytes, speed in FLOP/s, where that comes from, and how many such devices share a run. `link` is what one of them sends and gets in
    a collective, in bytes a second.

    Raises ValueError for numbers that are not positive.
    """

    capacity: float
    throughput: float
    source: str = "stated"
    gpus: int = 1
    link: float = 50e9

    def __post_init__(self) -> None:
        for name in ("capacity", "throughput", "gpus", "link"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not possible; allowed: positive numbers")


@dataclass(frozen=True)
class RewardCost:
    """What a reward model is assumed to cost besides decoding: bytes that are there all the time, seconds a sample."""

    bytes: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.bytes < 0 or self.seconds < 0:
            raise ValueError(f"reward: {self.bytes:g} bytes and {self.seconds:g} seconds a sample are not possible; allowed: 0 or more")


@dataclass(frozen=True)
class StagePlan:
    """What an iteration of a stage costs on one device: bytes by kind on the device and in host memory, its trace, and the bytes that the device sends to
    the others (`planning/shares.py`). Sending is counted in `seconds` as if nothing were computed meanwhile."""

    stage: Stage
    memory: Mapping[str, float]
    host: Mapping[str, float]
    trace: Trace
    seconds: float
    sent: float = 0.0

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """The stages of a recipe, what a run does beside its iterations, and the changes after which it would fit."""

    stages: tuple[StagePlan, ...]
    beside: tuple[Aside, ...]
    machine: Machine
    reward: RewardCost
    advice: tuple[str, ...] = ()

    @property
    def bytes(self) -> float:
        return max([*(one.bytes for one in self.stages), *(one.bytes for one in self.beside)])

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(one.stage.steps * one.seconds for one in self.stages) + sum(one.times * one.flops for one in self.beside) / self.machine.throughput

    def fits(self, count: float) -> bool:
        return count <= (1 - HEADROOM) * self.machine.capacity

    def verdict(self) -> str:
        """One line: 'fits in 80 GB: yes, 61 GB at the peak', or no, and what would."""
        found, capacity = self.bytes, self.machine.capacity
        text = f"fits in {gb(capacity)}: {'yes' if self.fits(found) else 'no'}, {gb(found)} at the peak"
        if not self.fits(found) and found <= capacity:
            text += f" ({HEADROOM:.0%} are kept free against fragmentation)"
        if self.fits(found):
            return text
        return f"{text}; it would fit {', or '.join(self.advice)}" if self.advice else f"{text}; none of the options of training would make it fit"


def plan(
    recipe: Recipe,
    family: Family,
    execution: Execution,
    machine: Machine,
    reward: RewardCost = RewardCost(),
    adapted: Callable[[], Recipe] | None = None,
    terms_every: int = RunOptions.terms_every,
    teacher: Family | None = None,
) -> Plan:
    """The plan of a recipe on a family whose networks are on the meta device (`models/outline.py`).

    `execution` is the run's, except that its device is `machine`, and that compilation and the attention backend are left out: a fused kernel is assumed.
    Of several devices each has its share of every batch. `adapted` makes the same recipe with adapters of rank `RANK`, where it has the option lora_rank;
    advice may then name it. `terms_every`: see `RunOptions`. `teacher` is another model that teaches, on the meta device too (`models/teacher.py`).
    """
    if execution.context_parallel > 1:
        raise ValueError(f"context_parallel: {execution.context_parallel} is not planned for: activations are those of whole samples; leave it out")
    recipe = share_of(recipe, machine.gpus)
    model = _model(recipe, family, execution, terms_every, teacher)
    stages = _iterations(model, execution, machine, reward)
    found = Plan(stages, tuple(asides(model, recipe, lambda trace: sum(_placed(trace, execution, machine, model)[0].values()))), machine, reward)
    if found.fits(found.bytes):
        return found
    return replace(found, advice=tuple(_advice(recipe, family, execution, machine, reward, adapted, terms_every, teacher, found)))


def iterations(recipe: Recipe, family: Family, execution: Execution, machine: Machine, reward: RewardCost = RewardCost()) -> tuple[StagePlan, ...]:
    """An iteration of every stage that has steps; as `plan`, without what a run does beside its iterations, measurements of the log and advice."""
    return _iterations(_model(share_of(recipe, machine.gpus), family, execution, 0), execution, machine, reward)


def _iterations(model: Model, execution: Execution, machine: Machine, reward: RewardCost) -> tuple[StagePlan, ...]:
    return tuple(_stage_plan(model, stage, execution, machine, reward) for stage in model.recipe.stages if stage.steps)


def _model(recipe: Recipe, family: Family, execution: Execution, terms_every: int, teacher: Family | None = None) -> Model:
    # the states are host memory by their kind; all that is traced is on the meta device
    on_meta = replace(execution, device="meta", attention=None)
    here = replace(on_meta, offload=False)
    return Model(recipe, here.place(family), on_meta, terms_every, teacher and here.place(teacher, decodes=False))


def _stage_plan(model: Model, stage: Stage, execution: Execution, machine: Machine, reward: RewardCost) -> StagePlan:
    trace = model.trace(stage)
    memory, host = _placed(trace, execution, machine, model)
    if trace.scored and reward.bytes:
        memory["reward model (assumed)"] = reward.bytes
    sent = sent_bytes(model, stage, trace, sharded=_shards(execution, machine, model), gpus=machine.gpus)
    seconds = trace.total_flops / machine.throughput + trace.scored * reward.seconds + sent / machine.link
    return StagePlan(stage, memory, host, trace, seconds, sent)


def _shards(execution: Execution, machine: Machine, model: Model) -> bool:
    return execution.shards(model.recipe, model.family, Ranks(0, machine.gpus, machine.gpus))


def _placed(trace: Trace, execution: Execution, machine: Machine, model: Model) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes by kind on one device at its peak, and in host memory."""

    def at_home(kind: str) -> bool:
        return execution.offload and not kind.startswith(WORKING)

    memory, whole = trace.memory(at_home), trace.memory()
    host = {kind: count for kind, count in whole.items() if at_home(kind)}
    if _shards(execution, machine, model):
        memory = divided(memory, model.recipe, machine.gpus, WORKING)
        memory["two whole blocks of weights"] = 2 * model.block_bytes
    return memory, host


# ------------------------------------------------------------------------------------------------------------------------------- what would fit


def _advice(
    recipe: Recipe,
    family: Family,
    execution: Execution,
    machine: Machine,
    reward: RewardCost,
    adapted: Callable[[], Recipe] | None,
    terms_every: int,
    teacher: Family | None,
    found: Plan,
) -> list[str]:
    """Options of `instep train`, each tried alone by tracing again and, if none is enough, together, the gentlest first."""
    stages = sorted((one for one in found.stages), key=lambda one: -one.bytes)
    names = [one.stage.name for one in stages]

    def peak(changes: Sequence[Change]) -> float | None:
        """The peak with the changes; None if it does not fit."""
        changed, how = recipe, execution
        for change in changes:
            changed, how = change.recipe(changed), change.execution(how)
        model, most = _model(changed, family, how, terms_every, teacher), 0.0
        by_name = {stage.name: stage for stage in changed.stages}
        for name in names:
            most = max(most, _stage_plan(model, by_name[name], how, machine, reward).bytes)
            if not found.fits(most):
                return None
        return most

    changes = _changes(recipe, family, execution, adapted)
    enough: dict[str, str] = {}
    for change in changes:
        if change.field not in enough and (count := peak([change])) is not None:
            enough[change.field] = f"with {change.option} ({gb(count)})"
    if enough:
        return list(enough.values())
    last = {change.field: change for change in changes}
    together: list[Change] = []
    for change in last.values():
        together.append(change)
        if len(together) > 1 and (count := peak(together)) is not None:
            return [f"with {' '.join(change.option for change in together)} ({gb(count)})"]
    return []


@dataclass(frozen=True)
class Change:
    """An option as the command line takes it, and what it changes."""

    field: str
    option: str
    execution: Callable[[Execution], Execution] = lambda execution: execution
    recipe: Callable[[Recipe], Recipe] = lambda recipe: recipe


def _changes(recipe: Recipe, family: Family, execution: Execution, adapted: Callable[[], Recipe] | None) -> list[Change]:
    """Changes that save memory, those of one field from the gentlest on."""
    found = []
    if not execution.checkpoints(family.pretrained):
        found.append(Change("checkpointing", "--checkpointing on", lambda e: replace(e, checkpointing="on")))
    most = execution.rows_of(family) or max(stage.batch for stage in recipe.stages if stage.steps)
    found += [Change("micro_batch", f"--micro-batch {n}", lambda e, n=n: replace(e, micro_batch=n)) for n in (8, 4, 2, 1) if n < most]  # type: ignore[misc]
    if execution.dtype_of(family) != torch.bfloat16:
        found.append(Change("dtype", "--dtype bfloat16", lambda e: replace(e, dtype="bfloat16")))
    if not execution.offload and execution.device != "cpu":
        found.append(Change("offload", "--offload", lambda e: replace(e, offload=True)))
    if adapted is not None and recipe.roles["student"].lora is None:
        found.append(Change("lora_rank", f"--lora-rank {RANK}", recipe=lambda _: adapted()))
    return found


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
