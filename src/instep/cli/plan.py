"""`instep plan`: memory and time of each stage of a recipe, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import tyro

from instep.bundled import DEFAULT, LISTED, WORLDS, find
from instep.core.size import Size
from instep.methods.recipe import Recipe
from instep.models.outline import PUBLISHED, outline
from instep.planning.plan import duration, plan
from instep.planning.throughput import measure_throughput, stated
from instep.planning.workload import Workload, recipe_workload, workload

KNOWN = f"a bundled video model ({LISTED}), a published size ({', '.join(PUBLISHED)}), and pipeline folders of families whose memory was counted"
MODEL_HELP = f"A bundled video model ({LISTED}), a published size ({', '.join(PUBLISHED)}), or the path of a diffusers pipeline folder."
Device = Literal["cpu", "cuda", "A100", "H100", "H200"]
CAPACITY = {"A100": 80.0, "H100": 80.0, "H200": 141.0}  # GB


@dataclass(frozen=True)
class PlanArgs:
    """The device to plan for."""

    model: Annotated[str, tyro.conf.arg(help=MODEL_HELP)] = DEFAULT
    device: Device = "cpu"
    """cpu and cuda are measured for two seconds; A100, H100 and H200 are 40 %% of the vendor's bf16 peak, an assumption."""
    memory: float | None = None
    """Memory of one device in GB; default: this machine's, or that of the given device."""
    gpus: int = 1
    """Number of devices over which weights, gradients and optimiser states are sharded."""
    size: tuple[int, int, int] | None = None
    """Height, width and frames; default: 480 832 81, and a bundled model's own."""
    float32: bool = False
    """Weights in float32 instead of bfloat16 (always so on a CPU)."""
    checkpointing: bool = True
    """Activation checkpointing."""


def plan_command(recipe: Recipe, args: PlanArgs) -> int:
    """Prints a table for each stage and the time of the whole run."""
    from rich.console import Console

    console, total = Console(), 0.0
    base = network(args)
    throughput, source = speed(base, args.device)
    for stage in (stage for stage in recipe.stages if stage.steps):
        seen = plan(recipe_workload(recipe, stage, base), throughput, capacity(args) * 1e9, source)
        total += stage.steps * seen.seconds
        console.print(f"\n[bold]{recipe.name}, stage {stage.name}[/]: {stage.steps} iterations on {args.model}")
        console.print(seen.table())
    console.print(f"\nthe whole run: about {duration(total)} (sampling of probes, reward models and data loading are not counted)")
    return 0


def network(args: PlanArgs) -> Workload:
    """The network at the size that is planned."""
    size = Size(*args.size) if args.size else None
    try:
        if args.model in WORLDS:
            family = find(args.model).load(size)
            base = workload(family.parts(family.pretrained), family.dimensions(family.pretrained))
        else:
            found = outline(args.model)
            base = workload(found.parts, found.dimensions(size or Size()))
    except ValueError as error:
        raise ValueError(f"{error}; planned are {KNOWN}" if str(error).startswith("model:") else str(error)) from error
    wide = 4 if args.float32 or args.device == "cpu" else 2
    return replace(base, bytes_per_parameter=wide, checkpointing=args.checkpointing, gpus=args.gpus)


def speed(base: Workload, device: Device) -> tuple[float, str]:
    if device in CAPACITY:
        return stated(device), f"40 % of the {device}'s stated peak: an assumption"
    return measure_throughput(base, device), f"measured on this {device}; a lower bound of the time for small networks"


def capacity(args: PlanArgs) -> float:
    """Returns the memory of one device in GB."""
    if args.memory is not None:
        return args.memory
    if args.device in CAPACITY:
        return CAPACITY[args.device]
    if args.device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 1e9
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
