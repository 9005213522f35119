"""Computing in bfloat16, with float32 masters and averages."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from every_recipe import PROMPTS, RECIPES, REWARD, SIZE, batches_of, family, run_stages, small, state_of
from fast import slow_but
from PIL import Image
from short_runs import BF16, FAST, in_bfloat16, run
from test_run import rows
from tiny import tiny_cogvideox_pipeline, tiny_sd3_pipeline, tiny_wan22_pipeline, tiny_wan_i2v_pipeline, tiny_wan_pipeline
from torch import nn

from instep.core.size import Size
from instep.data.prompt import Prompt
from instep.methods.role_config import AdamWConfig
from instep.models.backbone import Backbone
from instep.models.borrow import cast, compute_dtype
from instep.models.families import family_of
from instep.models.role import Role
from instep.models.wan import WanFamily
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.training.execution import Execution
from instep.training.options import RunOptions
from instep.training.run import train
from instep.training.state import TrainedParams
from instep.training.step import iteration

# full copies of every other recipe, adapters of the rest, each with either VAE in turn
ALTERNATING = [(name, (None, 4)[i % 2], (torch.float32, BF16)[i // 2 % 2]) for i, name in enumerate(RECIPES)]


@pytest.mark.parametrize(("name", "rank", "vae"), slow_but(ALTERNATING, product(RECIPES, (None, 4), (torch.float32, BF16))))
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
    """Of the weights that a float32 run moves in 15 steps at a rate of 2e-6, nearly all masters move in bfloat16 too; rounded weights hardly do."""
    moved = {}
    for dtype in ("float32", "bfloat16"):
        recipe = dmd2(Common(steps=2, batch=2, critic_updates=1, student=AdamWConfig(2e-6), fake=AdamWConfig(2e-6), ema=0.99), iterations=15)
        execution = Execution(dtype=dtype)
        placed = execution.place(family())
        state, source = state_of(recipe, placed, execution), batches_of(placed)
        before = {key: p.clone() for key, p in state.trained["student"].state().items()}
        rounded = {key: p.detach().clone() for key, p in state.trained["student"].parameters.items()}
        for step in range(15):
            iteration(state, recipe.stages[0], source.next(recipe.stages[0]), step / 15)
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
        recipe = dmd2(Common(steps=2, batch=4, critic_updates=1, student=AdamWConfig(1e-4), fake=AdamWConfig(1e-4)), iterations=20)
        execution = Execution(dtype=dtype)
        placed = execution.place(family())
        state, source = state_of(recipe, placed, execution), batches_of(placed)
        losses[dtype] = torch.tensor([iteration(state, recipe.stages[0], source.next(recipe.stages[0]), step / 20)["critic/fake"] for step in range(20)])
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
    with pytest.raises(ValueError, match="holds another run .its dtype: bfloat16 there, float32 now.; to go on with it give dtype bfloat16 .--dtype bfloat16."):
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


def test_a_resumed_run_names_what_its_weights_were_rounded_to(tmp_path):
    """A pipeline that was loaded in another dtype, though both runs compute in float32; and one from another folder."""
    recipe = dmd2(Common(steps=2, batch=4, critic_updates=1, **FAST), iterations=1)
    options = RunOptions(save_every=50, probe_every=50, execution=Execution(dtype="float32"))
    train(recipe, WanFamily(tiny_wan_pipeline(), SIZE, name="tiny", source="a"), out=tmp_path / "a", prompts=PROMPTS, options=options)
    narrow = in_bfloat16(tiny_wan_pipeline())
    with pytest.raises(ValueError, match="its weights, other_weights differ: its model was loaded in float32, and this one in bfloat16; it was"):
        train(recipe, WanFamily(narrow, SIZE, name="tiny", source="a"), out=tmp_path / "a", prompts=PROMPTS, options=options)
    with pytest.raises(ValueError, match="its weights, other_weights differ: its model came from a, and this one from b; it was"):
        train(recipe, WanFamily(tiny_wan_pipeline(1), SIZE, name="tiny", source="b"), out=tmp_path / "a", prompts=PROMPTS, options=options)


def test_float16_is_refused_with_the_fix_before_the_run(tmp_path):
    pipe = tiny_wan_pipeline()
    cast(pipe.transformer, torch.float16)
    with pytest.raises(ValueError, match="dtype: tiny is loaded in float16.*dtype=torch.bfloat16"):
        run(WanFamily(pipe, SIZE, name="tiny"), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert run(WanFamily(pipe, SIZE, name="tiny"), tmp_path / "b", iterations=1, dtype="bfloat16").student is not None


def test_dtype_of_a_network_is_that_of_most_of_it():
    pipe = in_bfloat16(tiny_wan_pipeline())
    assert next(pipe.transformer.parameters()).dtype == torch.float32 and compute_dtype(pipe.transformer) == BF16
    cast(pipe.transformer, torch.float64)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float64}
    assert REWARD.differentiable
