"""How a run is executed: device, precision, memory. Whatever is chosen, a run computes the same up to rounding, and what was lent stays as it was."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from every_recipe import PROMPTS, RECIPES, REWARD, SIZE, batches_of, family, run_stages, small, state_of
from PIL import Image
from second_device import NoMixing, Poisoned, without_steps
from test_run import rows
from tiny import tiny_cogvideox_pipeline, tiny_sd3_pipeline, tiny_wan22_pipeline, tiny_wan_i2v_pipeline, tiny_wan_pipeline
from torch import Tensor, nn

from instep.core.rows import by_rows, joined, slices
from instep.core.size import Size
from instep.data.prompt import Prompt
from instep.diffusion.transfer import constants, to_device, to_match
from instep.methods.recipe import AdamWConfig
from instep.models.backbone import Backbone
from instep.models.borrow import cast, compute_dtype, visiting
from instep.models.families import family_of
from instep.models.residency import Residency
from instep.models.role import Role
from instep.models.wan import WanFamily
from instep.planning.meta import Unread
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.rewards.base import FunctionReward, as_reward
from instep.rewards.decoded import make_reward_grad_fn
from instep.training.execution import LARGE, Execution
from instep.training.loop import Interrupted
from instep.training.options import RunOptions
from instep.training.reward_networks import modules_in
from instep.training.run import train
from instep.training.state import TrainedParams
from instep.training.step import iteration, snapshot_reference, sync_average

BF16 = torch.bfloat16
QUICK = RunOptions(save_every=50, probe_every=50, teacher_samples=4)


def in_bfloat16(pipe, vae: torch.dtype = torch.float32):
    """As `from_pretrained(dtype=torch.bfloat16, vae=a VAE in float32)` loads it."""
    cast(pipe.transformer, BF16)
    cast(pipe.text_encoder, BF16)
    cast(pipe.vae, vae)
    return pipe


# what was lent


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


FAST = {"student": AdamWConfig(1e-2), "fake": AdamWConfig(1e-2)}


def run(pipe, out, iterations: int = 2, rank: int | None = None, **options):
    recipe = dmd2(Common(steps=2, batch=4, critic_updates=1, lora_rank=rank, **FAST), iterations=iterations)
    return train(recipe, pipe, out=out, prompts=PROMPTS, options=RunOptions(save_every=50, probe_every=50, execution=Execution(**options)))


@pytest.mark.parametrize("rank", [None, 4])
def test_a_pipeline_is_given_back_as_it_was_lent(tmp_path, rank):
    pipe = tiny_wan_pipeline()
    pipe.transformer.train().requires_grad_(True)
    at_size, before, seen = WanFamily(pipe, SIZE, name="tiny"), looks(pipe), velocity(pipe)
    run(at_size, tmp_path / "a", rank=rank, checkpointing="on")
    assert looks(pipe) == before and torch.equal(velocity(pipe), seen)


class Broken(Exception):
    pass


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("end", ["done", "error", "ctrl-c"])
@pytest.mark.parametrize("offload", [False, True])
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


# precision


@pytest.mark.parametrize("vae", [torch.float32, BF16])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_a_pipeline_in_bfloat16_trains_with_every_recipe(name, rank, vae):
    execution = Execution()
    placed = execution.place(WanFamily(in_bfloat16(tiny_wan_pipeline(), vae), SIZE, name="tiny"))
    recipe = small(name, lora_rank=rank)
    state = state_of(recipe, placed, execution)
    before = {role: {key: p.clone() for key, p in trained.state().items()} for role, trained in state.trained.items()}
    logs = run_stages(recipe, state, batches_of(placed))
    assert all(value == value and abs(value) < 1e6 for log in logs for value in log.values())
    assert placed.dtype == BF16 and placed.pipe.transformer.scale_shift_table.dtype == torch.float32
    for role, trained in state.trained.items():
        kept = [
            *trained.state().values(),
            *(trained.ema or {}).values(),
            *(v for s in trained.optimizer.state.values() for v in (s["exp_avg"], s["exp_avg_sq"])),
        ]
        assert {p.dtype for p in kept} == {torch.float32}, role
        assert any(not torch.equal(p, before[role][key]) for key, p in trained.state().items()), role
        for key, p in trained.parameters.items():
            assert torch.equal(p, trained.masters[key].to(p.dtype)) and p.grad is None


@pytest.mark.parametrize("make", [tiny_wan22_pipeline, tiny_wan_i2v_pipeline, tiny_cogvideox_pipeline, tiny_sd3_pipeline])
def test_every_family_computes_in_bfloat16(make, tmp_path):
    """Close to float32, with samples, conditions and predictions in float32; all parts in bfloat16, the VAE too."""
    size = {"tiny_cogvideox_pipeline": Size(32, 32, 9), "tiny_sd3_pipeline": Size(16, 16, 1)}.get(make.__name__, SIZE)
    image = tmp_path / "frame.png"
    Image.new("RGB", (size.width, size.height), (200, 30, 90)).save(image)
    wide, narrow = family_of(make(), size), family_of(make(), size).placed("cpu", BF16)
    cast(narrow.pipe.vae, BF16)
    prompts = [Prompt("a cat", str(image) if wide.takes_first_frame else None)] * 2
    x, t = torch.randn(2, *wide.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.4])
    with torch.no_grad():
        a, b = (Role("teacher", Backbone(f, f.pretrained))(x, t, f.encode(prompts)).x0 for f in (wide, narrow))
        m, n = wide.decode(x), narrow.decode(x)
        latents = wide.encode_media(m.clamp(0, 1)), narrow.encode_media(m.clamp(0, 1))
    for ours, theirs in ((a, b), (m, n), latents):
        assert theirs.dtype == torch.float32
        assert 0 < (ours - theirs).abs().mean() <= 0.02 * ours.abs().mean()


def test_small_steps_are_not_lost(tmp_path):
    """Of the weights that a float32 run moves in 30 steps at a rate of 2e-6, nearly all masters move in bfloat16 too; rounded weights hardly do."""
    moved = {}
    for dtype in ("float32", "bfloat16"):
        recipe = dmd2(Common(steps=2, batch=2, critic_updates=1, student=AdamWConfig(2e-6), fake=AdamWConfig(2e-6), ema=0.99), iterations=30)
        execution = Execution(dtype=dtype)
        placed = execution.place(family())
        state, source = state_of(recipe, placed, execution), batches_of(placed)
        before = {key: p.clone() for key, p in state.trained["student"].state().items()}
        rounded = {key: p.detach().clone() for key, p in state.trained["student"].parameters.items()}
        for step in range(30):
            iteration(state, recipe.stages[0], source.next(recipe.stages[0]), step / 30)
        student = state.trained["student"]
        assert student.ema is not None
        moved[dtype] = torch.cat([(p != before[key]).flatten() for key, p in student.state().items()])
        average = torch.cat([(p != before[key]).flatten() for key, p in student.ema.items()])
        network = torch.cat([(p != rounded[key]).flatten() for key, p in student.parameters.items()])
    both = (moved["float32"] & moved["bfloat16"]).sum() / moved["float32"].sum()
    assert both >= 0.99 and average.float().mean() >= 0.99 * moved["bfloat16"].float().mean()
    assert network.float().mean() < 0.5, "in bfloat16 alone most steps are lost"


def test_losses_in_bfloat16_are_those_of_float32():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        recipe = dmd2(Common(steps=2, batch=4, critic_updates=1, student=AdamWConfig(1e-4), fake=AdamWConfig(1e-4)), iterations=50)
        execution = Execution(dtype=dtype)
        placed = execution.place(family())
        state, source = state_of(recipe, placed, execution), batches_of(placed)
        losses[dtype] = torch.tensor([iteration(state, recipe.stages[0], source.next(recipe.stages[0]), step / 50)["critic/fake"] for step in range(50)])
    assert ((losses["bfloat16"] - losses["float32"]).abs() / losses["float32"]).median() <= 0.02


def test_a_bfloat16_run_resumes_to_the_same_state(tmp_path):
    from test_run import interrupted_before

    def go(out):
        recipe = dmd2(Common(steps=2, batch=4, critic_updates=1, **FAST), iterations=3)
        return train(recipe, family(), out=out, prompts=PROMPTS, options=RunOptions(save_every=50, probe_every=50, execution=Execution(dtype="bfloat16")))

    whole = go(tmp_path / "whole")
    with interrupted_before(2):
        go(tmp_path / "cut")
    cut = go(tmp_path / "cut")
    with pytest.raises(
        ValueError, match="holds another run .its dtype: bfloat16 there, float32 now.; to go on with it give dtype bfloat16 .--dtype bfloat16."
    ):
        run(WanFamily(tiny_wan_pipeline(), SIZE, name="tiny"), tmp_path / "cut", iterations=3)
    for role in ("student", "fake"):
        mine, theirs = whole.state.trained[role], cut.state.trained[role]
        assert all(torch.equal(p, theirs.state()[key]) for key, p in mine.state().items())
        assert any((p - p.to(BF16).float()).abs().max() > 0 for p in mine.state().values()), "masters hold what bfloat16 does not"
    assert rows(whole.out)[-1]["critic/fake"] == rows(cut.out)[-1]["critic/fake"]


def test_gradients_of_micro_batches_add_up_in_float32():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(64).to(BF16))
    trained = TrainedParams({"p": p}, AdamWConfig(1e-3))
    parts = [torch.randn(64) * 10.0**-k for k in range(4)]
    for part in parts:
        (p * part.to(BF16)).sum().backward()
    master = trained.masters["p"]
    assert p.grad is None and master.grad is not None and master.grad.dtype == torch.float32
    torch.testing.assert_close(master.grad, sum(part.to(BF16).float() for part in parts), rtol=0, atol=1e-7)


def test_the_average_of_a_critic_follows_each_of_its_steps():
    """Three updates an iteration: the average is the recursion over the weights after each of them, with the horizon of a young average."""
    recipe = dmd2(Common(steps=2, batch=2, critic_updates=3, **FAST), iterations=2)
    recipe = replace(recipe, roles={**recipe.roles, "fake": replace(recipe.roles["fake"], ema=0.9)})
    placed = family()
    state, source = state_of(recipe, placed), batches_of(placed)
    fake = state.trained["fake"]
    path = [{key: p.clone() for key, p in fake.state().items()}]
    step = fake.step

    def kept(*args):
        found = step(*args)
        path.append({key: p.clone() for key, p in fake.state().items()})
        return found

    fake.step = kept  # type: ignore[method-assign]
    for i in range(2):
        iteration(state, recipe.stages[0], source.next(recipe.stages[0]), i / 2)
    assert len(path) == 7 and fake.steps == 6
    for key, mean in fake.ema.items():
        expected = path[0][key].double()
        for n, weights in enumerate(path[1:], 1):
            decay = min(0.9, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * weights[key].double()
        assert torch.allclose(mean.double(), expected, rtol=0, atol=1e-6), key


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing():
    p = nn.Parameter(torch.ones(3))
    trained = TrainedParams({"p": p}, AdamWConfig(1e-1, betas=(0.9, 0.99)), ema=0.5)
    for bad in (float("nan"), float("inf")):
        p.grad = torch.tensor([1.0, bad, 1.0])
        norm, finite = trained.step(1e-1)
        trained.settle(bool(finite))
        assert not finite and not norm.isfinite() and p.grad is None
        assert torch.equal(p, torch.ones(3)) and trained.steps == 0 and torch.equal(trained.ema["p"], torch.ones(3))
    p.grad = torch.ones(3)
    norm, finite = trained.step(1e-1)
    trained.settle(bool(finite))
    assert finite and trained.steps == 1 and torch.allclose(p, torch.full((3,), 0.9)), "the first step of AdamW is its rate: the skipped ones left no trace"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"micro_batch": 0}, "micro_batch: 0 is not allowed; 1 or more rows"),
        ({"dtype": "float16"}, "dtype: 'float16' is not allowed; allowed: bfloat16, float32"),
        ({"checkpointing": True}, "checkpointing: True is not allowed; allowed: auto, on, off"),
        ({"attention": "fastest"}, "attention: 'fastest' is not allowed; allowed: flash, .*_native_cudnn"),
        ({"device": "gpu"}, "device: 'gpu' is not allowed; cpu, cuda, cuda:1 or mps"),
        ({"device": "cuda:77"}, "device: cuda:77 is not there; this machine has"),
    ],
)
def test_settings_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        Execution(**given)


def test_a_run_needs_a_device_with_values_and_the_package_of_its_backend(tmp_path):
    for options, message in (
        ({"device": "meta"}, "device: meta is not allowed for a run: .*cpu, cuda"),
        ({"attention": "flash"}, "attention: flash is not usable here: .*flash-attn.*; usable: .*native"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            run(WanFamily(tiny_wan_pipeline(), SIZE, name="tiny"), tmp_path / "a", **options)
        assert "\n" not in str(refused.value) and not (tmp_path / "a").exists()
    Execution(attention="native").check()


def test_a_resumed_run_names_what_its_weights_were_rounded_to(tmp_path):
    """A pipeline that was loaded in another dtype, though both runs compute in float32; and one from another folder."""
    recipe = dmd2(Common(steps=2, batch=4, critic_updates=1, **FAST), iterations=1)
    options = RunOptions(save_every=50, probe_every=50, execution=Execution(dtype="float32"))
    train(recipe, WanFamily(tiny_wan_pipeline(), SIZE, name="tiny", source="a"), out=tmp_path / "a", prompts=PROMPTS, options=options)
    narrow = in_bfloat16(tiny_wan_pipeline())
    with pytest.raises(ValueError, match="its weights differ: its model was loaded in float32, and this one in bfloat16; it was dmd2 with seed 0"):
        train(recipe, WanFamily(narrow, SIZE, name="tiny", source="a"), out=tmp_path / "a", prompts=PROMPTS, options=options)
    with pytest.raises(ValueError, match="its weights differ: its model came from a, and this one from b; it was"):
        train(recipe, WanFamily(tiny_wan_pipeline(1), SIZE, name="tiny", source="b"), out=tmp_path / "a", prompts=PROMPTS, options=options)


def test_float16_is_refused_with_the_fix_before_the_run(tmp_path):
    pipe = tiny_wan_pipeline()
    cast(pipe.transformer, torch.float16)
    with pytest.raises(ValueError, match="dtype: tiny is loaded in float16.*dtype=torch.bfloat16"):
        run(WanFamily(pipe, SIZE, name="tiny"), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert run(WanFamily(pipe, SIZE, name="tiny"), tmp_path / "b", iterations=1, dtype="bfloat16").student is not None


def test_checkpointing_follows_the_size():
    with torch.device("meta"):
        large, little = nn.Linear(LARGE // 1000 + 1, 1000), nn.Linear(10, 10)
    assert [Execution().checkpoints(net) for net in (large, little)] == [True, False]
    assert Execution(checkpointing="on").checkpoints(little) and not Execution(checkpointing="off").checkpoints(large)


def test_offloaded_masters_step_alike():
    """On one device nothing moves; what is stepped is a copy, and the network follows it."""
    torch.manual_seed(0)
    one, two = (nn.Parameter(torch.ones(5).to(BF16)) for _ in range(2))
    here, there = TrainedParams({"p": one}, AdamWConfig(1e-3), 0.9), TrainedParams({"p": two}, AdamWConfig(1e-3), 0.9, host=True)
    for _ in range(3):
        g = torch.randn(5)
        for p, trained in ((one, here), (two, there)):
            (p * g.to(BF16)).sum().backward()
            trained.settle(bool(trained.step(1e-3)[1]))
    assert torch.equal(one, two) and torch.equal(here.masters["p"], there.masters["p"]) and there.masters["p"].device.type == "cpu"


@pytest.mark.parametrize("name", ["dmd2", "dm-align-group", "dollar", "flow-dpo", "magic"])
@pytest.mark.parametrize("rank", [None, 4])
def test_offloaded_networks_compute_the_same(name, rank, monkeypatch):
    """Networks that take turns on a poisoned device, with every pass computed again for its gradient: the same weights after two iterations of every stage."""
    monkeypatch.setattr("instep.training.build.Residency", Poisoned)
    after = []
    for offload in (False, True):
        execution = Execution(offload=offload)
        placed = execution.place(family())
        recipe = small(name, lora_rank=rank)
        state = state_of(recipe, placed, execution)
        source = batches_of(placed)
        run_stages(recipe, state, source)
        run_stages(recipe, state, source)
        after.append({f"{role}.{key}": p for role, trained in state.trained.items() for key, p in trained.state().items()})
    assert after[0].keys() == after[1].keys() and all(torch.equal(p, after[1][key]) for key, p in after[0].items())


@pytest.mark.parametrize("role", ["reference", "average"])
def test_weights_that_are_not_trained_are_written_at_home(role, monkeypatch):
    """A frozen copy that is on the device while the student is copied into it: it has the student's weights there the next time."""
    monkeypatch.setattr("instep.training.build.Residency", Poisoned)
    import every_recipe

    name = {"reference": "flow-dpo", "average": "dollar"}[role]
    monkeypatch.setattr(every_recipe, "STAGES", {**every_recipe.STAGES, "dollar": {**every_recipe.STAGES["dollar"], "target": "average"}})
    execution = Execution(offload=True)
    placed = execution.place(family())
    recipe = small(name)
    stage = next(stage for stage in recipe.stages if role in stage.needs)
    state = state_of(recipe, placed, execution)
    network = state.roles[role].backbone
    network.residency.use(network.module)
    student = state.trained["student"]
    with torch.no_grad():
        for key, p in student.masters.items():
            p.add_(1)
            if student.ema is not None:
                student.ema[key].copy_(p)
    student.round()
    (snapshot_reference if role == "reference" else sync_average)(state, stage)
    network.residency.clear()
    network.residency.use(network.module)
    assert all(torch.equal(p, student.masters[key]) for key, p in network.module.named_parameters())


