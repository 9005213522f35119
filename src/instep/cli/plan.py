"""`instep plan`: memory and time of each stage of a recipe, before anything runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro

from instep.bundled import DEFAULT, LISTED, WORLDS, find
from instep.core.disk import gb
from instep.core.size import Size
from instep.methods.recipe import Recipe
from instep.models.families import FAMILIES
from instep.models.family import Family
from instep.models.outline import PUBLISHED, outline
from instep.models.teacher import as_teacher, as_teachers
from instep.planning.plan import Machine, Plan, RewardCost, StagePlan, duration, plan
from instep.planning.throughput import measure_throughput, stated
from instep.training.checks import shift_note
from instep.training.disk import disk_bytes
from instep.training.execution import DTYPES, Execution
from instep.training.options import RunOptions

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

KNOWN = f"a bundled model ({LISTED}), a published size ({', '.join(PUBLISHED)}), and pipeline folders of {', '.join(FAMILIES)}"
MODEL_HELP = f"A bundled model ({LISTED}), a published size ({', '.join(PUBLISHED)}), or the path of a diffusers pipeline folder."
CAPACITY = {"A100": 80.0, "H100": 80.0, "H200": 141.0}  # GB


@dataclass(frozen=True)
class PlanArgs:
    """What to plan for; the options of execution are those of `instep train`."""

    model: Annotated[str, tyro.conf.arg(help=MODEL_HELP)] = DEFAULT
    on: Literal["here", "A100", "H100", "H200"] = "here"
    """What to plan for: this machine's device (--device), which is measured for two seconds, or one at 40 percent of the vendor's bf16 peak, an assumption."""
    memory: float | None = None
    """Memory of one device in GB; default: this machine's, or that of the given device."""
    gpus: str = "1"
    """Devices that share the run, as processes of torchrun do; several numbers, 8,64, are planned one after the other. Each has its share of every batch; with
    --shard on, or by default for full copies of a large network, also its part of weights, gradients, moments and averages."""
    link: float = 50.0
    """GB a second that a device sends to the others, an assumption: 50 is a network of 400 Gbit/s a device, which also bounds several machines; 300 and more
    is NVLink within one machine."""
    size: tuple[int, int, int] | None = None
    """Height, width and frames; default: the model's own, 480 832 81 for Wan 2.1."""
    teacher: str | None = None
    """Another model as the teacher, as in `instep train`: a folder, or a published size."""
    reward_gb: float | None = None
    """Memory of the reward model in GB, an assumption; default: 2, and 0 for a bundled model."""
    reward_seconds: float | None = None
    """Seconds in which it scores a sample, an assumption; default: 0.05, and 0 for a bundled model. Decoding is counted."""

    terms_every: int = RunOptions.terms_every
    """Steps between two measurements of the gradient of each term, as in `instep train`; 0: none."""

    execution: Annotated[Execution, tyro.conf.arg(name="")] = Execution()

    @property
    def kind(self) -> str:
        """The type of the device that is planned for."""
        return self.execution.target.type if self.on == "here" else "cuda"


def plan_command(recipe: Recipe, args: PlanArgs, adapted: Callable[[], Recipe] | None) -> int:
    """Prints a table for each stage, the lines beside them, and the time of the whole run, for every number of devices. `adapted`: see `plan`."""
    from rich.console import Console

    console, family = Console(), model_of(args, args.model)
    teacher = None
    if args.teacher is not None:
        with as_teachers():
            teacher = as_teacher(model_of(args, args.teacher), family)
    if note := shift_note(recipe, family):
        console.print(note, highlight=False, soft_wrap=True)
    first = machine_of(args, family, max(stage.batch for stage in recipe.stages))
    for gpus in numbers(args.gpus):
        _print_plan(console, recipe, args, adapted, family, replace(first, gpus=gpus), teacher)
    return 0


def numbers(given: str) -> tuple[int, ...]:
    """Numbers of devices, "8,64"."""
    try:
        found = tuple(int(one) for one in given.split(","))
    except ValueError as error:
        raise ValueError(f"gpus: {given!r} is not allowed; whole numbers from 1, such as 8 or 8,64") from error
    if min(found) < 1:
        raise ValueError(f"gpus: {given} is not possible; whole numbers from 1, such as 8 or 8,64")
    return found


def _print_plan(
    console: Console, recipe: Recipe, args: PlanArgs, adapted: Callable[[], Recipe] | None, family: Family, machine: Machine, teacher: Family | None
) -> None:
    small = args.model in WORLDS
    reward = RewardCost(_given(args.reward_gb, 0.0 if small else 2.0) * 1e9, _given(args.reward_seconds, 0.0 if small else 0.05))
    options = RunOptions(execution=_planned(args), terms_every=args.terms_every)
    found = plan(recipe, family, options.execution, machine, reward, adapted, options.terms_every, teacher)
    several = f" on each of {machine.gpus} devices" if machine.gpus > 1 else ""
    console.print(f"[bold]{recipe.name}[/] on {args.model}, {family.size}{several}: {found.verdict()}", highlight=False, soft_wrap=True)
    for one in found.stages:
        console.print(f"\n[bold]{recipe.name}, stage {one.stage.name}[/]: {one.stage.steps} iterations of {samples(one)}", highlight=False)
        console.print(stage_table(one, machine))
    console.print(beside_table(found))
    on_disk = disk_bytes(recipe, family, options, sampled=bool(recipe.needs & {"stored", "real"}))
    parts = ", ".join(f"{what} {gb(count)}" for what, count in on_disk.items())
    console.print(f"\non disk: at most about {gb(sum(on_disk.values()))} ({parts}; encoded texts are not counted)", highlight=False, soft_wrap=True)
    console.print(f"\nthe whole run: about {duration(found.seconds)} {_left_out(found)}", highlight=False, soft_wrap=True)


