"""Metrics against closed forms and constructed cases."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import scipy.linalg
import torch

from instep.bundled import digits, evaluation
from instep.bundled.classifiers import Classifier, SpaceTime
from instep.bundled.drawn_frames import drawn_video
from instep.data.prompt import texts_of
from instep.metrics import compare
from instep.metrics import figures as m
from instep.metrics.figures import Value


def test_frechet_distance_of_gaussians():
    """Diagonal Gaussians: |difference of means|^2 + sum of (difference of deviations)^2."""
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(40000, 3, generator=rng, dtype=torch.float64)
    b = torch.randn(40000, 3, generator=rng, dtype=torch.float64) * torch.tensor([2.0, 1.0, 0.5]) + torch.tensor([1.0, 0.0, -1.0])
    assert m.frechet_distance(a, b) == pytest.approx(2 + 1 + 0.25, rel=0.02)
    assert abs(m.frechet_distance(a, a)) < 1e-9
    few, other = torch.randn(6, 9, generator=rng, dtype=torch.float64), torch.randn(20, 9, generator=rng, dtype=torch.float64)
    product = torch.cov(few.T) @ torch.cov(other.T)
    root = scipy.linalg.sqrtm((product + 1e-14 * torch.eye(9)).numpy()).real.trace()
    want = (few.mean(0) - other.mean(0)).square().sum() + torch.cov(few.T).trace() + torch.cov(other.T).trace() - 2 * root
    assert m.frechet_distance(few, other) == pytest.approx(float(want), rel=1e-5), "singular covariances, against scipy"


def test_precision_and_recall_on_two_clusters():
    rng = torch.Generator().manual_seed(0)
    real = torch.cat([torch.randn(200, 2, generator=rng), torch.randn(200, 2, generator=rng) + 50])
    one_mode = torch.randn(200, 2, generator=rng)
    assert m.precision(one_mode, real) > 0.9 and 0.4 < m.recall(one_mode, real) < 0.52
    off = torch.cat([one_mode[:100], torch.randn(100, 2, generator=rng) - 50])
    assert 0.4 < m.precision(off, real) < 0.52


def test_vendi_counts_what_is_different():
    assert m.vendi(torch.ones(5, 3)) == pytest.approx(1.0, abs=1e-6)
    assert m.vendi(torch.eye(4).repeat(2, 1)) == pytest.approx(4.0, abs=1e-6)
    assert m.vendi_by_group(torch.eye(4), torch.tensor([0, 0, 1, 1])).value == pytest.approx(2.0, abs=1e-6)


def test_errors_of_means_and_sets():
    x = torch.tensor([1.0, 0.0, 1.0, 1.0])
    got = m.of_mean(x)
    assert got.value == 0.75 and got.se == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    rng = torch.Generator().manual_seed(0)
    y = torch.randn(400, generator=rng)
    order = torch.arange(400)
    halves = m.of_set(lambda rows: float(y[rows].mean()), order, resamples=200)
    assert halves.se == pytest.approx(1 / 20, rel=0.25), "half-samples find the error of a mean"
    strata = y + 100 * (order // 2 % 5)
    assert m.of_mean(strata, order).se == pytest.approx(1 / 20, rel=0.25), "differences between prompts are no error"
    assert m.of_mean(strata).se > 1
    assert m.of_share(torch.ones(90, dtype=torch.bool)).value == 1 and 0.005 < m.of_share(torch.ones(90, dtype=torch.bool)).se < 0.02
    assert m.modes_covered(torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([7, 7, 7, 8, 8, 8])).value == 1.5


def moving(motion: str, n: int = 4) -> torch.Tensor:
    k = digits.MOTIONS.index(motion)
    return digits.render("reference", [digits.motion_spec(3, k)] * n, seed=5)


def test_motion_metrics_on_real_videos():
    """A digit travels 16 px (fast), 8 px (slowly) or not at all; rigid motion does not wobble, changing shapes do."""
    for motion, pixels in (("left fast", 16), ("up slowly", 8), ("still", 0)):
        assert m.dynamic(moving(motion)).mean() == pytest.approx(pixels, abs=0.5)
    rigid = m.wobble(moving("left fast"))
    shuffled = torch.stack([digits.render("reference", [digits.motion_spec(d, 0)], seed=d)[0][:, 0] for d in range(9)], 1)[None]
    assert rigid.max() < 0.15 and m.wobble(shuffled).min() > 3 * rigid.max()
    assert m.flicker(moving("still")).min() > 0.999 > m.flicker(moving("left fast")).max()
    raw = torch.zeros(1, 3, 2, 4, 4)
    raw[..., 0] = 1.2
    assert m.saturation(raw).item() == 0.25 and m.mean_brightness(raw).item() == 0.25


def row(value: float, se: float, key: str = "heldout_both") -> compare.Row:
    return compare.Row("x", "student", {key: Value(value, se)}, n=10)


def test_comparisons_respect_direction_and_error():
    assert compare.better(row(0.9, 0.01), row(0.8, 0.01), "heldout_both")
    assert not compare.better(row(0.9, 0.05), row(0.8, 0.05), "heldout_both")
    assert compare.better(row(1.0, 0.1, "fd_open"), row(2.0, 0.1, "fd_open"), "fd_open")
    assert compare.direction("mean_brightness") == 0 and compare.direction("modes_motion") == 1 and compare.direction("fd") == -1
    both = compare.combined([row(0.8, 0.02), row(0.9, 0.02), row(1.0, 0.02)])
    assert both.values["heldout_both"].value == pytest.approx(0.9)
    assert both.values["heldout_both"].se == pytest.approx(0.1 / math.sqrt(3)), "seeds differ more than samples allow"
    assert compare.Row.of_json(row(0.5, 0.1).json()) == row(0.5, 0.1)


def test_evaluation_set_is_balanced():
    quick = evaluation.evaluation_set("quick")
    assert len(quick.full) == 90 and len(set(quick.full)) == 90 and len(quick.open) == 19 * 8
    assert not set(quick.full) & set(quick.open)


MEASURED = {
    "fd",
    "fd_open",
    "precision",
    "recall",
    "vendi",
    "modes_motion",
    "modes_digit",
    "mean_brightness",
    "saturation",
    "wobble",
    "flicker",
    "dynamic",
    "seconds",
    "seconds_wall",
    *(f"{classifier}_{part}" for classifier in ("train", "heldout") for part in ("digit", "motion", "both", "both_open", "score")),
}


def small_set() -> evaluation.EvalSet:
    open_ = [prompt for prompt in ("a seven", "an eight", "a digit moving left fast", "a digit standing still") for _ in range(6)]
    return evaluation.EvalSet(tuple(digits.full_prompts()[::6]), tuple(open_), seed=3)


def test_evaluation_measures_generators_alike():
    classifiers = {name: Classifier(name, SpaceTime(), {}) for name in ("train", "heldout")}
    chosen, asked = small_set(), []

    def real(prompts, seed):
        asked.append((tuple(texts_of(prompts)), seed))
        return digits.render("reference", [digits.parse(p) for p in prompts], seed)

    def frozen(prompts, seed):
        return real(prompts, seed)[:, :, :1].expand(-1, -1, 9, -1, -1)

    good = evaluation.evaluate("real", "student", real, chosen, classifiers, steps=4)
    assert set(good.values) == MEASURED and all(math.isfinite(v.value) and v.se >= 0 for v in good.values.values())
    assert (good.nfe, good.n) == (4, len(chosen.prompts)) and sum((p for p, _ in asked), ()) == chosen.prompts
    still = evaluation.evaluate("frozen", "naive", frozen, chosen, classifiers, steps=4, guidance=3.0)
    assert still.nfe == 8 and still.values["dynamic"].value < 1e-4 < good.values["dynamic"].value
    assert compare.better(good, still, "fd") and compare.better(still, good, "flicker")
    real_vs_real = evaluation.real_vs_real_row(chosen, classifiers)
    brightness = compare.difference(good, real_vs_real, "mean_brightness")
    assert real_vs_real.kind == "real" and abs(brightness.value) < 4 * brightness.se
    with pytest.raises(ValueError, match="one video a prompt"):
        evaluation.evaluate("short", "student", lambda prompts, seed: real(prompts, seed)[1:], chosen, classifiers, steps=4)


def test_in_image_to_video_each_sample_has_its_own_first_frame():
    classifiers = {name: Classifier(name, SpaceTime(), {}) for name in ("train", "heldout")}
    chosen = replace(small_set(), image_to_video=True)
    assert len(set(chosen.asked)) == len(chosen.prompts) and tuple(texts_of(chosen.asked)) == chosen.prompts
    first = lambda media: evaluation.evaluate("x", "student", media, chosen, classifiers, steps=4).values["first_frame"].value  # noqa: E731
    shown = lambda names: torch.stack([drawn_video(name) for name in names])  # noqa: E731
    assert first(lambda names, seed: shown(names)) == 0
    other = first(lambda names, seed: digits.render("reference", [digits.parse(name) for name in names], seed))
    assert other > 0.1, "videos of the same prompts that begin otherwise"
    real_vs_real = evaluation.real_vs_real_row(chosen, classifiers)
    assert real_vs_real.values["first_frame"].value == 0 and real_vs_real.values["fd"].value < 10
    assert "first_frame" not in evaluation.real_vs_real_row(small_set(), classifiers).values


def test_order_puts_like_prompts_together():
    chosen = evaluation.evaluation_set("quick")
    pairs = chosen.order.argsort(stable=True)[: len(chosen.prompts) // 2 * 2].reshape(-1, 2).tolist()
    for a, b in pairs:
        x, y = digits.parse(chosen.prompts[a]), digits.parse(chosen.prompts[b])
        same = digits.motions_allowed(x) == digits.motions_allowed(y) and (a < 90) == (b < 90)
        assert same, "neighbours share their motion and their part"


def test_figures_equal_a_third_party_implementation():
    """torch-fidelity 0.4.0 on the same numbers, run once in an environment of its own: Inception score in one split, FID, improved precision and recall.

    pytorch-fid 0.3.0 and clean-fid 0.1.35 give the same FID to the last digit, prdc 0.2 the same precision and recall.
    """
    i, j = torch.arange(24, dtype=torch.float64)[:, None], torch.arange(6, dtype=torch.float64)[None]
    logits = 3 * torch.sin(1.7 * i + 2.3 * j * j)
    assert m.inception_score(logits.softmax(1)) == pytest.approx(2.121258440078404, rel=1e-12)
    a, b = torch.sin(1.1 * i * (j + 1)), 0.8 * torch.cos(0.9 * i * (j + 2)) + 0.2
    assert m.frechet_distance(a, b) == pytest.approx(2.258136488900381, rel=1e-9)
    few = j[:, :3]
    a, b = torch.sin(1.1 * i * (few + 1)), 1.2 * torch.sin(0.9 * i * (few + 1) + 0.3) + 0.2
    assert m.precision(a, b) == pytest.approx(0.9583333134651184, rel=1e-6) and m.recall(a, b) == 1


def test_inception_score_counts_sure_and_different_classes():
    sure = torch.eye(5).repeat(4, 1)
    assert m.inception_score(sure) == pytest.approx(5) and m.inception_score(torch.full((9, 5), 0.2)) == pytest.approx(1)
    assert m.inception_score(sure[:1].repeat(7, 1)) == pytest.approx(1), "sure of one class alone"


def test_vendi_of_kernels_is_the_authors_score():
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(3, 5, 4, generator=rng, dtype=torch.float64)
    unit = features / features.norm(dim=2, keepdim=True)
    kernels = unit @ unit.mT
    want = sum(m.vendi(each) for each in features) / 3
    assert m.vendi_of_kernels(kernels) == pytest.approx(want, rel=1e-9)
    found = m.vendi_by_kernels([kernels, torch.ones(2, 4, 4)])
    assert found.value == pytest.approx((want + 1) / 2, rel=1e-9) and found.se > 0
