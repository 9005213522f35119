"""Guidance distillation: the algebra of CFG and skip-layer guidance in float64, skipping blocks of real networks, and a student that learns it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from test_forces import F64, view
from test_run import PROMPTS, family
from tiny import FRAMES, HEIGHT, WIDTH, tiny_cogvideox_pipeline, tiny_wan_pipeline

from instep.core.size import Size
from instep.diffusion.guidance import guide, skip_layers
from instep.diffusion.levels import OneOf, Uniform
from instep.diffusion.path import RectifiedFlow, VariancePreserving
from instep.diffusion.prediction import Prediction, eps_of_x0, skipping, velocity_of_x0
from instep.lab.mixture import ExactTeacher, Mixture, labels
from instep.lab.networks import VelocityMLP
from instep.lab.run import ensemble_state
from instep.lab.world import World
from instep.methods.guidance_distillation import GuidanceDistillation
from instep.methods.role_config import LoRA
from instep.models.backbone import Backbone
from instep.models.cogvideox import CogVideoXFamily
from instep.models.role import Role
from instep.models.wan import WanFamily
from instep.recipes.apo import apo
from instep.recipes.many_step import ManySteps
from instep.training.step import iteration

SIZE = Size(HEIGHT, WIDTH, FRAMES)
TEXT = ["a seven moving left fast", "a digit"]


@pytest.mark.parametrize("path", [RectifiedFlow(), VariancePreserving.linear()])
def test_guidance_is_one_formula_in_noise_velocity_and_x0(path):
    """The paper's (1 + omega) c - omega u + lambda (c - skipped) on noises, against ours on velocities and estimates."""
    rng = torch.Generator().manual_seed(0)
    x_t, c, u, s = (torch.randn(5, 3, generator=rng, dtype=F64) for _ in range(4))
    t = torch.linspace(0.1, 0.9, 5, dtype=F64)
    omega, skip_scale = 2.0, 0.7
    eps = [eps_of_x0(path, x_t, t, x0) for x0 in (c, u, s)]
    paper = (1 + omega) * eps[0] - omega * eps[1] + skip_scale * (eps[0] - eps[2])
    ours = skip_layers(guide(c, u, 1 + omega), c, s, skip_scale)
    torch.testing.assert_close(eps_of_x0(path, x_t, t, ours), paper)
    v = [velocity_of_x0(path, x_t, t, x0) for x0 in (c, u, s)]
    torch.testing.assert_close(velocity_of_x0(path, x_t, t, ours), skip_layers(guide(v[0], v[1], 1 + omega), v[0], v[2], skip_scale))
    torch.testing.assert_close(skip_layers(guide(c, c, 3.0), c, c, 0.7), c)
    # Eq. 3 to its letter: the skipped prediction itself is added, and where all agree the noise predicted is too large by lambda
    assert not torch.allclose(c + skip_scale * c, skip_layers(c, c, c, skip_scale))


class Parts:
    """A denoiser whose conditional, unconditional and skipped velocities are linear in x_t."""

    def __init__(self, slopes=(0.5, 0.2, 0.3)):
        self.slopes, self.calls = slopes, 0

    def __call__(self, x_t, t, cond):
        self.calls += len(x_t)
        slope = torch.where(cond.label < 0, self.slopes[1], self.slopes[0])[:, None]
        return Prediction(x_t - t[:, None] * slope * x_t, slope * x_t)

    def skipping(self, blocks):
        assert blocks == (1,)
        return Parts((self.slopes[2], self.slopes[2], self.slopes[2]))


class Learns:
    def __init__(self, slope):
        self.slope = slope

    def __call__(self, x_t, t, cond):
        return Prediction(x_t, self.slope * x_t)


def test_the_objective_and_its_gradient_by_hand():
    real = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    slope = torch.tensor(0.1, dtype=F64, requires_grad=True)
    seen = view(real, {"student": Learns(slope), "reference": Parts()})
    seen = replace(seen, batch=replace(seen.batch, real=real), rng=torch.Generator().manual_seed(2), rollout=None)
    (loss,) = list(GuidanceDistillation(guidance=3.0, skip_scale=0.7, blocks=(1,), levels=OneOf((1.0, 0.5)))(seen))
    rng = torch.Generator().manual_seed(2)
    t = OneOf((1.0, 0.5))(4, progress=0, t_exit=None, rng=rng).double()[:, None]
    x_t = (1 - t) * real + t * torch.randn(4, 2, generator=rng, dtype=F64)
    wanted = 0.2 + 3.0 * (0.5 - 0.2) + 0.7 * (0.5 - 0.3)
    torch.testing.assert_close(loss, ((0.1 - wanted) * x_t).square().mean())
    torch.testing.assert_close(torch.autograd.grad(loss, slope)[0], (2 * (0.1 - wanted) * x_t.square()).mean())


