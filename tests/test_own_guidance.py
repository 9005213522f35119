"""Guidance rules of families' own, and what only Qwen-Image's and DiT's families refuse or read."""

from __future__ import annotations

import math

import pytest
import torch
from family_cases import CASES, family
from torch import Tensor

from instep.diffusion.guidance import GuidedDenoiser, RescaledGuidance, guide, guided_by, predict_guided
from instep.diffusion.path import RectifiedFlow
from instep.diffusion.prediction import Condition, Prediction, to_prediction
from instep.models.flux import packed
from instep.models.latent_dit import LatentDiTFamily
from instep.models.qwen_image import QwenImageFamily

F64 = torch.float64


def predictions(count: int) -> tuple[Tensor, Tensor, list[Prediction]]:
    """x_t [3, 2, 4, 6], levels, and predictions there."""
    rng = torch.Generator().manual_seed(0)
    x_t, *velocities = (torch.randn(3, 2, 4, 6, generator=rng, dtype=F64) for _ in range(1 + count))
    t = torch.tensor([0.9, 0.5, 0.2], dtype=F64)
    return x_t, t, [to_prediction("velocity", v, RectifiedFlow(), x_t, t) for v in velocities]


def test_rescaled_guidance_keeps_the_norm_of_each_token():
    x_t, t, (c, u) = predictions(2)
    ours = RescaledGuidance(2)(t, c, u, 4.0)
    plain, cond = packed(guide(c.v, u.v, 4.0)), packed(c.v)
    stock = plain * (cond.norm(dim=-1, keepdim=True) / plain.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(packed(ours.v), stock)
    torch.testing.assert_close(ours.x0, x_t - t[:, None, None, None] * ours.v)
    torch.testing.assert_close(RescaledGuidance(2)(t, c, u, 1.0).x0, c.x0)
    still = Prediction(x_t, torch.zeros_like(x_t))
    assert RescaledGuidance(2)(t, still, still, 4.0).v.abs().max() == 0, "no direction, no NaN"


class Fixed:
    """A denoiser of given predictions, the conditional half first."""

    def __init__(self, c: Prediction, u: Prediction, rule: RescaledGuidance | None) -> None:
        self.both, self.guidance_rule = Prediction(torch.cat([c.x0, u.x0]), torch.cat([c.v, u.v])), rule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self.both


@pytest.mark.parametrize("rule", [None, RescaledGuidance(2)])
def test_all_who_guide_do_so_by_the_denoisers_own_rule(rule):
    x_t, t, (c, u) = predictions(2)
    denoiser, rows = Fixed(c, u, rule), Condition(exit_id=torch.zeros(3, dtype=torch.long))
    wanted = Prediction(guide(c.x0, u.x0, 3.0), guide(c.v, u.v, 3.0)) if rule is None else rule(t, c, u, 3.0)
    for found in (guided_by(denoiser, t, c, u, 3.0), GuidedDenoiser(denoiser, rows, 3.0)(x_t, t, rows)):
        assert torch.equal(found.x0, wanted.x0) and torch.equal(found.v, wanted.v)
    found = predict_guided(denoiser, x_t, t, rows, rows, 3.0)
    assert torch.equal(found.x0, wanted.x0) and torch.equal(found.cond, c.x0) and torch.equal(found.uncond, u.x0)


def test_qwen_images_shift_is_that_of_its_square_image():
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    config = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192}
    assert QwenImageFamily.shift_of(config) == pytest.approx(math.exp(calculate_shift(83 * 83, 256, 8192, 0.5, 0.9)))
    assert QwenImageFamily.shift_of({"shift": 3.0}) == 3


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("Qwen-Image", "transformer", {"guidance_embeds": True}, "transformer: guidance_embeds is not allowed"),
        ("DiT", "transformer", {"num_embeds_ada_norm": 10}, "num_embeds_ada_norm 10 is not allowed; DiTPipeline guides away from label 1000"),
        ("DiT", "scheduler", {"prediction_type": "v_prediction"}, "a DDIMScheduler with prediction_type 'v_prediction' is not allowed"),
    ],
)
def test_a_relative_is_refused(name, part, change, message):
    pipe = CASES[name].make()
    getattr(pipe, part).register_to_config(**change)
    with pytest.raises(ValueError, match=message):
        type(family(CASES[name]))(pipe)


def test_class_names_are_part_of_an_exported_pipeline(tmp_path):
    fam = family(CASES["DiT"])
    assert fam.encode(["Goldfish", "1", "207", ""]).label.tolist() == [1, 1, 207, 1000]
    with pytest.raises(ValueError, match=r"prompts: '1000' is no class of dit; allowed: 0, 1, .*, 19, \.\.\."):
        fam.encode(["1000"])
    fam.pipeline(fam.parts(fam.pretrained)).save_pretrained(tmp_path)
    assert LatentDiTFamily.load(tmp_path).encode(["carassius auratus"]).label.tolist() == [1]
