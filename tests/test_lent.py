"""A pipeline that is lent, and the networks of rewards, stay as they were."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from every_recipe import PROMPTS, SIZE, small
from fast import slow_but
from second_device import Poisoned
from short_runs import BF16, run
from tiny import tiny_wan_pipeline
from torch import Tensor, nn

from instep.models.borrow import visiting
from instep.models.families import family_of
from instep.models.wan import WanFamily
from instep.rewards.base import FunctionReward, as_reward
from instep.training.execution import Execution
from instep.training.loop import Interrupted
from instep.training.options import RunOptions
from instep.training.reward_networks import modules_in
from instep.training.run import train


def velocity(pipe) -> Tensor:
    x = torch.randn(1, 16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    text = pipe.encode_prompt(["a digit"], do_classifier_free_guidance=False, max_sequence_length=512)[0]
    with torch.no_grad():
        return pipe.transformer(x, torch.tensor([500.0]), text, return_dict=False)[0].clone()


def looks(pipe) -> dict[str, object]:
    """All that a run might leave behind on a pipeline's networks."""
    return {
        name: (
            [(key, p.dtype, p.device, p.requires_grad, p.data_ptr(), p.grad is None) for key, p in part.named_parameters()],
            list(part.state_dict()),
            [
                (type(m).__name__, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), type(getattr(m, "processor", None)).__name__)
                for m in part.modules()
            ],
            getattr(part, "gradient_checkpointing", None),
            dict(pipe.scheduler.config),
        )
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module)
    }


@pytest.mark.parametrize("rank", [None, 4])
def test_a_pipeline_is_given_back_as_it_was_lent(tmp_path, rank):
    pipe = tiny_wan_pipeline()
    pipe.transformer.train().requires_grad_(True)
    at_size, before, seen = WanFamily(pipe, SIZE, name="tiny"), looks(pipe), velocity(pipe)
    run(at_size, tmp_path / "a", rank=rank, checkpointing="on")
    assert looks(pipe) == before and torch.equal(velocity(pipe), seen)


class Broken(Exception):
    pass


@pytest.mark.parametrize(
    ("rank", "end", "offload"),
    slow_but(
        [(None, "done", True), (4, "done", False), (4, "error", True), (None, "error", False), (None, "ctrl-c", True), (4, "ctrl-c", False)],
        product((None, 4), ("done", "error", "ctrl-c"), (False, True)),
    ),
)
def test_a_pipeline_is_given_back_however_a_run_ends(rank, end, offload, tmp_path, monkeypatch):
    """Its networks, their devices, dtypes, adapters, hooks and gradients; and the reward's own network."""
    from instep.training import loop as module

    pipe, net = tiny_wan_pipeline(), nn.Linear(1, 1)
    scorer = [(p.data_ptr(), p.device, p.requires_grad) for p in net.parameters()]
    before, seen = looks(pipe), velocity(pipe)
    real = module.iteration

    def ends(state, *args):
        found = real(state, *args)
        if end == "error":
            raise Broken
        if end == "ctrl-c":
            signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(module, "iteration", ends)
    monkeypatch.setattr("instep.training.build.Residency", Poisoned)
    recipe = small("dm-align-group", lora_rank=rank)
    reward = FunctionReward(lambda media, prompts: net(media.mean((1, 2, 3, 4))[:, None])[:, 0], "scaled brightness", differentiable=True)
    options = RunOptions(save_every=50, probe_every=50, teacher_samples=4, execution=Execution(offload=offload))
    with {"done": nullcontext(), "error": pytest.raises(Broken), "ctrl-c": pytest.raises(Interrupted)}[end]:
        train(recipe, WanFamily(pipe, SIZE, name="tiny"), out=tmp_path / "a", prompts=PROMPTS, reward=reward, options=options)
    assert looks(pipe) == before and torch.equal(velocity(pipe), seen)
    assert [(p.data_ptr(), p.device, p.requires_grad) for p in net.parameters()] == scorer


def test_two_runs_on_one_pipeline_are_two_runs_on_two(tmp_path):
    pipe, at_size = tiny_wan_pipeline(), lambda pipe: WanFamily(pipe, SIZE, name="tiny")
    one = at_size(pipe)
    for i, (family_, rank) in enumerate(((one, 4), (one, None), (at_size(pipe), 8))):
        mine = run(family_, tmp_path / f"mine{i}", rank=rank).state.trained["student"].state()
        fresh = run(at_size(tiny_wan_pipeline()), tmp_path / f"fresh{i}", rank=rank).state.trained["student"].state()
        assert mine.keys() == fresh.keys() and all(torch.equal(mine[key], fresh[key]) for key in mine)