def test_it_refuses_what_is_nothing():
    with pytest.raises(ValueError, match="guidance: 1 is none, and there is nothing to distil"):
        GuidanceDistillation(guidance=1.0)
    with pytest.raises(ValueError, match="skip_blocks: none, and skip-layer guidance of scale 0.5"):
        GuidanceDistillation(skip_scale=0.5)
    with pytest.raises(ValueError, match="skip: Parts.* has no blocks|skip: Learns has no blocks to leave out"):
        skipping(Learns(torch.tensor(1.0)), (0,))


def three_blocks(kind: str):
    """A tiny family of three blocks, and where they are in its network."""
    if kind == "cogvideox":
        return CogVideoXFamily(tiny_cogvideox_pipeline(layers=3), Size(32, 32, 9), name="tiny"), "transformer_blocks"
    return WanFamily(tiny_wan_pipeline(layers=3), SIZE, name="tiny"), "blocks"


@pytest.mark.parametrize("kind", ["wan", "cogvideox"])
def test_a_network_without_a_block_is_the_one_that_never_had_it(kind):
    rng = torch.Generator().manual_seed(0)
    fam, where = three_blocks(kind)
    role = Role("teacher", Backbone(fam, fam.pretrained))
    x, t, cond = torch.randn(2, *fam.latent_shape, generator=rng), torch.tensor([0.9, 0.4]), fam.encode(TEXT)
    with torch.no_grad():
        whole, without = role(x, t, cond).v, role.skipping((1,))(x, t, cond).v
        shorter = copy.deepcopy(fam.pretrained)
        del getattr(shorter, where)[1]
        torch.testing.assert_close(without, Role("short", Backbone(fam, shorter))(x, t, cond).v)
        assert not torch.allclose(whole, without)
        torch.testing.assert_close(role(x, t, cond).v, whole, rtol=0, atol=0)  # nothing of it stays
    for blocks, what in (((3,), "block 3 is not allowed; this network has 3 blocks, 0 to 2"), ((0, 1, 2), "skipping every block is not allowed")):
        with pytest.raises(ValueError, match=f"skip_blocks: {what}"), torch.no_grad():
            role.skipping(blocks)(x, t, cond)
    assert all("forward" not in block.__dict__ for block in getattr(fam.pretrained, where))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_skipped_pass_keeps_its_gradient_when_blocks_are_run_again(checkpointing):
    """Interleaved with a whole pass of another adapter, on the same blocks: what is skipped is part of the call."""
    fam = type(family())(tiny_wan_pipeline(layers=3), family().size, name="tiny")
    backbone = Backbone(fam, fam.pretrained, checkpointing=checkpointing)
    for name in ("student", "fake"):
        backbone.add_adapter(name, LoRA(4, 4.0))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("student", "fake"):
            for p in backbone.adapter_parameters(name).values():
                p.copy_(0.2 * torch.randn(p.shape, generator=rng))
    student, fake = (Role(name, backbone, adapter=name) for name in ("student", "fake"))
    x, t, cond = torch.randn(1, *fam.latent_shape, generator=rng), torch.tensor([0.6]), fam.encode(TEXT[:1])
    if checkpointing:
        backbone.module.train()
    a, b = student.skipping((1,))(x, t, cond).v, fake(x, t, cond).v
    (a.square().mean() + b.square().mean()).backward()
    parts = backbone.adapter_parameters("student")
    assert all(p.grad is None or not p.grad.any() for key, p in parts.items() if "blocks.1." in key), "what is left out has no gradient"
    got = torch.cat([p.grad.flatten() for key, p in parts.items() if "blocks.1." not in key])
    alone = copy.deepcopy(backbone.module)
    del alone.blocks[1]
    saved = {key: p.grad.clone() for key, p in parts.items() if p.grad is not None}
    for p in backbone.module.parameters():
        p.grad = None
    student.skipping((1,))(x, t, cond).v.square().mean().backward()
    again = torch.cat([p.grad.flatten() for key, p in parts.items() if "blocks.1." not in key])
    torch.testing.assert_close(got, again)
    assert got.norm() > 0 and saved


def test_skipping_a_hidden_layer_of_the_laboratorys_network():
    net = VelocityMLP(RectifiedFlow())
    x, t, cond = torch.randn(6, 2), torch.rand(6), labels(["0", "1"] * 3)
    with torch.no_grad():
        without = net.skipping((1,))(x, t, cond).v
        torch.nn.init.zeros_(net.layers[1].weight)  # hidden layer 0 is layers[1]; skipping 1 leaves layers[2] out
        assert not torch.allclose(net(x, t, cond).v, without)
    with pytest.raises(ValueError, match="skip_blocks: block 2 is not allowed; this network has 2 blocks"):
        net.skipping((2,))


