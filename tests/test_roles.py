"""Roles on shared backbones: adapters, checkpointing, exits, and a short text that stands for the stock padding."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny import FRAMES, HEIGHT, WIDTH, tiny_wan_pipeline
from torch.utils.checkpoint import set_checkpoint_early_stop

from instep.core.size import Size
from instep.methods.recipe import Recipe, Stage
from instep.methods.role_config import AdamWConfig, LoRA, RoleConfig
from instep.models.backbone import Backbone
from instep.models.role import Role
from instep.models.wan import STOCK_TEXT_LENGTH, WanFamily
from instep.training.build import make_state

PROMPTS = ["a seven moving left fast", "a digit"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_wan_pipeline()


@pytest.fixture
def family(pipe):
    return WanFamily(tiny_wan_pipeline(), Size(HEIGHT, WIDTH, FRAMES))


def noised(family, n=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, *family.latent_shape, generator=rng), torch.linspace(0.3, 0.9, n)


def with_adapters(family, *, checkpointing, head=False):
    shared = Backbone(family, family.pretrained, checkpointing=checkpointing)
    for name in ("student", "fake"):
        shared.add_adapter(name, LoRA(4, 8.0))
    student, fake = Role("student", shared, adapter="student"), Role("fake", shared, adapter="fake", exits=4 if head else None, head=head)
    roles = {"student": student, "fake": fake, "teacher": Role("teacher", shared)}
    rng = torch.Generator().manual_seed(1)
    for name in ("student", "fake"):
        for p in roles[name].named_parameters().values():
            with torch.no_grad():
                p.copy_(0.3 * torch.randn(p.shape, generator=rng))
    return roles


def interleaved_gradients(family, *, checkpointing):
    """Student forward, then teacher and fake on its sample, then the fake's own loss, and only then both backwards."""
    roles = with_adapters(family, checkpointing=checkpointing)
    x_t, t = noised(family)
    cond = family.encode(PROMPTS)
    x = roles["student"](x_t, t, cond).x0
    with torch.no_grad():
        roles["teacher"](x.detach(), t, cond)
    fake_loss = roles["fake"](x.detach(), t, family.encode(PROMPTS[:1] * 2)).x0.square().mean()
    x.square().mean().backward()
    fake_loss.backward()
    return {f"{r}/{k}": p.grad.clone() for r in ("student", "fake") for k, p in roles[r].named_parameters().items()}


def test_checkpointing_keeps_interleaved_roles_apart(family):
    """Recomputation runs under the adapter, scale and condition of the forward, whatever ran in between."""
    plain = interleaved_gradients(WanFamily(tiny_wan_pipeline(), Size(HEIGHT, WIDTH, FRAMES)), checkpointing=False)
    recomputed = interleaved_gradients(family, checkpointing=True)
    assert plain.keys() == recomputed.keys() and len(plain) > 40
    assert max(float(g.norm()) for g in plain.values()) > 0
    for key in plain:
        torch.testing.assert_close(recomputed[key], plain[key], rtol=1e-4, atol=1e-7)


def gan_gradients(*, checkpointing):
    """DMD2's two uses of the head, interleaved with the other roles: its force on a sample, and its loss through the fake's adapter."""
    family = WanFamily(tiny_wan_pipeline(layers=3), Size(HEIGHT, WIDTH, FRAMES))
    roles = with_adapters(family, checkpointing=checkpointing, head=True)
    fake = roles["fake"]
    x_t, t = noised(family)
    cond = family.encode(PROMPTS)
    x = roles["student"](x_t, t, cond).x0
    leaf = x.detach().requires_grad_()
    seen = fake(leaf, t, cond.at_exit(torch.tensor([0, 3])))
    real = fake(x_t.flip(0), t, family.encode(PROMPTS[:1] * 2))
    with torch.no_grad():
        roles["teacher"](x_t, t, cond)
    (force,) = torch.autograd.grad(torch.nn.functional.softplus(-seen.logit).mean(), leaf, retain_graph=True)
    assert all(p.grad is None for p in fake.named_parameters().values()), "the force is asked for alone"
    loss = torch.nn.functional.softplus(seen.logit).mean() + torch.nn.functional.softplus(-real.logit).mean() + seen.v.square().mean()
    x.backward(force)
    loss.backward()
    named = {f"{r}/{k}": p for r in ("student", "fake") for k, p in roles[r].named_parameters().items()}
    return {"force": force} | {key: p.grad.clone() for key, p in named.items() if p.grad is not None}