@pytest.mark.parametrize("rank", [None, 4])
def test_an_offloaded_run_is_the_run_without(rank, tmp_path, monkeypatch):
    """A whole run on the poisoned device: probes, checkpoints, an interruption and its continuation, and the export."""
    from safetensors.torch import load_file
    from test_run import interrupted_before

    recipe, done = small("dm-align-group", lora_rank=rank), {}
    for offload in (False, True):
        out = tmp_path / str(offload)
        options = RunOptions(save_every=1, probe_every=1, teacher_samples=4, execution=Execution(offload=offload))
        with monkeypatch.context() as patch:
            patch.setattr("instep.training.build.Residency", Poisoned)
            if offload:
                with interrupted_before(1):
                    train(recipe, family(), out=out, prompts=PROMPTS, reward=REWARD, options=options)
            done[offload] = train(recipe, family(), out=out, prompts=PROMPTS, reward=REWARD, options=options)
    here, there = done[False], done[True]
    timeless = [[{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows(each.out)] for each in (here, there)]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 3 and any(key.startswith("probe/") for key in timeless[0][-1])
    for file in sorted(here.student.rglob("*.safetensors")):
        mine, theirs = load_file(file), load_file(there.student / file.relative_to(here.student))
        assert mine.keys() == theirs.keys() and all(torch.equal(x, theirs[key]) for key, x in mine.items()), file.name
    for role, trained in here.state.trained.items():
        assert all(torch.equal(p, there.state.trained[role].state()[key]) for key, p in trained.state().items()), role


def test_one_network_is_on_the_device_at_a_time(monkeypatch):
    trained, frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    home = {id(net): net.weight.data for net in (trained, frozen)}
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: self.clone())
    residency = Residency(torch.device("cpu"))
    residency.use(trained)
    there = trained.weight.data
    assert there.data_ptr() != home[id(trained)].data_ptr()
    with torch.no_grad():
        trained.weight += 1
    residency.use(trained)
    assert trained.weight.data_ptr() == there.data_ptr(), "it stays while it is used"
    residency.use(frozen)
    assert trained.weight.data_ptr() == home[id(trained)].data_ptr() and torch.equal(trained.weight, there), "an update goes home too"
    assert frozen.weight.data_ptr() != home[id(frozen)].data_ptr()
    residency.clear()
    assert frozen.weight.data_ptr() == home[id(frozen)].data_ptr()


