"""Drawn guidance scales: a student that is told them, alone and in a run, and the stock model that an export folds one of them into."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from fast import slow_but
from test_apo import PAIRS, QUICK, RANKED, TINY
from test_cogvideox import family as cogvideox
from test_dit import WORDS, tiny_dit
from test_forces import F64, view
from test_guidance_distillation import Parts
from test_run import PROMPTS, family, interrupted_before, rows, same
from tiny import tiny_wan_pipeline

from instep.cli.export import ExportArgs, at_guidance_scales, export_command, read_run, sampling_of, student_of
from instep.data.samples import PairSamples
from instep.diffusion.guidance_scales import GuidanceRange
from instep.diffusion.levels import OneOf
from instep.diffusion.path import RectifiedFlow
from instep.diffusion.prediction import Prediction
from instep.diffusion.sampling import Sampling
from instep.diffusion.transitions import Deterministic
from instep.lab.mixture import labels
from instep.lab.networks import VelocityMLP
from instep.lab.run import ensemble_state
from instep.lab.world import World
from instep.methods.guidance_distillation import GuidanceDistillation
from instep.methods.recipe import Recipe, RolloutConfig, Stage, describe
from instep.methods.role_config import LoRA, RoleConfig
from instep.methods.term import View
from instep.models.backbone import Backbone
from instep.models.dit import DiTFamily
from instep.models.embeddings import GuidanceEmbedding, fold_guidance
from instep.models.role import Role
from instep.models.wan import STOCK_TEXT_LENGTH
from instep.recipes.apo import apo
from instep.recipes.many_step import ManySteps
from instep.training.finish import with_folded_guidance
from instep.training.run import train
from instep.training.step import iteration

RANGE = GuidanceRange((1.5, 4.0), (0.0, 1.0))
BOTH = {"draw": (1.5, 4.0), "draw_skip": (0.0, 1.0), "skip": 0.5, "skip_blocks": (1,)}


def dit():
    return DiTFamily(tiny_dit(), WORDS)


FAMILIES = {"wan": (family, PROMPTS), "cogvideox": (cogvideox, PROMPTS), "dit": (dit, WORDS)}


def loud(embedding, seed=0, size=0.5):
    """An embedding that says something, as a trained one does."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in embedding.out.parameters():
            p.copy_(size * torch.randn(p.shape, generator=rng))
    return embedding


def told_role(fam, *, lora=None, checkpointing=False):
    torch.manual_seed(0)
    if lora is None:
        return Role("student", Backbone(fam, fam.new_backbone().requires_grad_(True), checkpointing=checkpointing), guidance_range=RANGE)
    backbone = Backbone(fam, fam.pretrained, checkpointing=checkpointing)
    backbone.add_adapter("student", LoRA(lora, float(lora)))
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in backbone.adapter_parameters("student").values():
            p.copy_(0.1 * torch.randn(p.shape, generator=rng))
    return Role("student", backbone, adapter="student", guidance_range=RANGE)


def noised(fam, names):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(2, *fam.latent_shape, generator=rng), torch.tensor([0.9, 0.4]), fam.encode(names[:2])