def test_the_head_under_checkpointing():
    """Recomputation neither changes what the head saw nor what it sends back: to the sample, the adapter, the exits and itself."""
    plain, recomputed = gan_gradients(checkpointing=False), gan_gradients(checkpointing=True)
    assert plain.keys() == recomputed.keys() and {"force", "fake/head.hidden.weight", "fake/exits.weight"} <= plain.keys()
    for key in plain:
        assert key == "fake/exits.weight" or plain[key].norm() > 0, key
        torch.testing.assert_close(recomputed[key], plain[key], rtol=1e-4, atol=1e-7)


def test_the_head_reads_the_middle_of_its_own_role_and_starts_undecided():
    family = WanFamily(tiny_wan_pipeline(layers=3), Size(HEIGHT, WIDTH, FRAMES))
    module = family.new_backbone().requires_grad_(True)
    torch.manual_seed(5)
    role = Role("fake", Backbone(family, module), head=True)
    x_t, t = noised(family)
    cond = family.encode(PROMPTS)
    answer = role(x_t, t, cond)
    assert torch.equal(answer.logit, torch.zeros(2)) and answer.logit.dtype == torch.float32
    bare = Role("bare", Backbone(family, family.new_backbone()))
    assert bare(x_t, t, cond).logit is None and torch.equal(bare(x_t, t, cond).x0, answer.x0)
    assert role.head.hidden.weight.std() > 0.05, "only its output starts at zero"
    torch.nn.init.normal_(role.head.logit.weight)
    logit = role(x_t, t, cond).logit
    # by hand, from the second of three blocks
    seen = []
    handle = module.blocks[1].register_forward_hook(lambda block, args, output: seen.append(output))
    role(x_t, t, cond)
    handle.remove()
    tokens = seen[0]
    normed = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(logit, role.head.logit(torch.nn.functional.silu(role.head.hidden(normed))).mean((1, 2)), rtol=1e-4, atol=1e-6)
    # a sample's logit is its own, and no parameter after the block is reached
    torch.testing.assert_close(role(x_t[:1], t[:1], cond[:1]).logit, logit[:1], rtol=1e-4, atol=1e-5)
    logit.sum().backward()
    reached = {key.split(".")[1] for key, p in module.named_parameters() if key.startswith("blocks") and p.grad is not None}
    assert reached == {"0", "1"}


def test_the_head_belongs_to_its_role():
    """Same seed, same head; saved and loaded with the role; in float32 on a half-precision backbone."""
    roles = []
    for dtype in (torch.float32, torch.bfloat16):
        family = WanFamily(tiny_wan_pipeline(), Size(HEIGHT, WIDTH, FRAMES))
        torch.manual_seed(5)
        roles.append(Role("fake", Backbone(family, family.new_backbone().to(dtype)), head=True))
    whole, half = roles
    heads = {"head.hidden.weight", "head.hidden.bias", "head.logit.weight", "head.logit.bias"}
    assert heads <= whole.state().keys()
    assert all(torch.equal(whole.state()[key], half.state()[key]) and half.state()[key].dtype == torch.float32 for key in heads)
    torch.nn.init.normal_(whole.head.logit.weight)
    half.load_state(whole.state())
    x_t, t = noised(family)
    cond = family.encode(PROMPTS)
    logit = half(x_t, t, cond).logit
    assert logit.dtype == torch.float32
    torch.testing.assert_close(logit, whole(x_t, t, cond).logit, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="state of role 'fake'"):
        half.load_state({key: p for key, p in whole.state().items() if key not in heads})


@pytest.mark.parametrize("lora", [None, LoRA(4)])
def test_a_recipe_gives_its_fake_a_head_that_is_trained(lora):
    optim = AdamWConfig(1e-3)
    roles = {"student": RoleConfig(optim, lora), "fake": RoleConfig(optim, lora, exits=True, head=True), "teacher": RoleConfig()}
    recipe = Recipe("gan", (1.0, 0.5), roles, (Stage("gan", 1, 1, ()),))
    states = [make_state(recipe, WanFamily(tiny_wan_pipeline(), Size(HEIGHT, WIDTH, FRAMES)), seed, None) for seed in (0, 0, 1)]
    key = "head.hidden.weight"
    first, again, other = (state.trained["fake"].parameters[key] for state in states)
    assert torch.equal(first, again) and not torch.equal(first, other)
    state = states[0]
    assert key not in state.trained["student"].parameters and state.roles["teacher"].head is None
    fake, family = state.trained["fake"], state.roles["fake"].backbone.family
    for _ in range(2):  # the last layer is zero at first: the one below it moves in the second step
        before = {name: p.detach().clone() for name, p in fake.parameters.items()}
        torch.nn.functional.softplus(state.roles["fake"](*noised(family), family.encode(PROMPTS)).logit).mean().backward()
        fake.step(1e-3)
    moved = {name for name, p in fake.parameters.items() if not torch.equal(p, before[name])}
    assert {name for name in moved if "head." in name} == {"head.hidden.weight", "head.hidden.bias", "head.logit.weight", "head.logit.bias"}
    assert any("blocks.0" in name for name in moved), "and the features with it"


