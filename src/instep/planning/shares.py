"""What each of several devices has and sends, where they share a run: its share of every batch, and of sharded networks its part (docs/how_to/many_gpus.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from instep.methods.recipe import Recipe, Stage
from instep.training.checks import check_ranks

if TYPE_CHECKING:
    from instep.planning.trace import Depth, Model, Trace


def share_of(recipe: Recipe, gpus: int) -> Recipe:
    """The recipe with one device's share of every batch. Raises ValueError if the groups of a batch cannot be shared evenly, as a run does."""
    check_ranks(recipe, gpus)
    return replace(recipe, stages=tuple(replace(stage, batch=stage.batch // gpus if stage.steps else stage.batch) for stage in recipe.stages))


def divided(memory: Mapping[str, float], recipe: Recipe, gpus: int, whole: tuple[str, ...]) -> dict[str, float]:
    """Bytes by kind on each device of a sharded run: weights, gradients, moments and averages of networks are divided, and kinds that begin like one of `whole`
    and adapters are not. A trained network has its float32 weights alone (`models/sharded.py`)."""
    adapters = {name for name, role in recipe.roles.items() if role.lora is not None}
    found = {}
    for kind, count in memory.items():
        what, _, name = kind.rpartition(" of ")
        if kind.startswith(whole) or name in adapters:
            found[kind] = count
        elif not (what == "weights" and f"float32 weights of {name}" in memory):
            found[kind] = count / gpus
    return found


def sent_bytes(model: Model, stage: Stage, trace: Trace, *, sharded: bool, gpus: int) -> float:
    """Bytes that each of `gpus` devices sends in an iteration, by the best algorithms: (n - 1) / n of what is gathered or divided, twice that of what is
    averaged whole.

    What is whole on each device is averaged once in an optimiser step, in float32. A sharded network is gathered in its compute dtype for every call: forward,
    backward, and again where rows are computed again; its gradients are divided after every backward pass. The number of calls is that of the trace's FLOPs in
    those of one call of as many rows.
    """
    if gpus == 1:
        return 0.0
    part, sent = (gpus - 1) / gpus, 0.0
    updates = {"student": stage.inner_epochs if stage.terms else 0} | {critic.role: critic.updates for critic in stage.critics}
    sizes = {name: model.over_depths(partial(_trained_bytes, name)) for name in updates}
    copies = {name for name in updates if sharded and name in model.recipe.roles and model.recipe.roles[name].lora is None}
    sent += sum(2 * part * times * sizes[name] for name, times in updates.items() if name not in copies)
    if not sharded:
        return sent
    weights = sum(p.nbytes for p in model.family.pretrained.parameters())
    rows = model.family.micro_batch
    n = min(stage.batch, rows or stage.batch)
    one = model.trace_call(lambda depth: _call(depth, n)).total_flops
    again = 2 if rows is not None and rows < stage.batch else 1
    for name in model.recipe.roles:
        backward = trace.flops.get((name, "backward"), 0.0) / (one * (2 if name in copies else 1))
        sent += part * weights * (trace.flops.get((name, "forward"), 0.0) / one + again * backward)
        sent += part * backward * sizes[name] if name in copies else 0.0
    return sent


def _call(depth: Depth, n: int) -> Tensor:
    cond, _ = depth.family.blank(n)
    x = torch.zeros(n, *depth.family.latent_shape, device=depth.family.device)
    return depth.state.roles["student"](x, torch.ones(n), cond).x0


def _trained_bytes(role: str, depth: Depth) -> float:
    return sum(p.nbytes for p in depth.state.trained[role].masters.values())