@pytest.mark.parametrize("rank", [None, 4])
def test_compiled_blocks_compute_the_same(rank, monkeypatch):
    """Traced, and run by PyTorch itself: with adapters, checkpointing and a condition that blocks read; no variant is left uncompiled."""
    import torch._dynamo

    from instep.training import execution as module

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(module, "COMPILE", {"backend": "eager"})
    logs = []
    for compiled in (False, True):
        execution = Execution(compile=compiled, checkpointing="on")
        placed = execution.place(WanFamily(tiny_wan_pipeline(layers=1), SIZE, name="tiny"))
        recipe = small("dm-align-group", lora_rank=rank)
        logs.append(run_stages(recipe, state_of(recipe, placed, execution), batches_of(placed)))
    frames = torch._dynamo.utils.counters["frames"]
    assert logs[0] == logs[1] and frames["ok"] == frames["total"] >= 4 and not torch._dynamo.utils.counters["graph_break"]


def test_the_attention_backend_is_that_of_the_run_alone(tmp_path):
    from diffusers.models import attention_dispatch

    before, seen = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0], set()

    def reward(media, prompts):
        seen.add(attention_dispatch._AttentionBackendRegistry.get_active_backend()[0].value)
        return media.mean((1, 2, 3, 4))

    options = RunOptions(save_every=50, probe_every=50, execution=Execution(attention="_native_math"))
    recipe = small("dm-align-group")
    train(recipe, family(), out=tmp_path / "a", prompts=PROMPTS, reward=reward, options=options)
    assert seen == {"_native_math", before.value} and attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] == before