def by_accelerate(pipe):
    pipe.transformer.blocks[0]._hf_hook = object()


def by_group(pipe):
    pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def by_layerwise_casting(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=BF16, compute_dtype=torch.float32)


@pytest.mark.parametrize(
    ("hook", "message"),
    [(by_accelerate, "enable_model_cpu_offload, enable_sequential"), (by_group, "diffusers' .*group_offload"), (by_layerwise_casting, "diffusers' layerwise")],
)
def test_a_pipeline_that_moves_or_casts_by_hooks_is_refused(hook, message):
    pipe = tiny_wan_pipeline()
    hook(pipe)
    with pytest.raises(ValueError, match=f"pipeline: its transformer is moved or cast by hooks .{message}.*let the run place it"):
        family_of(pipe, SIZE)


class Holder:
    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def score(self, media: Tensor, prompts: object) -> Tensor:
        return self.net(media.mean((1, 2, 3, 4))[:, None])[:, 0]


class Slotted:
    __slots__ = ("net",)

    def __init__(self, net: nn.Module) -> None:
        self.net = net


@dataclass(frozen=True)
class Held:
    nets: dict[str, list[nn.Module]]


def scored_by(net: nn.Module, media: Tensor, prompts: object) -> Tensor:
    return media


def closure_over(given: object) -> Callable:
    def reward(media: Tensor, prompts: object) -> Tensor:
        return media if given is None else media * 2

    return reward


GLOBAL = nn.Linear(1, 1)


def of_a_global(media: Tensor, prompts: object) -> Tensor:
    return GLOBAL(media)


HIDING: dict[str, Callable[[nn.Module], object]] = {
    "bound method": lambda net: Holder(net).score,
    "partial": lambda net: functools.partial(scored_by, net),
    "partial's keyword": lambda net: functools.partial(scored_by, net=net),
    "partial of a bound method": lambda net: functools.partial(Holder(net).score, prompts=()),
    "closure": closure_over,
    "closure over a closure": lambda net: closure_over(closure_over(Holder(net))),
    "default": lambda net: lambda media, prompts, net=net: net(media),
    "dictionary": lambda net: {"a": {"b": net}},
    "list": lambda net: [1, "x", (net,)],
    "set": lambda net: {net},
    "dataclass": lambda net: Held({"a": [net]}),
    "slots": Slotted,
    "reward of a closure": lambda net: as_reward(closure_over(Holder(net))),
}


@pytest.mark.parametrize("how", HIDING)
def test_a_reward_may_hide_its_network(how):
    net = nn.Linear(1, 1)
    assert modules_in(HIDING[how](net)) == [net]


def test_a_function_may_name_its_network_and_may_hold_itself():
    assert modules_in(of_a_global) == [GLOBAL]
    around: list = []
    around.append(around)
    assert modules_in(around, lambda: late) == []
    late = None


def test_what_ships_holds_no_family():
    """Rewards and monitors bring their own networks to the device, and no pipeline."""
    from instep.bundled import find

    world = find("moving-digits").ready()
    nets = modules_in(world.reward, world.monitor)
    assert nets and not {id(part) for net in nets for part in net.modules()} & {id(part) for part in world.family.pretrained.modules()}


def test_rewards_and_monitors_come_along_and_go_home(monkeypatch):
    class Inner:
        def __init__(self) -> None:
            self.net, self.name = nn.Linear(2, 2), "x"

    class Outer:
        def __init__(self) -> None:
            self.classifier, self.parts = Inner(), (nn.Linear(1, 1), Inner())

    outer = Outer()
    assert set(modules_in(outer, None)) == {outer.classifier.net, outer.parts[0], outer.parts[1].net}
    home = [p.data_ptr() for module in modules_in(outer) for p in module.parameters()]
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: (asked.append(device), self.clone())[1])
    with pytest.raises(KeyError), visiting(modules_in(outer), "meta"):
        assert not set(home) & {p.data_ptr() for module in modules_in(outer) for p in module.parameters()} and set(asked) == {torch.device("meta")}
        raise KeyError
    assert [p.data_ptr() for module in modules_in(outer) for p in module.parameters()] == home
