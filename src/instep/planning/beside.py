"""What a run does beside its iterations: prompts, probes, the teacher's samples, the export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from instep.diffusion.guidance import by_level
from instep.diffusion.sampling import sample_ode
from instep.methods.recipe import Recipe
from instep.models.family import Family
from instep.planning.trace import Depth, Model, Trace
from instep.training.options import RunOptions
from instep.training.probe import PROBE_PROMPTS, Probe
from instep.training.probe import TEACHER_STEPS as PROBE_STEPS
from instep.training.run import TEACHER_STEPS

COPIES = Probe.copies
# samples of the teacher that are made at once
AT_ONCE = 16


@dataclass(frozen=True)
class Aside:
    """Bytes on the device while it lasts, FLOPs of one, and how often a run does it."""

    name: str
    bytes: float
    flops: float
    times: float
    why: str


def asides(model: Model, recipe: Recipe, on_device: Callable[[Trace], float]) -> Iterator[Aside]:
    """Everything beside the iterations. `on_device` gives the bytes of a trace on one device; probes and saving come at the intervals of `RunOptions`."""
    family, options, steps = model.family, RunOptions(), recipe.steps
    yield from _texts(family)
    n = PROBE_PROMPTS * COPIES
    decoded = model.trace_call(lambda depth: _decode(depth.family, n if family.micro_batch is None else COPIES))
    decoding = decoded.total_flops * (1 if family.micro_batch is None else PROBE_PROMPTS)
    student = model.trace_call(lambda depth: _student(depth, recipe, n))
    probes = 1 + steps // options.probe_interval
    yield Aside("probe", max(map(on_device, (student, decoded))), student.total_flops + decoding, probes, f"{n} samples of the student, decoded")
    one = model.trace_call(lambda depth: _teacher(depth, recipe, n))
    peak = max(map(on_device, (one, decoded)))
    yield Aside("probe of the teacher", peak, PROBE_STEPS * one.total_flops + decoding, 1, f"{n} samples in {PROBE_STEPS} steps, once")
    if recipe.needs & {"stored", "real"}:
        made = model.trace_call(lambda depth: _teacher(depth, recipe, AT_ONCE))
        times = options.teacher_samples / AT_ONCE
        why = f"{options.teacher_samples} in {TEACHER_STEPS} steps, once, unless real samples are given"
        yield Aside("samples of the teacher", on_device(made), TEACHER_STEPS * made.total_flops, times, why)
    exported = model.trace_call(_export)
    yield Aside("export", on_device(exported), 0.0, 1, "one rounded copy of what was trained, and of the layers that an adapter changes")


def _texts(family: Family) -> Iterator[Aside]:
    """The text encoders come to the device alone, before the network."""
    modules = family.text_modules()
    if not modules:
        return
    weights = [p for module in modules for p in module.parameters()]
    tokens = family.blank(1)[0].tokens()[0].shape[1]
    flops = 2.0 * tokens * sum(p.numel() for p in weights)
    yield Aside(
        "encoding a prompt", float(sum(p.nbytes for p in weights)), flops, 1, f"{tokens} tokens; every text once, before the networks are on the device"
    )


def _noise(family: Family, n: int) -> Tensor:
    return torch.zeros(n, *family.latent_shape, device=family.device)


def _decode(family: Family, n: int) -> Tensor:
    return family.decode(_noise(family, n)).clamp(0, 1)


def _student(depth: Depth, recipe: Recipe, n: int) -> Tensor:
    cond, null = depth.family.blank(n)
    return recipe.sampling(depth.state.roles["student"], cond, null, _noise(depth.family, n), depth.family.path, depth.state.rng)


def _teacher(depth: Depth, recipe: Recipe, n: int) -> Tensor:
    """One step of its sampler."""
    family, (cond, null) = depth.family, depth.family.blank(n)
    guidance = by_level(recipe.guidance, recipe.guidance_2, family.boundary)
    return sample_ode(depth.state.roles["teacher"], cond, null, _noise(family, n), steps=1, path=family.path, shift=family.shift, guidance=guidance)


def _export(depth: Depth) -> list[Tensor]:
    """The average in the network's dtype, and the merged layers."""
    state, copied = depth.state, []
    trained = state.trained["student"]
    if trained.ema is not None:
        copied += [mean.to(p, copy=True) for p, mean in zip(trained.parameters.values(), trained.ema.values(), strict=True) if mean.dtype != p.dtype]
    module = state.module_of("student").backbone.module
    return copied + [torch.empty_like(p) for name, p in module.named_parameters() if ".base_layer." in name]
