"""`instep plan`: memory and time of each stage of a recipe, before anything runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from instep.bundled import DEFAULT, LISTED, WORLDS, find
from instep.core.size import VideoSize
from instep.methods.recipe import Recipe
from instep.planning.plan import duration, plan
from instep.planning.throughput import measure_throughput, stated
from instep.planning.workload import WAN_1_3B, WAN_14B, Workload, recipe_workload, wan_module, wan_workload

KNOWN = f"a bundled video model ({LISTED}), 1.3B, 14B, or a Wan pipeline folder"
MODEL_HELP = f"A bundled video model ({LISTED}), 1.3B or 14B (Wan 2.1's sizes), or the path of a Wan pipeline folder."
Device = Literal["cpu", "cuda", "A100", "H100", "H200"]
CAPACITY = {"A100": 80.0, "H100": 80.0, "H200": 141.0}  # GB


@dataclass(frozen=True)
class PlanArgs:
    """What it would run on."""

    model: Annotated[str, tyro.conf.arg(help=MODEL_HELP)] = DEFAULT
    device: Device = "cpu"
    """cpu and cuda are measured for two seconds; A100, H100 and H200 are 40 %% of the vendor's bf16 peak, an assumption."""
    memory: float | None = None
    """GB of one device; default: what this machine has, or the stated device's."""
    gpus: int = 1
    """Devices that weights, gradients and optimiser states would be sharded over."""
    size: tuple[int, int, int] | None = None
    """Height, width and frames; default: 480 832 81, and a bundled model's own."""
    float32: bool = False
    """Weights in float32 instead of bfloat16 (always so on a CPU)."""
    checkpointing: bool = True
    """Activation checkpointing."""


def plan_command(recipe: Recipe, args: PlanArgs) -> int:
    """Prints a table a stage and the time of the whole run."""
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
    """The network at the size of video that is planned."""
    world = find(args.model) if args.model in WORLDS else None
    size = VideoSize(*args.size) if args.size else world.size if world else VideoSize()
    if args.model in ("1.3B", "14B"):
        module = wan_module(WAN_1_3B if args.model == "1.3B" else WAN_14B)
    else:
        file = (world.folder if world else Path(args.model)) / "transformer" / "config.json"
        if not file.is_file():
            raise ValueError(f"model: {args.model!r} is not known ({file} is missing); allowed: {KNOWN}")
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if (kind := config.get("_class_name", "WanTransformer3DModel")) != "WanTransformer3DModel":
            raise ValueError(f"model: {args.model} is a {kind}, whose passes and memory were not counted yet; allowed: {KNOWN}")
        module = wan_module({k: v for k, v in config.items() if not k.startswith("_")})
    wide = 4 if args.float32 or args.device == "cpu" else 2
    return replace(wan_workload(module, size), bytes_per_parameter=wide, checkpointing=args.checkpointing, gpus=args.gpus)


def speed(base: Workload, device: Device) -> tuple[float, str]:
    if device in CAPACITY:
        return stated(device), f"40 % of the {device}'s stated peak: an assumption"
    return measure_throughput(base, device), f"measured on this {device}; a lower bound of the time for small networks"


def capacity(args: PlanArgs) -> float:
    """GB of one device."""
    if args.memory is not None:
        return args.memory
    if args.device in CAPACITY:
        return CAPACITY[args.device]
    if args.device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 1e9
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