# rows


def test_slices_cover_all_rows_once():
    assert slices(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)] and slices(5, None) == [slice(0, 5)] == slices(5, 9)
    with pytest.raises(ValueError, match="micro_batch: 0"):
        slices(5, 0)


def test_rows_a_few_at_a_time_give_the_same_gradient_with_the_graph_of_a_few():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    alive, most = 0, 0

    def seen(rows: slice) -> Tensor:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return net(x[rows])

    def finished(*_: object) -> None:
        nonlocal alive
        alive = 0

    net[0].weight.register_post_accumulate_grad_hook(finished)
    whole = torch.autograd.grad(net(x).square().sum(), (x, *net.parameters()))
    output = joined(seen, 7, 2)
    alive = most = 0
    output.square().sum().backward()
    got = [x.grad, *(p.grad for p in net.parameters())]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(whole, got, strict=True)) and most <= 1 + len(slices(7, 2))
    with torch.no_grad():
        assert len(by_rows(seen, 7, 3)) == 3


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_a_reward_that_draws_draws_the_same_when_it_is_computed_again(micro_batch):
    """A weight for each sample from the host's generator: the gradient of a sum is those weights, whatever the slices are."""

    class Latents:
        def decode(self, x: Tensor) -> Tensor:
            return x

    decoder = Latents()
    decoder.micro_batch = micro_batch
    reward = FunctionReward(lambda media, prompts: torch.rand(len(media)) * media.mean((1, 2, 3)), "random weights", differentiable=True)
    scores = make_reward_grad_fn(decoder, reward)
    x = torch.ones(8, 3, 2, 2, requires_grad=True)
    torch.manual_seed(0)
    scores(x, ["a"] * 8).sum().backward()
    after = torch.rand(1)
    torch.manual_seed(0)
    weights = torch.rand(8)
    assert torch.allclose(x.grad.sum((1, 2, 3)), weights) and torch.equal(after, torch.rand(1)), "the caller's stream goes on as if nothing was computed twice"


