"""Texts of Wan: with and without padding."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_wan_pipeline

from instep.models.backbone import Backbone
from instep.models.role import Role
from instep.models.wan import WanCondition, WanFamily
from instep.models.wan_attention import RotaryProcessor


@pytest.fixture(scope="module")
def role() -> Role:
    family = WanFamily(tiny_wan_pipeline(), (48, 48, 9))
    return Role("student", Backbone(family, family.pretrained))


def text(n: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, length, 16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def predicted(role: Role, cond: WanCondition) -> torch.Tensor:
    """The velocity of the same noise in every row."""
    x = torch.randn(1, 16, 3, 6, 6, generator=torch.Generator().manual_seed(7)).expand(len(cond), -1, -1, -1, -1)
    return role(x, torch.full((len(cond),), 0.7), cond).v


def test_a_text_without_padding_needs_no_mask(role, monkeypatch):
    masks, attention = [], torch.nn.functional.scaled_dot_product_attention

    def spied(*args, attn_mask=None, **options):
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spied)
    bare = predicted(role, WanCondition(text=text(2, 5)))
    assert masks and all(mask is None for mask in masks)
    torch.testing.assert_close(bare, predicted(role, WanCondition(text=text(2, 5), bias=torch.zeros(2, 5))), rtol=0, atol=1e-6)
    assert any(mask is not None for mask in masks)


@pytest.mark.parametrize("length", [5, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_a_text_without_padding_is_joined_with_any_other(role, length, padded, turned):
    """Every row is predicted as it is alone: a bias that is missing on one side counts as zeros and is not lost on the other."""
    bias = torch.tensor([0.0] * (length - 1) + [math.log(500)]).expand(2, -1) if padded else None
    first, second = WanCondition(text=text(3, 5)), WanCondition(text=text(2, length, 1), bias=bias)
    if turned:
        first, second = second, first
    both = first.stack(second)
    torch.testing.assert_close(predicted(role, both), torch.cat([predicted(role, first), predicted(role, second)]), rtol=0, atol=1e-6)
    assert (both.bias is None) == (not padded and length == 5)
    tokens, there = both.tokens()
    assert tokens.shape[:2] == there.shape == (5, 5) and int(there.sum()) == 15 + 2 * length


def test_rows_and_groups_of_a_text_without_padding():
    cond = WanCondition(text=text(3, 4))
    assert cond[slice(1, 2)].bias is None and cond.repeat(2).bias is None and cond.rolled(1).bias is None and len(cond.repeat(2)) == 6


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 0.0), (torch.float64, 0.0), (torch.bfloat16, 2e-2)])
def test_self_attention_and_its_gradients_are_those_of_the_stock_processor(dtype, rtol):
    """In bfloat16 the stock processor rounds the two parts of a gradient before it adds them."""
    transformer = tiny_wan_pipeline().transformer
    attention, frames = transformer.blocks[0].attn1.to(dtype), torch.randn(2, 16, 3, 6, 6)
    given = torch.randn(2, 27, transformer.config.num_attention_heads * transformer.config.attention_head_dim, dtype=dtype)
    rotary = transformer.rope(frames)
    found = []
    for processor in (attention.processor, RotaryProcessor(attention.processor)):
        attention.set_processor(processor)
        x = given.clone().requires_grad_()
        out = attention(x, None, None, rotary)
        found.append((out, *torch.autograd.grad((out * out.detach().sin()).sum(), (x, attention.to_q.weight, attention.norm_k.weight))))
    for stock, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, rtol=0, atol=rtol * float(stock.detach().abs().max()))
    assert not torch.equal(attention(given, None, None, (rotary[0], -rotary[1])), found[0][0])


def test_a_run_on_the_cpu_turns_pairs_of_channels_and_keeps_a_processor_of_the_users(role):
    assert all(isinstance(block.attn1.processor, RotaryProcessor) for block in role.backbone.module.blocks)
    pipe = tiny_wan_pipeline()

    class Own(type(pipe.transformer.blocks[0].attn1.processor)):
        pass

    pipe.transformer.blocks[0].attn1.set_processor(Own())
    family = WanFamily(pipe, (48, 48, 9))
    assert isinstance(Backbone(family, family.pretrained).module.blocks[0].attn1.processor, Own)
