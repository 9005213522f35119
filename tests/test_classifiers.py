"""The bundled classifiers and the unclamped VAE they look through."""

import json

import pytest
import torch

from instep.bundled.classifiers import FOLDER, load_classifier
from instep.bundled.digits import MOTIONS, describe, motion_spec, parse, render

torch.set_num_threads(1)
NAMES = ("training", "monitor", "heldout")


@pytest.fixture(scope="module")
def videos():
    specs = [motion_spec(i % 10, i % 9) for i in range(90)]
    return render("reference", specs, seed=8), [describe(s) for s in specs]


@pytest.mark.parametrize("name", NAMES)
def test_classifiers_are_right_about_real_videos_they_never_saw(name, videos):
    media, prompts = videos
    hits = load_classifier(name).correct(media, prompts)
    assert hits.both.float().mean() > 0.93
    assert hits.motion.float().mean() > 0.98
    assert torch.equal(hits.both, hits.digit & hits.motion)


@pytest.mark.parametrize("name", NAMES)
def test_classifiers_are_wrong_about_wrong_prompts(name, videos):
    media, prompts = videos
    hits = load_classifier(name).correct(media, prompts[1:] + prompts[:1])
    assert hits.digit.float().mean() < 0.1 and hits.motion.float().mean() < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_score_is_the_log_probability_of_what_the_prompt_says(name, videos):
    classifier, (media, _) = load_classifier(name), videos
    media = media[:6]
    digit, motion = (v.log_softmax(1) for v in classifier.logits(media))
    assert torch.allclose(classifier.score(media, ["a digit"] * 6), torch.zeros(6), atol=1e-6)
    assert torch.allclose(classifier.score(media, ["a seven"] * 6), digit[:, 7], atol=1e-5)
    both = motion[:, [MOTIONS.index("left slowly"), MOTIONS.index("left fast")]].logsumexp(1)
    assert torch.allclose(classifier.score(media, ["a seven moving left"] * 6), digit[:, 7] + both, atol=1e-5)
    assert torch.allclose(classifier.score(media, ["a digit moving left fast"] * 6), motion[:, MOTIONS.index("left fast")], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_score_has_a_finite_gradient_that_raises_it(name, videos):
    classifier, (media, _) = load_classifier(name), videos
    x = media[:8].clone().requires_grad_(True)
    prompts = ["a three moving up fast"] * 8
    score = classifier.score(x, prompts)
    (gradient,) = torch.autograd.grad(score.sum(), x)
    assert gradient.isfinite().all() and (gradient.abs().sum((1, 2, 3, 4)) > 0).all()
    step = 1e-2 * gradient / gradient.square().sum((1, 2, 3, 4), keepdim=True).sqrt()
    assert (classifier.score(x + step, prompts) > score).all()
    assert not any(p.requires_grad for p in classifier.net.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_open_parts_count_as_right(name, videos):
    media, prompts = videos
    classifier = load_classifier(name)
    assert classifier.correct(media, ["a digit"] * len(media)).both.all()
    digit_only = [describe(type(s)(s.digit)) for s in map(parse, prompts)]
    hits = classifier.correct(media, digit_only)
    assert hits.motion.all() and torch.equal(hits.both, hits.digit)


def test_classifiers_share_no_architecture_and_no_scans():
    about = [json.loads((FOLDER / f"{n}.json").read_text()) for n in NAMES]
    assert len({a["architecture"] for a in about}) == len({a["split"] for a in about}) == len({a["config"]["seed"] for a in about}) == 3
    for name, a in zip(NAMES, about, strict=True):
        assert a["accuracy"] == load_classifier(name).accuracy
        assert (FOLDER / f"{name}.safetensors").stat().st_size < 300_000


def test_features_and_refusals(videos):
    media, _ = videos
    classifier = load_classifier("heldout")
    assert classifier.features(media[:4]).shape == (4, 128)
    assert load_classifier("heldout") is classifier
    with pytest.raises(ValueError, match="name: 'test'"):
        load_classifier("test")
    with pytest.raises(ValueError, match="media: shape"):
        classifier.logits(media[0])


def test_unclamped_decode_is_the_stock_decode_with_a_gradient(videos):
    from diffusers import AutoencoderKLWan

    from instep.models.wan_vae import decode_latents, denormalise, encode_latents

    vae = AutoencoderKLWan.from_pretrained(FOLDER.parent / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)
    media = videos[0][:4]
    x = encode_latents(vae, media).requires_grad_(True)
    assert 0.7 < x.std() < 1.4
    out = decode_latents(vae, x)
    stock = vae.decode(denormalise(vae, x)).sample / 2 + 0.5
    assert torch.equal(out.clamp(0, 1), stock) or torch.allclose(out.clamp(0, 1), stock, atol=1e-6)
    assert (out - media).square().mean() < 2e-3
    outside = (out < 0) | (out > 1)
    assert outside.any()
    (gradient,) = torch.autograd.grad(out[outside].sum(), x)
    assert gradient.abs().sum() > 0