def double(pipe):
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        part.double()
    return pipe


def gradients(name: str, micro_batch: int | None, make: Callable[[], WanFamily], **common) -> dict[str, Tensor]:
    """Gradients of all trained roles after the last stage's backward passes, unclipped."""
    placed = make().placed("cpu", None, micro_batch)
    recipe = small(name, batch=8, **common)
    state = state_of(recipe, placed)
    found: dict[str, Tensor] = {}

    def taking(role: str, trained: TrainedParams) -> Callable[..., tuple[Tensor, Tensor]]:
        def step(lr: float, optim: object = None) -> tuple[Tensor, Tensor]:
            found.update({f"{role}.{key}": p.grad.clone() for key, p in trained.masters.items() if p.grad is not None})
            trained.optimizer.zero_grad()
            return torch.zeros(()), torch.ones((), dtype=torch.bool)

        return step

    for role, trained in state.trained.items():
        if getattr(state.roles.get(role), "exits", None) is not None:
            state.roles[role].exits.to(placed.dtype)
        trained.step = taking(role, trained)  # type: ignore[method-assign]
    stage = recipe.stages[-1] if name != "apo" else recipe.stages[0]
    iteration(state, stage, batches_of(placed).next(stage), 0.0)
    return found


# all but DOLLAR, whose latent reward model is in float32
CHUNKED = ("dm-align-group", "flow-grpo", "dance-grpo", "amd", "refl", "flow-dpo", "dmdr", "dmd2", "apo")


