"""What each of several devices has and sends, where they share a run: its share of every batch, and of sharded networks its part (docs/how_to/many_gpus.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from instep.core.shards import is_divided
from instep.methods.recipe import Recipe, Stage
from instep.training.checks import check_ranks

if TYPE_CHECKING:
    from instep.planning.trace import Model


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


def sent_bytes(model: Model, stage: Stage, *, sharded: bool, gpus: int) -> float:
    """Bytes that each of `gpus` devices sends in an iteration at least, by the best algorithms: 2 (n - 1) / n of what is averaged, half of it for the weights
    of a sharded network in a pass, and half for their gradients.

    Gradients are averaged once in an optimiser step, in float32 or better. A sharded network is gathered in its compute dtype for a forward pass of every
    role that the stage calls, and once more for a backward pass: rollouts of several steps and micro-batches, which call it more often, send more.
    """
    if gpus == 1:
        return 0.0
    part, depth = (gpus - 1) / gpus, model.depths[-1]
    scale = model.blocks / depth.blocks if depth.blocks else 1.0
    sent = 0.0
    updates = {"student": stage.inner_epochs if stage.terms else 0} | {critic.role: critic.updates for critic in stage.critics}
    for name, times in updates.items():
        trained, copied = depth.state.trained[name], sharded and model.recipe.roles.get(name) is not None and model.recipe.roles[name].lora is None
        gradients = sum(master.nbytes for master in trained.masters.values() if not is_divided(master))
        sent += scale * times * part * gradients * (1 if copied else 2)
    if sharded:
        weights = sum(p.nbytes for p in model.family.pretrained.parameters())
        passes = 2 * sum(updates.values()) + 1  # forward and backward of what is trained, and the teacher
        sent += stage.accumulate * passes * part * weights
    return sent
