"""What a reward is given: values in [0, 1], float32, a copy of its own, scored and climbed alike; plain functions with a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from instep.cli.rewards import load_reward
from instep.rewards.base import FunctionReward, checked_scores
from instep.rewards.decoded import in_range, make_reward_fn, make_reward_grad_fn
from instep.rewards.ranker import Ranked, reward_ranker
from instep.rewards.several import several


@dataclass(frozen=True)
class Decoder:
    """Pixels are the latents themselves; `dtype` is what a decoder of lower precision gives."""

    micro_batch: int | None = None
    dtype: torch.dtype = torch.float32

    def decode(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def brightness(media, prompts):
    """Of this module, for module:function."""
    return media.flatten(1).mean(1)


def vandal(media, prompts):
    media.mul_(0).add_(7)
    return torch.zeros(len(media))


def numpy_vandal(media, prompts):
    media.detach().numpy()[:] = 7
    return [0.0] * len(media)


@pytest.mark.parametrize("harm", [vandal, numpy_vandal])
def test_what_a_reward_changes_reaches_nobody(harm):
    x, prompts = torch.rand(4, 3, 8, 8), ["a"] * 4
    before, plain = x.clone(), brightness(x, prompts)
    for space in ("pixel", "latent"):
        both = several((FunctionReward(harm, space=space), 1.0), (FunctionReward(brightness, space=space, name="b"), 1.0))
        got = make_reward_fn(Decoder(), both)(x, prompts)
        torch.testing.assert_close(got[:, 1], plain)
        assert torch.equal(x, before)
    ranked = Ranked(reward_ranker(FunctionReward(harm)))
    assert checked_scores(several((ranked, 1.0), (brightness, 1.0)), x, prompts).tolist() == pytest.approx(plain.tolist())
    assert torch.equal(x, before)


def test_a_climbed_reward_that_changes_its_media_harms_no_other_gradient():
    def dark(media, prompts):
        return -vandal(media, prompts) + media.flatten(1).mean(1) * 0

    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    both = several((FunctionReward(dark, differentiable=True), 1.0), (FunctionReward(brightness, differentiable=True), 1.0))
    scores = make_reward_grad_fn(Decoder(), both)(x, ["a", "b"])
    slope = torch.autograd.grad(scores[:, 1].sum(), x)[0]
    torch.testing.assert_close(slope, torch.full_like(x, 1 / 192))


@pytest.mark.parametrize("micro", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scored_and_climbed_rewards_see_the_same_float32_media_in_range(dtype, micro):
    seen = []

    def watch(media, prompts):
        seen.append(media.detach().clone())
        return media.flatten(1).mean(1)

    x, decoder = torch.randn(3, 3, 4, 4) * 3, Decoder(micro, dtype)
    reward = FunctionReward(watch, differentiable=True)
    scored = make_reward_fn(decoder, reward)(x, ["a"] * 3)
    climbed = make_reward_grad_fn(decoder, reward)(x.clone().requires_grad_(), ["a"] * 3)
    torch.testing.assert_close(scored, climbed.detach())
    half = len(seen) // 2
    assert torch.equal(torch.cat(seen[:half]), torch.cat(seen[half:]))
    assert all(media.dtype == torch.float32 and media.min() >= 0 and media.max() <= 1 for media in seen)


def test_out_of_range_pixels_have_the_slope_of_the_border():
    x = torch.tensor([-2.0, -0.1, 0.0, 0.4, 1.0, 1.3, 9.0], requires_grad=True)
    y = in_range(x)
    assert y.tolist() == pytest.approx([0, 0, 0, 0.4, 1, 1, 1]) and bool(((y >= 0) & (y <= 1)).all())
    slope = torch.autograd.grad((y**3).sum(), x)[0]
    torch.testing.assert_close(slope, 3 * y.detach() ** 2)


def test_a_plain_function_with_a_gradient_needs_no_class():
    assert not load_reward("gradient=no test_reward_inputs:brightness").differentiable
    reward = load_reward("0.5*gradient=yes test_reward_inputs:brightness, gradient=yes frames=2 test_reward_inputs:brightness")
    assert reward.differentiable and reward.parts[0].name == "brightness"
    x = torch.rand(2, 3, 3, 4, 4, requires_grad=True)
    slope = torch.autograd.grad(make_reward_grad_fn(Decoder(), reward)(x, ["a", "b"])[:, 1].sum(), x)[0]
    assert (slope.abs().sum((0, 1, 3, 4)) > 0).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="reward: gradient=maybe of .* is not allowed; yes or no"):
        load_reward("gradient=maybe test_reward_inputs:brightness")
    with pytest.raises(ValueError, match="reward: gradient: test_reward_inputs:READY is a reward of its own"):
        load_reward("gradient=yes test_reward_inputs:READY")
    with pytest.raises(ValueError, match="reward: 'gradient' is no setting of 'compressible'"):
        load_reward("gradient=yes compressible")


class Ready:
    name, differentiable, space = "ready", True, "pixel"

    def score(self, media, prompts):
        return brightness(media, prompts)


READY = Ready()
