"""Roles on shared backbones: adapters, checkpointing, exits, and a short text that stands for the stock padding."""

from __future__ import annotations

import pytest
import torch
from tiny import FRAMES, HEIGHT, WIDTH, tiny_wan_pipeline

from instep.models import VideoSize
from instep.models.wan import STOCK_TEXT_LENGTH, WanFamily
from instep.roles import Backbone, LoRA, Role

PROMPTS = ["a seven moving left fast", "a digit"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_wan_pipeline()


@pytest.fixture
def family(pipe):
    return WanFamily(tiny_wan_pipeline(), VideoSize(HEIGHT, WIDTH, FRAMES))


def noised(family, n=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, *family.latent_shape, generator=rng), torch.linspace(0.3, 0.9, n)


def with_adapters(family, *, checkpointing):
    shared = Backbone(family, family.pretrained, checkpointing=checkpointing)
    for name in ("student", "fake"):
        shared.add_adapter(name, LoRA(4, 8.0))
    roles = {name: Role(name, shared, adapter=name) for name in ("student", "fake")} | {"teacher": Role("teacher", shared)}
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
    plain = interleaved_gradients(WanFamily(tiny_wan_pipeline(), VideoSize(HEIGHT, WIDTH, FRAMES)), checkpointing=False)
    recomputed = interleaved_gradients(family, checkpointing=True)
    assert plain.keys() == recomputed.keys() and len(plain) > 40
    assert max(float(g.norm()) for g in plain.values()) > 0
    for key in plain:
        torch.testing.assert_close(recomputed[key], plain[key], rtol=1e-4, atol=1e-7)


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
        stacked = role(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.stack(family.null(2))).v
        assert torch.equal(family.pipe.transformer(x_t, t * 1000, padded, return_dict=False)[0], stock), "the caller's own pipeline is unharmed"
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=5e-6)
    torch.testing.assert_close(stacked[:2], stock, rtol=1e-4, atol=5e-6)


def test_size_must_fit(pipe):
    with pytest.raises(ValueError, match="size: 50 x 48, 9 frames"):
        WanFamily(pipe, VideoSize(50, 48, 9))
