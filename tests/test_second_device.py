"""An iteration on a second device, simulated: nothing mixes devices or waits."""

from __future__ import annotations

import pytest
import torch
from every_recipe import DISTINCT, RECIPES, SIZE, batches_of, small, state_of
from fast import slow_but
from second_device import NoMixing, without_steps
from tiny import tiny_wan_pipeline
from torch import nn

from instep.diffusion.transfer import constants, to_device, to_match
from instep.models.wan import WanFamily
from instep.planning.meta import Unread
from instep.training.execution import Execution
from instep.training.step import iteration

ALTERNATING = [(name, 4 if i % 2 else None) for i, name in enumerate(RECIPES)]


def test_the_recipes_that_the_fast_suite_takes_have_every_term_and_critic():
    def parts(names):
        return {type(part) for name in names for stage in small(name).stages for part in (*stage.terms, *stage.critics)}

    assert parts(DISTINCT) == parts(RECIPES)


@pytest.mark.parametrize(("name", "rank"), slow_but([case for case in ALTERNATING if case[0] in DISTINCT], ALTERNATING))
def test_no_recipe_mixes_devices_or_waits_within_an_iteration(name, rank):
    """Full copies of every other recipe, adapters of the rest: an operation on the meta device takes long."""
    execution = Execution(device="meta")
    placed = execution.place(WanFamily(tiny_wan_pipeline(layers=1), SIZE, name="tiny"))
    recipe = small(name, lora_rank=rank)
    state, source = without_steps(state_of(recipe, placed, execution)), batches_of(placed)
    state.reward_fn = state.reward_grad_fn = lambda x, prompts: placed.decode(x).mean((1, 2, 3, 4))
    with NoMixing():
        for stage in recipe.stages:
            log = iteration(state, stage, source.next(stage), 0.0, Unread())
    assert log == {} and {p.device.type for trained in state.trained.values() for p in trained.parameters.values()} == {"meta"}


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda x: nn.functional.linear(torch.randn(2, 3), x), "mixes devices"),
        (lambda x: x[torch.tensor([0, 2])], "mixes devices"),
        (lambda x: torch.randn(3).to("meta"), "blocks"),
        (lambda x: x.copy_(torch.randn(3, 3)), "blocks"),
        (lambda x: x.double(), "float64"),
    ],
)
def test_mixing_waiting_and_float64_are_found(operation, message):
    with NoMixing(), pytest.raises(RuntimeError, match=message):
        operation(torch.randn(3, 3, device="meta"))


def test_what_does_not_wait_is_let_pass():
    with NoMixing():
        x = to_device(torch.randn(3, 3), "meta")
        assert (to_match(torch.arange(3).double(), x) * x + constants((1, 2, 3), x)).dtype == torch.float32