def test_guidance_scales_are_drawn_in_their_ranges():
    drawn = RANGE.draw(4000, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 2)
    torch.testing.assert_close(drawn.mean(0), torch.tensor([2.75, 0.5]), atol=0.05, rtol=0)
    torch.testing.assert_close(torch.stack([drawn.amin(0), drawn.amax(0)]), torch.tensor([[1.5, 0.0], [4.0, 1.0]]), atol=0.01, rtol=0)
    assert abs(torch.corrcoef(drawn.T)[0, 1]) < 0.05, "each on its own"
    fixed = GuidanceRange((3.0, 3.0))
    assert torch.equal(fixed.draw(5, torch.Generator()), torch.tensor([[3.0, 0.0]] * 5))
    ends = RANGE.features(torch.tensor([[1.5, 0.0], [4.0, 1.0]]))
    torch.testing.assert_close(ends[:, :2], torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    assert fixed.features(torch.tensor([[3.0, 0.0]])).isfinite().all()
    assert GuidanceRange.of_json(json.loads(json.dumps(describe(RANGE)))) == RANGE
    RANGE.check((1.5, 1.0))
    with pytest.raises(ValueError, match="guidance: 4.5 is not allowed; the student is conditioned on guidance 1.5 to 4, skip-layer guidance 0 to 1"):
        RANGE.check((4.5, 0.0))
    with pytest.raises(ValueError, match="skip: 1.1 is not allowed"):
        RANGE.check((2.0, 1.1))
    with pytest.raises(ValueError, match="draw: 3 1 is not allowed; two numbers, the lower one first"):
        GuidanceRange((3.0, 1.0))
    with pytest.raises(ValueError, match="draw_skip: -1 1 is not allowed; two numbers from 0 on"):
        GuidanceRange((1.0, 3.0), (-1.0, 1.0))


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_embedding_is_silent_at_first_and_then_tells_each_sample_its_own(name, lora):
    make, names = FAMILIES[name]
    fam = make()
    role, (x, t, cond) = told_role(fam, lora=lora), noised(fam, names)
    with torch.no_grad():
        plain, told = role(x, t, cond).v, role(x, t, cond.with_guidance((3.0, 0.5))).v
        assert torch.equal(plain, told), "the last layer is zero"
        loud(role.guidance_embedding)
        each = role(x, t, cond.with_guidance(torch.tensor([[2.0, 0.1], [3.5, 0.9]]))).v
        one, other = role(x, t, cond.with_guidance((2.0, 0.1))).v, role(x, t, cond.with_guidance((3.5, 0.9))).v
        torch.testing.assert_close(each, torch.stack([one[0], other[1]]), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(one, other, atol=1e-3) and not torch.allclose(one, plain, atol=1e-3)
        assert torch.equal(role(x, t, cond).v, plain), "what is not told is the network itself"
        bystander = Role("teacher", role.backbone)
        assert torch.equal(bystander(x, t, cond.with_guidance((3.0, 0.5))).v, bystander(x, t, cond).v)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stock_model_with_folded_biases_predicts_what_the_student_does(name):
    make, names = FAMILIES[name]
    fam = make()
    role, (x, t, cond) = told_role(fam), noised(fam, names)
    loud(role.guidance_embedding)
    for guidance_scales in ((1.5, 0.0), (2.7, 0.5), (4.0, 1.0)):
        stock = copy.deepcopy(role.backbone.module)
        fold_guidance(fam.time_embedders(stock), role.guidance_embedding, guidance_scales)
        with torch.no_grad():
            wanted, got = role(x, t, cond.with_guidance(guidance_scales)).v, Role("stock", Backbone(fam, stock))(x, t, cond).v
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6)
            assert not torch.allclose(got, role(x, t, cond).v, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_guidance_is_exact(name):
    """In float64, at the layer itself: the time embedding of a bias b + g is that of b, plus g."""
    fam = FAMILIES[name][0]()
    module = fam.new_backbone().double()
    embedding = loud(GuidanceEmbedding(RANGE, fam.time_width(module))).double()
    read = torch.randn(3, fam.time_embedders(module)[0].linear_1.in_features, dtype=F64)
    with torch.no_grad():
        before = [embedder(read) for embedder in fam.time_embedders(module)]
        fold_guidance(fam.time_embedders(module), embedding, (2.7, 0.5))
        for embedder, was in zip(fam.time_embedders(module), before, strict=True):
            torch.testing.assert_close(embedder(read), was + embedding(torch.tensor([[2.7, 0.5]])), rtol=0, atol=1e-14)


@pytest.mark.parametrize("lora", [None, 4])
def test_the_pipeline_of_a_student_with_folded_guidance_is_stock(lora):
    """Stock attention over stock padding, an adapter merged: what an export writes, against the student that is told."""
    fam = family()
    role, (x, t, cond) = told_role(fam, lora=lora), noised(fam, PROMPTS)
    loud(role.guidance_embedding)
    kept = {key: p.clone() for key, p in role.backbone.module.state_dict().items()}
    pipe = fam.pipeline(fam.parts(with_folded_guidance(role, (2.7, 0.5))))
    assert not any("lora" in key for key in pipe.transformer.state_dict())
    padded, _ = pipe.encode_prompt(PROMPTS[:2], do_classifier_free_guidance=False, max_sequence_length=STOCK_TEXT_LENGTH)
    with torch.no_grad():
        stock = pipe.transformer(x, t * 1000, padded, return_dict=False)[0]
        torch.testing.assert_close(stock, role(x, t, cond.with_guidance((2.7, 0.5))).v, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, kept[key]) for key, p in role.backbone.module.state_dict().items()), "the student in memory stays as it is"


@pytest.mark.parametrize(("name", "checkpointing"), [("wan", False), ("wan", True), ("dit", True)])
def test_gradients_reach_the_embedding(name, checkpointing):
    make, names = FAMILIES[name]
    fam = make()
    role, (x, t, cond) = told_role(fam, checkpointing=checkpointing), noised(fam, names)
    loud(role.guidance_embedding)
    role.backbone.module.train()
    # another role runs on the same network before backward: what was told is part of the call
    answer = role(x, t, cond.with_guidance(torch.tensor([[2.0, 0.1], [3.5, 0.9]])))
    role(x, t, cond.with_guidance((4.0, 1.0)))
    answer.v.square().mean().backward()
    got = {key: p.grad.clone() for key, p in role.guidance_embedding.named_parameters()}
    assert all(g.norm() > 0 for g in got.values())
    plain = told_role(make())
    loud(plain.guidance_embedding)
    plain(x, t, cond.with_guidance(torch.tensor([[2.0, 0.1], [3.5, 0.9]]))).v.square().mean().backward()
    for key, p in plain.guidance_embedding.named_parameters():
        torch.testing.assert_close(got[key], p.grad, rtol=1e-4, atol=1e-7)
    for p in plain.named_parameters().values():
        p.grad = None
    plain(x, t, cond).v.square().mean().backward()
    assert all(p.grad is None for p in plain.guidance_embedding.parameters()), "untold, it has no part"


def test_members_of_an_ensemble_are_told_apart():
    torch.manual_seed(0)
    net = VelocityMLP(RectifiedFlow(), members=2, guidance_range=RANGE)
    x, t = torch.randn(6, 2), torch.rand(6)
    cond = labels(["0", "1"] * 3, torch.tensor([0, 1, 1, 0, 1, 0]))
    guidance_scales = RANGE.draw(6, torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = net(x, t, cond).v
        assert torch.equal(net(x, t, cond.with_guidance(guidance_scales)).v, plain)
        net.guidance_embedding[1].weight[0].normal_()
        told = net(x, t, cond.with_guidance(guidance_scales)).v
        alone = [net(x[i : i + 1], t[i : i + 1], cond[i : i + 1].with_guidance(guidance_scales[i : i + 1])).v for i in range(6)]
        torch.testing.assert_close(told, torch.cat(alone), rtol=1e-4, atol=1e-5)
        mine = cond.member == 0
        assert torch.equal(told[~mine], plain[~mine]) and (told[mine] - plain[mine]).abs().amin(1).min() > 1e-4
        # by hand: the same guidance scales in the bias of the first layer
        one = torch.tensor([[2.0, 0.3]])
        first, second = net.guidance_embedding
        h = torch.nn.functional.silu(RANGE.features(one) @ first.weight + first.bias) @ second.weight + second.bias
        wanted = net(x, t, cond.with_guidance((2.0, 0.3))).v
        net.layers[0].bias += h
        torch.testing.assert_close(net(x, t, cond).v, wanted, rtol=1e-4, atol=1e-5)


class Hears:
    """A student whose velocity is linear in x_t and in what it is told."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def __call__(self, x_t, t, cond):
        return Prediction(x_t, (self.a * cond.guidance_scales[:, :1] + self.b * cond.guidance_scales[:, 1:]) * x_t)


class Untold(Parts):
    def __call__(self, x_t, t, cond):
        assert cond.guidance_scales is None, "the teacher is the network before"
        return super().__call__(x_t, t, cond)

    def skipping(self, blocks):
        without = super().skipping(blocks)
        return Untold(without.slopes)


def test_the_objective_with_drawn_scales_by_hand():
    real = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    a, b = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.1, -0.2))
    seen = view(real, {"student": Hears(a, b), "reference": Untold()})
    # a stage tells its guidance scales to everybody; here each sample has its own
    batch = replace(seen.batch, real=real, cond=seen.batch.cond.with_guidance((9.0, 9.0)))
    seen = replace(seen, batch=batch, rng=torch.Generator().manual_seed(2), rollout=None)
    term = GuidanceDistillation(guidance=3.0, skip_scale=0.5, blocks=(1,), levels=OneOf((1.0, 0.5)), draw=RANGE)
    (loss,) = list(term(seen))
    rng = torch.Generator().manual_seed(2)
    t = OneOf((1.0, 0.5))(4, progress=0, t_exit=None, rng=rng).double()[:, None]
    x_t = (1 - t) * real + t * torch.randn(4, 2, generator=rng, dtype=F64)
    w, skip_scale = RANGE.draw(4, rng).double().split(1, 1)
    wanted = 0.2 + w * (0.5 - 0.2) + skip_scale * (0.5 - 0.3)
    off = (0.1 * w - 0.2 * skip_scale - wanted) * x_t
    torch.testing.assert_close(loss, off.square().mean())
    slopes = torch.autograd.grad(loss, (a, b))
    torch.testing.assert_close(slopes[0], (2 * off * w * x_t).mean())
    torch.testing.assert_close(slopes[1], (2 * off * skip_scale * x_t).mean())


def test_it_skips_what_its_ranges_ask_for():
    assert GuidanceDistillation(draw=GuidanceRange((1.0, 3.0))).skips == ()
    assert GuidanceDistillation(draw=RANGE, blocks=(1,)).skips == (1,)
    with pytest.raises(ValueError, match="skip_blocks: none, and skip-layer guidance of scale 1"):
        GuidanceDistillation(draw=RANGE)
    with pytest.raises(ValueError, match="guidance: 1 is none, and there is nothing to distil"):
        GuidanceDistillation(draw=GuidanceRange((1.0, 1.0)))


def test_the_recipe_gives_its_own_scales_wherever_guidance_is_in_the_weights():
    recipe = apo(ManySteps(guidance=2.0), **BOTH)
    assert [stage.guidance_scales for stage in recipe.stages] == [None, None, None, (2.0, 0.5), (2.0, 0.5)]
    assert recipe.roles["student"].guidance_range == recipe.roles["reference"].guidance_range == RANGE and recipe.roles["teacher"].guidance_range is None
    assert recipe.sampling == Sampling(recipe.levels, "ode", 1.0, (2.0, 0.5)) and recipe.sampling_at(5) == Sampling(recipe.levels, "ode", 2.0)
    assert recipe.stages[3].terms[0].draw == RANGE
    assert apo(draw=(1.0, 5.0)).roles["student"].guidance_range == GuidanceRange((1.0, 5.0), (0.0, 0.0))
    assert apo(draw_skip=(0.0, 2.0), skip_blocks=(1,)).roles["student"].guidance_range == GuidanceRange((3.0, 3.0), (0.0, 2.0))
    fixed = apo()
    assert fixed.roles["student"].guidance_range is None and not any(stage.guidance_scales for stage in fixed.stages) and fixed.sampling.guidance_scales is None


def test_what_does_not_go_together_is_refused():
    with pytest.raises(
        ValueError, match="guidance: 3 is not allowed; the student is conditioned on guidance 1 to 2: stay in that range, or train with a wider one"
    ):
        apo(draw=(1.0, 2.0))
    with pytest.raises(ValueError, match="skip: 0 is not allowed; the student is conditioned on guidance 3, skip-layer guidance 0.5 to 1"):
        apo(draw_skip=(0.5, 1.0), skip_blocks=(1,))
    for other in ({"few_step": True, "distill_guidance": 0}, {"distill_guidance": 0, "post_distillation": 0}):
        with pytest.raises(ValueError, match="draw: guidance scales are drawn in the stage distill-guidance, which this run does not have"):
            apo(draw=(1.0, 5.0), **other)
    with pytest.raises(
        ValueError, match="guidance_scales: .2.0, 0.0. in stage 'x': a student conditioned on them is sampled without guidance; set guided=False"
    ):
        Stage("x", 1, 1, (), guidance_scales=(2.0, 0.0))
    with pytest.raises(ValueError, match="guidance_scales: .2.0, 0.0. in stage 'x'"):
        Stage("x", 1, 1, (), (), RolloutConfig((1.0,), transition=Deterministic(), guidance=2.0), guided=False, guidance_scales=(2.0, 0.0))
    stage = Stage("x", 1, 1, (), guided=False, guidance_scales=(2.0, 0.0))
    with pytest.raises(ValueError, match="guidance_scales: stage 'x' conditions the student on .2.0, 0.0., which takes none"):
        Recipe("r", (1.0,), {"student": RoleConfig()}, (stage,))
    with pytest.raises(ValueError, match="guidance: 2 is not allowed; the student is conditioned on guidance 3 to 5"):
        Recipe("r", (1.0,), {"student": RoleConfig(guidance_range=GuidanceRange((3.0, 5.0)))}, (stage,))


@pytest.mark.slow
def test_one_model_follows_the_guided_teacher_at_every_scale(start):
    """In the laboratory: at both ends of the range far closer than one that was distilled at the mean, and in its middle as good as done."""
    world = World.named("ring8", members=2)
    optim = replace(ManySteps().student, lr=2e-3, betas=(0.5, 0.99), clip=1e9, decay=0.6)

    def distances(draw, ends=((1.0, 0.5), (2.0, 0.5), (3.0, 0.5), (2.0, 0.0), (2.0, 1.0))):
        recipe = apo(
            ManySteps(steps=10, batch=512, guidance=2.0, shift=1.0, student=optim, ema=None),
            online=0,
            half_online=0,
            offline=0,
            distill_guidance=500,
            distill_guidance_optim=optim,
            post_distillation=0,
            skip=0.5,
            skip_blocks=(1,),
            draw=(1.0, 3.0) if draw else None,
            draw_skip=(0.0, 1.0) if draw else None,
        )
        state = ensemble_state(recipe, world, start, 0)
        (stage,) = recipe.stages
        teacher = copy.deepcopy(state.roles["student"])
        for step in range(500):
            iteration(state, stage, [world.batch(stage, 2.0, state.rng)], step / 500)
        rng, out = torch.Generator().manual_seed(9), []
        batch = world.batch(stage, 2.0, rng)
        seen = View(state.roles, state.path, batch, 0.0, rng)
        asks = GuidanceDistillation(blocks=(1,), draw=GuidanceRange((1.0, 3.0), (0.0, 1.0)))
        for level in (0.2, 0.5, 0.8, 1.0):
            t = torch.full((len(batch.real),), level)
            x_t = state.path.renoise(batch.real, seen.randn_like(batch.real), t)
            for guidance_scales in ends:
                target = asks.guided(teacher, seen, x_t, t, torch.tensor([guidance_scales]).expand(len(t), 2))
                with torch.no_grad():
                    out.append((state.roles["student"](x_t, t, batch.cond.with_guidance(guidance_scales)).v - target).square().mean())
        return torch.stack(out).unflatten(0, (4, len(ends))), state

    drawn, kept = distances(True)
    fixed, _ = distances(False)
    at_the_ends = [0, 2, 3, 4]
    assert (fixed[:, at_the_ends] > 0.1).all(), "there is something to be told"
    assert (drawn[:, at_the_ends] < 0.1 * fixed[:, at_the_ends]).all(), (drawn, fixed)
    assert (drawn[:, 1] < 0.02 * fixed[:, at_the_ends].amin(1)).all(), (drawn, fixed)
    # what was learned is sampled where the sampler says so
    cond, null = labels(["0", "1"] * 8, world.member(16)), labels([""] * 16, world.member(16))
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    student = kept.roles["student"]
    sampled = Sampling((1.0, 0.5), "ode", 1.0, (3.0, 0.5))(student, cond, null, noise, world.path, torch.Generator())
    by_hand = Sampling((1.0, 0.5), "ode")(student, cond.with_guidance((3.0, 0.5)), null, noise, world.path, torch.Generator())
    assert torch.equal(sampled, by_hand)
    assert not torch.allclose(sampled, Sampling((1.0, 0.5), "ode", 1.0, (1.0, 0.5))(student, cond, null, noise, world.path, torch.Generator()), atol=0.01)


class Overhears:
    """A role that notes which guidance scales it was called with."""

    def __init__(self, role):
        self.role, self.heard = role, []

    def __call__(self, x_t, t, cond):
        self.heard.append(cond.guidance_scales)
        return self.role(x_t, t, cond)

    def skipping(self, blocks):
        return self.role.skipping(blocks)


def test_a_stage_tells_student_and_reference_the_same():
    """Preferences before the guidance is in the weights are told nothing, those after it the recipe's guidance scales, every sample of a pair."""
    world = World.named("ring8", members=2, reward="half")
    recipe = apo(ManySteps(steps=10, batch=8, guidance=2.0, ema=None), online=0, half_online=0, offline=1, distill_guidance=1, post_distillation=1, **BOTH)
    state = ensemble_state(recipe, world, VelocityMLP(world.path, members=2), 0)
    spies = {name: Overhears(state.roles[name]) for name in ("student", "reference")}
    state.roles = {**state.roles, **spies}
    heard = []
    for stage in recipe.stages:
        iteration(state, stage, [world.batch(stage, 2.0, state.rng)], 0.0)
        heard.append({name: spy.heard[:] for name, spy in spies.items()})
        for spy in spies.values():
            spy.heard.clear()
    offline, distill, post = heard[0], heard[-2], heard[-1]
    assert len(heard) == 3 and all(h is None for h in offline["student"] + offline["reference"] + distill["reference"])
    (drawn,) = distill["student"]
    assert len(drawn.unique(dim=0)) == len(drawn) > 1
    assert len(post["student"]) == len(post["reference"]) == 5, "one a level of the window"
    for told in post["student"] + post["reference"]:
        assert len(told) == 2 * 4 * 2 and torch.equal(told, torch.tensor([2.0, 0.5]).expand(len(told), 2))


LOUD = replace(TINY, student=replace(TINY.student, lr=2e-2))
STEPS = {"online": 1, "half_online": 0, "offline": 0, "distill_guidance": 2, "post_distillation": 1}
GIVEN = {"prompts": PROMPTS, "reward": RANKED, "pairs": PAIRS, "options": QUICK}


@pytest.fixture(scope="module", params=[None, 4])
def whole(request, tmp_path_factory):
    recipe = apo(replace(LOUD, lora_rank=request.param), **STEPS, **BOTH)
    return recipe, train(recipe, family(), out=tmp_path_factory.mktemp("told") / "whole", **GIVEN)


def test_a_run_with_drawn_scales_leaves_a_stock_model_at_the_recipes(whole):
    from diffusers import DiffusionPipeline

    recipe, run = whole
    seen, record = rows(run.out), read_run(run.out)
    assert [row["stage"] for row in seen] == ["start", "online", "distill-guidance", "distill-guidance", "post-distillation"]
    # of the stage after it too: reference and student are told the same
    assert seen[4]["objective/dpo"] == pytest.approx(0.6931472, abs=1e-4)
    assert run.state.roles["student"].guidance_embedding.out.weight.abs().max() > 0
    for step in range(5):
        assert sampling_of(record, step) == recipe.sampling_at(step)
    export, card = json.loads((run.student / "instep_export.json").read_text()), (run.student / "README.md").read_text()
    assert export["guidance"] == 1.0 and export["guidance_scales"] == [3.0, 0.5]
    assert "Guidance 3 and skip-layer guidance 0.5 is in these weights" in card and "guidance_scale=1" in card
    assert not (run.student / "lora.safetensors").exists(), "an adapter's file has no place for the bias"
    pipe = DiffusionPipeline.from_pretrained(run.student, local_files_only=True)
    compare(pipe, student_of(run.out, record, family()), (3.0, 0.5), (2.0, 0.5))


def compare(pipe, role, guidance_scales, others):
    """The stock transformer against the told student, which is visibly another one when told otherwise."""
    x, t, cond = noised(role.backbone.family, PROMPTS)
    padded, _ = pipe.encode_prompt(PROMPTS[:2], do_classifier_free_guidance=False, max_sequence_length=STOCK_TEXT_LENGTH)
    with torch.no_grad():
        stock = pipe.transformer(x, t * 1000, padded, return_dict=False)[0]
        wanted, other = role(x, t, cond.with_guidance(guidance_scales)).v, role(x, t, cond.with_guidance(others)).v
    torch.testing.assert_close(stock, wanted, rtol=1e-4, atol=2e-5)
    assert (wanted - other).abs().max() > 100 * (stock - wanted).abs().max(), "the strength makes a difference"


def test_another_scale_is_exported_from_the_same_run(whole, tmp_path):
    from diffusers import DiffusionPipeline

    recipe, run = whole
    tiny_wan_pipeline().save_pretrained(tmp_path / "base")
    ask = ExportArgs(run.out, tmp_path / "other", guidance=1.5, model=str(tmp_path / "base"))
    assert export_command(ask) == 0
    record = json.loads((ask.to / "instep_export.json").read_text())
    assert record["guidance_scales"] == [1.5, 0.5] and record["guidance"] == 1.0
    compare(DiffusionPipeline.from_pretrained(ask.to, local_files_only=True), student_of(run.out, read_run(run.out), family()), (1.5, 0.5), (3.0, 0.5))
    with pytest.raises(ValueError, match="guidance: 6 is not allowed; the student is conditioned on guidance 1.5 to 4, skip-layer guidance 0 to 1"):
        export_command(replace(ask, to=tmp_path / "no", guidance=6.0))
    with pytest.raises(ValueError, match="skip: 2 is not allowed"):
        export_command(replace(ask, to=tmp_path / "no", guidance=None, skip=2.0))
    written = read_run(run.out)
    with pytest.raises(ValueError, match="guidance: this run's student is not conditioned on guidance scales yet"):
        at_guidance_scales(sampling_of(written, 1), written, 2.0, None)
    told = written["config"]["roles"]["student"].pop("guidance_range")
    assert told and at_guidance_scales(recipe.sampling, written, None, None) == recipe.sampling
    with pytest.raises(
        ValueError, match="skip: this run's student is not conditioned on guidance scales; leave it out, or train with `instep train apo --draw LOW HIGH`"
    ):
        at_guidance_scales(sampling_of(written), written, None, 0.5)


@pytest.mark.parametrize("at", slow_but([2], [1, 2, 3]))
def test_killed_where_scales_are_drawn_or_fixed_it_ends_the_same(whole, tmp_path, at):
    recipe, run = whole
    with interrupted_before(at):
        train(recipe, family(), out=tmp_path / "cut", **GIVEN)
    same(run.out, train(recipe, family(), out=tmp_path / "cut", **GIVEN).out)


@pytest.mark.parametrize("rank", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_without_a_guidance_embedding_is_gone_on_with(tmp_path, rank):
    """Three stages in a run of their own, then drawn guidance scales; the ranges of a told student stay what they are."""
    tiny, none = replace(LOUD, lora_rank=rank), {**dict.fromkeys(STEPS, 0), "half_online": 0}
    before = train(apo(tiny, **{**none, "online": 1}), family(), out=tmp_path / "before", **GIVEN)
    recipe = apo(tiny, **{**none, "distill_guidance": 2}, draw=(1.0, 5.0))
    run = train(recipe, family(), out=tmp_path / "told", start_from=before.out, **GIVEN)
    student = run.state.roles["student"]
    assert student.guidance_embedding.out.weight.abs().max() > 0 and student.guidance_embedding.out.weight.isfinite().all()
    reads = {"start_from": run.out, **GIVEN}
    post = train(apo(tiny, **{**none, "post_distillation": 1}, draw=(1.0, 5.0)), family(), out=tmp_path / "post-distillation", **reads)
    assert post.recipe.sampling.guidance_scales == (3.0, 0.0) and rows(post.out)[-1]["objective/dpo"] == pytest.approx(0.6931472, abs=1e-4)
    for i, (other, ours) in enumerate((({"draw": (1.0, 4.0)}, "guidance 1 to 4"), ({}, "nothing"))):
        with pytest.raises(ValueError, match=f"start_from: that run's student is conditioned on guidance 1 to 5, this recipe's on {ours}; give the same draw"):
            train(apo(tiny, **{**none, "post_distillation": 1}, **other), family(), out=tmp_path / f"no{i}", **reads)
    # guided, or distilled from guidance, a second time
    for name, more in (("distill_guidance", {"draw": (1.0, 5.0)}), ("online", {"draw": (1.0, 5.0), "distill_guidance": 1})):
        stage = name.replace("_", "-")
        with pytest.raises(ValueError, match=f"start_from: the student of .* has guidance in its weights, and stage '{stage}' would guide it a second time"):
            train(apo(tiny, **{**none, name: 1, **more}), family(), out=tmp_path / f"again-{name}", **reads)
    with pytest.raises(ValueError, match="start_from: none was given, and stage 'post-distillation' goes on with a student that has learned its guidance"):
        train(apo(tiny, **{**none, "post_distillation": 1}, draw=(1.0, 5.0)), family(), out=tmp_path / "alone", **GIVEN)
    # without guidance, though none was learned
    with pytest.raises(ValueError, match="start_from: none was given, and stage 'post-distillation' .* or guidance 1 for a model that never needed any"):
        train(apo(tiny, **{**none, "post_distillation": 1}), family(), out=tmp_path / "alone", **GIVEN)
    with pytest.raises(ValueError, match="start_from: the student of .* is sampled with guidance 3, and stage 'post-distillation' goes on without any"):
        train(apo(tiny, **{**none, "post_distillation": 1}), family(), out=tmp_path / "alone", start_from=before.out, **GIVEN)
    train(apo(replace(tiny, guidance=1.0), **{**none, "post_distillation": 1}), family(), out=tmp_path / "needs-none", **GIVEN)
    with pytest.raises(ValueError, match="guidance_scales: .2.0, 0.0. are not allowed for a ode sampler with guidance 3"):
        replace(post.recipe.sampling, guidance=3.0, guidance_scales=(2.0, 0.0))


def test_a_cogvideox_takes_guidance_scales_too(tmp_path):
    fam = cogvideox()
    others = dict.fromkeys(("online", "half_online", "offline", "post_distillation"), 0)
    recipe = apo(replace(LOUD, batch=2, lora_rank=4), **others, distill_guidance=2, draw=(1.0, 5.0))
    x = torch.randn(2, *fam.latent_shape, generator=torch.Generator().manual_seed(0))
    run = train(recipe, fam, out=tmp_path / "run", prompts=PROMPTS[:2], pairs=PairSamples(tuple(PROMPTS[:2]), x, -x), options=QUICK)
    role = student_of(run.out, read_run(run.out), other := cogvideox())
    stock = Role("stock", Backbone(other, type(other).load(run.student).pretrained))
    x, t, cond = noised(other, PROMPTS)
    with torch.no_grad():
        wanted, weaker = role(x, t, cond.with_guidance((3.0, 0.0))).v, role(x, t, cond.with_guidance((1.0, 0.0))).v
        torch.testing.assert_close(stock(x, t, cond).v, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, weaker, atol=1e-3)
