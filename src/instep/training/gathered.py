"""The student of a sharded run, whole on rank 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from torch import nn

from instep.core.shards import assign, whole
from instep.methods.recipe import Recipe
from instep.models.family import Family
from instep.models.role import Role
from instep.training.build import make_roles
from instep.training.execution import Execution
from instep.training.state import TrainState


def whole_student(state: TrainState, recipe: Recipe, lent: Family, execution: Execution) -> Callable[[], Role]:
    """What returns the student on rank 0, which takes it while it leads: of a sharded run a network of its own, in host memory where networks take turns
    on a device, filled a tensor at a time."""
    student = cast(Role, state.roles["student"])
    if not state.sharded:
        return lambda: student
    target: dict[str, nn.Parameter] = {}

    def fill() -> None:
        for key, p in student.named_parameters().items():
            full = whole(p.detach())
            if target:
                assign(target[key], full)

    taken = state.ranks.led.register(fill)

    def filled() -> Role:
        alone = replace(execution, shard="off", context_parallel=1, offload=state.device.type != "cpu")
        only = replace(recipe, roles={"student": replace(recipe.roles["student"], optim=None, copy=True)})
        role = make_roles(only, alone.place(lent), alone)["student"]
        target.update(role.named_parameters())
        taken()
        return role

    return filled