def test_one_pass_approaches_the_guided_teacher(start):
    """In the laboratory, with CFG 2 and skip-layer guidance: of the squared distance to the guided prediction, little is left, at every level."""
    world = World.named("ring8", members=2)
    optim = replace(ManySteps().student, lr=2e-3, betas=(0.5, 0.99), clip=1e9, decay=0.6)
    recipe = apo(
        ManySteps(steps=10, batch=512, guidance=2.0, shift=1.0, student=optim, ema=None),
        online=0,
        half_online=0,
        offline=0,
        distill_guidance=200,
        post_distillation=0,
        skip=0.5,
        skip_blocks=(1,),
    )
    state = ensemble_state(recipe, world, start, 0)
    (stage,) = recipe.stages
    term = stage.terms[0]
    assert isinstance(term, GuidanceDistillation) and recipe.sampling.guidance == 1 and not stage.guided

    def distances():
        from instep.methods.term import View

        rng = torch.Generator().manual_seed(9)
        batch = world.batch(stage, 2.0, rng)
        seen = View(state.roles, state.path, batch, 0.0, rng)
        reference = start_role
        out = []
        for level in (0.2, 0.5, 0.8, 1.0):
            t = torch.full((len(batch.real),), level)
            x_t = state.path.renoise(batch.real, seen.randn_like(batch.real), t)
            with torch.no_grad():
                target = term.guided(reference, seen, x_t, t)
                out.append(float((state.roles["student"](x_t, t, batch.cond).v - target).square().mean()))
        return torch.tensor(out)

    start_role = copy.deepcopy(state.roles["student"])
    before = distances()
    for step in range(stage.steps):
        iteration(state, stage, [world.batch(stage, 2.0, state.rng)], step / stage.steps)
    after = distances()
    assert (before > 0.02).all()
    assert (after < 0.2 * before).all(), (before, after)


def test_blocks_that_are_not_there_are_refused_before_the_first_stage(tmp_path):
    from instep.data.samples import PairSamples
    from instep.training.options import RunOptions
    from instep.training.run import train

    fam = family()
    x = torch.zeros(2, *fam.latent_shape)
    recipe = apo(ManySteps(steps=10, batch=4), online=1, half_online=0, offline=0, distill_guidance=1, post_distillation=0, skip=0.5, skip_blocks=(7,))
    with pytest.raises(ValueError, match="skip_blocks: block 7 is not allowed; this network has 2 blocks, 0 to 1"):
        pairs = PairSamples(tuple(PROMPTS[:2]), x, x)
        train(recipe, fam, out=tmp_path / "run", prompts=PROMPTS, reward=lambda m, p: m.mean((1, 2, 3, 4)), pairs=pairs, options=RunOptions())


def test_the_exact_teachers_guided_prediction_is_what_the_objective_asks_for():
    """A student that is the guided teacher has loss 0 (closed form of the mixture)."""
    ring, path = Mixture.ring(), RectifiedFlow()
    teacher = ExactTeacher(ring, path)

    class Guided:
        def __call__(self, x_t, t, cond):
            u = teacher(x_t, t, labels([""] * len(x_t))).v
            return Prediction(x_t, guide(teacher(x_t, t, cond).v, u, 1.7))

    names = ("0", "1") * 8
    real = ring.sample(labels(names).label, torch.Generator().manual_seed(0))
    seen = view(real, {"student": Guided(), "reference": teacher})
    batch = replace(seen.batch, prompts=names, cond=labels(names), null=labels([""] * 16), real=real)
    (loss,) = list(GuidanceDistillation(guidance=1.7, levels=Uniform())(replace(seen, batch=batch, rollout=None)))
    assert float(loss) < 1e-10


def test_a_class_conditional_transformer_without_a_block():
    from test_dit import WORDS, tiny_dit

    from instep.models.dit import DiTFamily

    fam = DiTFamily(tiny_dit(), WORDS)
    role, n = Role("teacher", Backbone(fam, fam.pretrained)), len(fam.pretrained.transformer_blocks)
    x, t, cond = torch.randn(2, *fam.latent_shape), torch.tensor([0.9, 0.4]), fam.encode(WORDS[:2])
    shorter = copy.deepcopy(fam.pretrained)
    del shorter.transformer_blocks[n - 1]
    with torch.no_grad():
        torch.testing.assert_close(role.skipping((n - 1,))(x, t, cond).v, Role("short", Backbone(fam, shorter))(x, t, cond).v)
        assert not torch.allclose(role(x, t, cond).v, role.skipping((n - 1,))(x, t, cond).v)