@pytest.mark.parametrize("backward", [False, True])
def test_features_are_freed_with_the_prediction(family, backward):
    """What the hook keeps must not be kept by the graph that it is part of: neither the forward's nor the recomputation's."""
    roles = with_adapters(family, checkpointing=True, head=True)
    x_t, t = noised(family)
    alive = []
    family.feature_block(family.pretrained).register_forward_hook(lambda block, args, output: alive.append(weakref.ref(output)))
    # recomputation usually stops inside the block, before its hooks; here it runs to the end
    with set_checkpoint_early_stop(False):
        answer = roles["fake"](x_t, t, family.encode(PROMPTS))
        if backward:
            (answer.logit.sum() + answer.x0.sum()).backward()
    del answer
    gc.collect()
    assert len(alive) == 1 + backward and all(reference() is None for reference in alive)


def test_a_new_backbone_brings_no_second_pipeline(family):
    """Copying a module copies its hooks; what they are bound to must stay one object."""
    shared = Backbone(family, family.pretrained, checkpointing=True)
    for hook in family.time_embedders(family.new_backbone())[0]._forward_hooks.values():
        assert hook.__self__ is shared


def test_adapters_start_as_the_teacher_and_own_their_parameters(family):
    shared = Backbone(family, family.pretrained)
    for name in ("student", "fake"):
        shared.add_adapter(name, LoRA(4))
    student, teacher = Role("student", shared, adapter="student"), Role("teacher", shared)
    x_t, t = noised(family)
    cond = family.encode(PROMPTS)
    assert torch.equal(student(x_t, t, cond).x0, teacher(x_t, t, cond).x0)
    own = student.named_parameters()
    assert own and all(p.requires_grad for p in own.values()) and not any("fake" in key for key in own)
    student(x_t, t, cond).x0.square().mean().backward()
    grads = {key for key, p in shared.module.named_parameters() if p.grad is not None}
    assert grads and all(".student." in key for key in grads), "neither the base nor the other adapter gets a gradient"
    # scale 0 is the teacher again
    with torch.no_grad():
        for p in own.values():
            p.add_(0.3)
    assert not torch.equal(student(x_t, t, cond).x0, teacher(x_t, t, cond).x0)
    student.scale = 0.0
    torch.testing.assert_close(student(x_t, t, cond).x0, teacher(x_t, t, cond).x0)


def test_exit_embedding_starts_silent_and_tells_exits_apart(family):
    role = Role("fake", Backbone(family, family.new_backbone()), exits=4)
    x_t, t = noised(family)
    cond = family.encode(PROMPTS)
    told = cond.at_exit(torch.tensor([0, 3]))
    assert torch.equal(role(x_t, t, told).x0, role(x_t, t, cond).x0)
    torch.nn.init.normal_(role.exits.weight)
    first, plain = role(x_t, t, told).x0, role(x_t, t, cond).x0
    assert not torch.equal(first, plain)
    same = role(x_t, t, cond.at_exit(torch.tensor([0, 0]))).x0
    torch.testing.assert_close(same[0], first[0])
    assert not torch.allclose(same[1], first[1])
    assert "exits.weight" in role.state()
    with pytest.raises(ValueError, match="state of role 'fake'"):
        role.load_state({"exits.weight": role.exits.weight})


def test_one_padding_key_stands_for_all(family, pipe):
    """The family's short text with a log r bias gives what the stock transformer gives on 512 padded tokens."""
    role = Role("teacher", Backbone(family, family.pretrained))
    x_t, t = noised(family)
    padded, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=STOCK_TEXT_LENGTH)
    cond = family.encode(PROMPTS)
    assert padded.shape[1] == 512 and cond.text.shape[1] < 40
    with torch.no_grad():
        stock = pipe.transformer(x_t, t * 1000, padded, return_dict=False)[0]
        ours = role(x_t, t, cond).v
        stacked = role(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.stack(family.unconditional(["", ""]))).v
        assert torch.equal(family.pipe.transformer(x_t, t * 1000, padded, return_dict=False)[0], stock), "the caller's own pipeline is unharmed"
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=5e-6)
    torch.testing.assert_close(stacked[:2], stock, rtol=1e-4, atol=5e-6)


def test_size_must_fit(pipe):
    with pytest.raises(ValueError, match="size: 50 x 48, 9 frames"):
        WanFamily(pipe, Size(50, 48, 9))