def _planned(args: PlanArgs) -> Execution:
    """The run's execution; on a CPU there is no other memory to offload to."""
    return replace(args.execution, device="cpu", offload=False) if args.kind == "cpu" else args.execution


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def model_of(args: PlanArgs, model: str) -> Family:
    """The family of a model as a run loads it, as shapes."""
    size = Size(*args.size) if args.size else None
    if model in WORLDS:
        return find(model).load(size).placed("meta")
    dtype = DTYPES[args.execution.dtype or ("bfloat16" if args.kind == "cuda" else "float32")]
    try:
        return outline(model, size, dtype)
    except ValueError as error:
        raise ValueError(f"{error}; planned are {KNOWN}" if str(error).startswith("model:") else str(error)) from error


def machine_of(args: PlanArgs, family: Family, batch: int) -> Machine:
    """The device that is planned for."""
    if args.on != "here":
        return Machine(
            _given(args.memory, CAPACITY[args.on]) * 1e9, stated(args.on), f"40 % of the {args.on}'s stated peak: an assumption", link=1e9 * args.link
        )
    rows = min(batch, args.execution.micro_batch or batch)
    tokens = max(1, torch.Size(family.latent_shape[1:]).numel() // 4)
    speed = measure_throughput(family.feature_width(family.pretrained), tokens, rows, args.execution.dtype_of(family), str(args.execution.target))
    source = f"measured on this {args.kind}; a lower bound of the time for small networks"
    return Machine(_given(args.memory, _memory_of(args.kind)) * 1e9, speed, source, link=1e9 * args.link)


def _memory_of(kind: str) -> float:
    """Memory of this machine's device in GB."""
    if kind == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


# tables


def samples(one: StagePlan) -> str:
    stage = one.stage
    return f"{stage.batch} samples" if stage.accumulate == 1 else f"{stage.accumulate} x {stage.batch} samples"


def stage_table(one: StagePlan, machine: Machine) -> Table:
    """Memory at the peak by kind, FLOPs by role, and time."""
    from rich.table import Table

    flops = one.trace.total_flops
    again = (flops - one.trace.model_flops) / max(1.0, flops)
    pace = f"{duration(one.seconds)} an iteration: {flops:.3g} FLOPs, {again:.0%} of them recomputation, at {machine.throughput:.3g} FLOP/s ({machine.source})"
    table = Table(title=pace, title_justify="left")
    for name in ("at the peak of an iteration", "amount", ""):
        table.add_column(name, justify="right" if name == "amount" else "left")
    for kind, count in sorted(one.memory.items(), key=lambda item: -item[1]):
        table.add_row(kind, gb(count), "")
    table.add_row("memory of one device", gb(one.bytes), _shared(one, machine), end_section=True, style="bold")
    if one.sent:
        pace = f"{duration(one.sent / machine.link)} at {machine.link / 1e9:.3g} GB/s: an assumption"
        table.add_row("sent in an iteration", gb(one.sent), pace, end_section=True)
    if one.host:
        table.add_row("in host memory", gb(sum(one.host.values())), "offloaded", end_section=True)
    for label in dict.fromkeys(label for label, _ in one.trace.flops):
        phases = {phase: one.trace.flops.get((label, phase), 0.0) for phase in ("forward", "backward", "recomputation")}
        table.add_row(label, f"{sum(phases.values()):.3g}", ", ".join(f"{phase} {count:.3g}" for phase, count in phases.items() if count))
    return table


def _shared(one: StagePlan, machine: Machine) -> str:
    if machine.gpus == 1:
        return ""
    return f"states sharded over {machine.gpus}" if "two whole blocks of weights" in one.memory else f"states whole on each of {machine.gpus}"


def beside_table(found: Plan) -> Table:
    """What a run does beside its iterations."""
    from rich.table import Table

    table = Table(title="\nbeside the iterations", title_justify="left")
    for name in ("", "memory", "time", "times", ""):
        table.add_column(name, justify="left" if not name else "right")
    for one in found.beside:
        table.add_row(one.name, gb(one.bytes), duration(one.flops / found.machine.throughput), f"{one.times:.0f}", one.why)
    return table


def _left_out(found: Plan) -> str:
    if not any(one.trace.scored for one in found.stages):
        return "(data loading is not counted)"
    reward = f"a reward of {gb(found.reward.bytes)} and {1000 * found.reward.seconds:.0f} ms a sample is assumed besides decoding"
    return f"({reward}; data loading is not counted)"