@pytest.fixture
def groups_of_eight(monkeypatch):
    import every_recipe

    changed = {name: {**own, "group": 8} if "group" in own else own for name, own in every_recipe.STAGES.items()}
    # a discriminator's head is in float32
    changed["dmd2"] = {}
    monkeypatch.setattr(every_recipe, "STAGES", changed)


@pytest.fixture
def all_in_float64(monkeypatch):
    from diffusers.models.normalization import FP32LayerNorm

    from instep.diffusion import noise, rollout

    monkeypatch.setattr(FP32LayerNorm, "forward", lambda self, x: nn.functional.layer_norm(x.double(), self.normalized_shape, self.weight, self.bias, self.eps))
    monkeypatch.setattr(rollout, "randn", lambda shape, rng, device, dtype=torch.float64: noise.randn(shape, rng, device, torch.float64))


@pytest.mark.parametrize("name", CHUNKED)
def test_a_group_may_be_larger_than_a_micro_batch(name, groups_of_eight, all_in_float64):
    """The gradient of a batch of 8 (one group of 8, where there are groups) in micro-batches of 1, 2 and 8 rows, in float64."""

    def make() -> WanFamily:
        return WanFamily(double(tiny_wan_pipeline()), SIZE, name="tiny")

    whole = gradients(name, None, make)
    assert whole and any(g.abs().max() > 0 for g in whole.values())
    for micro_batch in (1, 2, 8):
        parts = gradients(name, micro_batch, make)
        assert parts.keys() == whole.keys()
        for key, g in whole.items():
            assert (parts[key] - g).abs().max() <= 1e-10 * max(1.0, float(g.abs().max())), (micro_batch, key)


