"""A sharded run's state as the checkpoint of one process, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from instep.core.ranks import Ranks
from instep.core.shards import assign, local, part_of, whole
from instep.methods.recipe import Recipe
from instep.models.family import Family
from instep.models.role import Role
from instep.training.build import make_roles
from instep.training.execution import Execution
from instep.training.state import TrainState


def gathered(contents: Any, ranks: Ranks) -> Any:
    """The contents of a checkpoint with whole tensors, those that were divided in rank 0's host memory; a collective, one tensor at a time. Other ranks keep
    no tensor that was divided: None."""

    def on_first(x: Tensor) -> Tensor | None:
        if not isinstance(x, DTensor):
            return x
        full = whole(x)
        return full.cpu() if ranks.first else None

    return _mapped(contents, on_first)


def mine(contents: Any) -> Any:
    """The contents with this rank's part of each tensor."""
    return _mapped(contents, local)


def divided(contents: dict[str, Any], state: TrainState) -> dict[str, Any]:
    """The contents of a checkpoint, which every rank has read, with this rank's part of what its state divides."""
    if not state.sharded:
        return contents
    found = dict(contents)
    found["ema"] = {name: {key: part_of(x, state.trained[name].masters[key]) for key, x in averages.items()} for name, averages in contents["ema"].items()}
    found["optim"] = {name: _moments(optim, list(state.trained[name].masters.values())) for name, optim in contents["optim"].items()}
    found["reference"] = {key: part_of(x, state.reference[int(key)]) for key, x in contents["reference"].items()}
    return found


def lay_out(state: TrainState) -> None:
    """Takes this rank's part of moments and averages that were loaded whole."""
    if not state.sharded:
        return
    for trained in state.trained.values():
        for p, kept in trained.optimizer.state.items():
            kept |= {key: part_of(x, p) for key, x in kept.items() if isinstance(x, Tensor) and x.ndim and not isinstance(x, DTensor)}
        if trained.ema is not None:
            trained.ema = {key: x if isinstance(x, DTensor) else part_of(x, trained.masters[key]) for key, x in trained.ema.items()}


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
        alone = replace(execution, shard="off", offload=state.device.type != "cpu")
        only = replace(recipe, roles={"student": replace(recipe.roles["student"], optim=None, copy=True)})
        role = make_roles(only, alone.place(lent), alone)["student"]
        target.update(role.named_parameters())
        taken()
        return role

    return filled


def _moments(optim: Mapping[str, Any], masters: Sequence[Tensor]) -> dict[str, Any]:
    def parts(number: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        return {key: part_of(x, masters[int(number)]) if isinstance(x, Tensor) and x.ndim else x for key, x in entry.items()}

    return {**optim, "state": {number: parts(number, entry) for number, entry in optim["state"].items()}}


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Nested dicts and sequences with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    return type(value)(_mapped(inner, change) for inner in value) if isinstance(value, list | tuple) else value