@pytest.mark.parametrize("name", ["dm-align-group", "flow-grpo", "refl", "dollar"])
def test_micro_batches_in_float32(name, groups_of_eight):
    """The same in float32, where sums in another order differ by rounding: at most 1e-4 of the largest gradient."""
    whole, parts = gradients(name, None, family), gradients(name, 2, family)
    largest = max(float(g.abs().max()) for g in whole.values())
    assert max(float((parts[key] - g).abs().max()) for key, g in whole.items()) <= 1e-4 * largest


class Counted:
    """The most rows that a family's network, decoder, encoder, a reward and a monitor were given at once."""

    def __init__(self, placed) -> None:
        self.most: dict[str, int] = {}
        for name, x in (("forward", 1), ("decode_rows", 0), ("encode_rows", 0)):
            setattr(placed, name, self._counting(name, getattr(placed, name), x))

    def _counting(self, name: str, function: Callable, position: int) -> Callable:
        def call(*args):
            self.note(name, len(args[position]))
            return function(*args)

        return call

    def note(self, name: str, rows_: int) -> None:
        self.most[name] = max(self.most.get(name, 0), rows_)


@pytest.mark.parametrize(
    ("name", "micro_batch"), [*((name, 1) for name in ("dmd2", "dm-align-group", "refl", "dollar", "flow-grpo", "apo", "dmd")), ("dm-align-group", 3)]
)
def test_no_forward_decode_or_reward_sees_more_rows_than_a_micro_batch(name, micro_batch, tmp_path, monkeypatch):
    """A whole run: rollouts, critics, rewards, probes, views, the teacher's samples and the export's check."""
    counted: Counted | None = None
    place = WanFamily.placed

    def placed(self, *args, **kwargs):
        nonlocal counted
        other = place(self, *args, **kwargs)
        seen = Counted(other)
        seen.most = counted.most if counted else seen.most
        counted = seen
        return other

    def brightness(media: Tensor, prompts) -> Tensor:
        assert counted is not None
        counted.note("reward", len(media))
        return media.mean((1, 2, 3, 4))

    class Monitor:
        def metrics(self, media, prompts):
            assert counted is not None
            counted.note("monitor", len(media))
            return {"monitor_both": float(media.mean())}

    monkeypatch.setattr(WanFamily, "placed", placed)
    monkeypatch.setattr("instep.training.run.TEACHER_STEPS", 2)
    monkeypatch.setattr("instep.training.probe.TEACHER_STEPS", 2)
    lent = family()
    reward = FunctionReward(brightness, "brightness", differentiable=True)
    source = batches_of(lent)
    options = replace(QUICK, execution=Execution(micro_batch=micro_batch))
    train(small(name), lent, out=tmp_path / "run", prompts=PROMPTS, reward=reward, monitor=Monitor(), pairs=source.pairs, options=options)
    assert counted is not None and max(counted.most.values()) <= micro_batch, counted.most
    assert {"forward", "decode_rows", "monitor"} <= counted.most.keys()


def test_large_latents_are_decoded_frame_by_frame_for_their_gradient(monkeypatch):
    """The same video and gradient, and a graph that holds less."""
    from instep.models import wan_vae

    placed, kept, gradients_ = family(), [], []
    for whole in (2**18, 0):
        monkeypatch.setattr(wan_vae, "WHOLE", whole)
        x = torch.randn(1, *placed.latent_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        held: dict[int, int] = {}

        def pack(tensor: Tensor, held=held) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            media = placed.decode(x)
        media.square().mean().backward()
        kept.append(sum(held.values()))
        gradients_.append((media.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients_, strict=True)) and kept[1] < 0.7 * kept[0], kept


# a second device


@pytest.mark.parametrize(("name", "rank"), [(name, 4 if i % 2 else None) for i, name in enumerate(RECIPES)])
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


def test_dtype_of_a_network_is_that_of_most_of_it():
    pipe = in_bfloat16(tiny_wan_pipeline())
    assert next(pipe.transformer.parameters()).dtype == torch.float32 and compute_dtype(pipe.transformer) == BF16
    cast(pipe.transformer, torch.float64)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float64}
    assert REWARD.differentiable
