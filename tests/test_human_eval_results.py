"""Metrics of judgements against closed forms and published examples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from instep.core.statistics import wilson
from instep.human_eval.results import distortion, fleiss_kappa, mean, preference, question_score, total
from instep.human_eval.store import Vote

FLEISS_1971 = [  # ten subjects, fourteen raters, five categories: the textbook example, kappa 0.210
    [0, 0, 0, 0, 14],
    [0, 2, 6, 4, 2],
    [0, 0, 3, 5, 6],
    [0, 3, 9, 2, 0],
    [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0],
    [3, 2, 6, 3, 0],
    [2, 5, 3, 2, 2],
    [6, 5, 2, 1, 0],
    [0, 2, 2, 3, 7],
]


def vote(item: str, value: str, who: str = "ana", prompt: str | None = None, run: int | None = None, swapped: bool = False, question: str = "overall") -> Vote:
    return Vote(who, item, prompt or item, 0, question, value, run, swapped)


def test_wilson_solves_its_equation():
    """The ends p of the interval are where |k/n - p| = z sqrt(p (1 - p) / n)."""
    for k, n in ((0, 5), (1, 7), (30, 40), (9, 9)):
        got = wilson(k, n)
        for end in (got.low, got.high):
            assert abs(abs(k / n - end) - 1.959963984540054 * math.sqrt(end * (1 - end) / n)) < 1e-7
        assert got.low <= got.value <= got.high and got.n == n
    assert wilson(0, 10).low == 0 and wilson(0, 10).high == pytest.approx(0.27753, abs=1e-5)
    for k, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="a rate needs 0 <= k <= n"):
            wilson(k, n)


def test_wilson_is_scipys():
    from scipy.stats import binomtest

    for k, n in ((0, 5), (1, 7), (30, 40), (9, 9), (512, 1000)):
        theirs, ours = binomtest(k, n).proportion_ci(0.95, method="wilson"), wilson(k, n)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_bootstrap_is_scipys_up_to_the_draws():
    """Ratios of sums over whole prompts with 1 to 5 answers each; the error of a percentile of 10,000 draws is some 2% of the interval."""
    from scipy.stats import bootstrap

    rng = np.random.default_rng(2)
    answers = [(f"p{i}", float(v)) for i in range(50) for v in rng.integers(0, 3, 1 + i % 5)]
    ours = mean(answers, seed=1)
    sums = np.array([sum(v for prompt, v in answers if prompt == f"p{i}") for i in range(50)])
    counts = np.array([1.0 + i % 5 for i in range(50)])
    ratio = lambda s, c, axis: s.sum(axis) / c.sum(axis)  # noqa: E731
    theirs = bootstrap((sums, counts), ratio, paired=True, method="percentile", n_resamples=10_000, rng=np.random.default_rng(0)).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05 * (theirs.high - theirs.low))


def test_fleiss_kappa():
    assert fleiss_kappa(FLEISS_1971) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([[3, 0], [0, 3], [3, 0]]) == pytest.approx(1.0)
    assert fleiss_kappa([[1, 1], [1, 1]]) == pytest.approx(-1.0)  # two raters who never agree
    # one category at every item: chance agrees as well, nothing can be said
    assert fleiss_kappa([[2, 0], [2, 0]]) is None and fleiss_kappa([]) is None and fleiss_kappa([[1, 0], [0, 1]]) is None
    # raters that differ in number, by hand: P = (1 + 1/3) / 2, shares 4/5 and 1/5 of five answers
    chance = (4 / 5) ** 2 + (1 / 5) ** 2
    assert fleiss_kappa([[2, 0], [2, 1], [1, 0]]) == pytest.approx((2 / 3 - chance) / (1 - chance))


def test_chance_agreement_is_zero_on_average():
    rng = np.random.default_rng(0)
    tables = [rng.multinomial(4, [0.5, 0.3, 0.2], size=400) for _ in range(40)]
    kappas = np.array([fleiss_kappa(table.tolist()) for table in tables])
    assert abs(kappas.mean()) < 4 * kappas.std() / math.sqrt(len(kappas)) + 2e-3


def test_win_rate_counts_ties_as_half_and_majorities_as_items():
    votes = [vote("1", "a"), vote("1", "a", "bo"), vote("1", "b", "cy"), vote("2", "equal"), vote("3", "b"), vote("3", "a", "bo")]
    got = preference("overall", votes)
    assert (got.win.value, got.tie.value, got.loss.value) == (3 / 6, 1 / 6, 2 / 6) and got.win.n == 6
    assert (got.good.value, got.same.value, got.bad.value) == (1 / 3, 2 / 3, 0) and got.good.n == 3
    assert got.win_rate.value == pytest.approx(3.5 / 6) and got.win_rate.low < got.win_rate.value < got.win_rate.high
    assert got == preference("overall", votes), "seeded"


def test_a_habit_of_the_left_side_shows():
    votes = [vote(str(i), "b" if i % 2 else "a", swapped=bool(i % 2)) for i in range(10)]
    got = preference("overall", votes)
    assert got.left.value == 1 and got.win_rate.value == 0.5


def test_bootstrap_draws_whole_prompts():
    """m votes that agree within each prompt are worth one: the interval is that of the prompts, not of the votes."""
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2, 60).astype(float)
    once = mean([(f"p{i}", v) for i, v in enumerate(values)], seed=3)
    often = mean([(f"p{i}", v) for i, v in enumerate(values) for _ in range(9)], seed=3)
    assert (once.low, once.high) == (often.low, often.high) and often.n == 540
    se = math.sqrt(values.mean() * (1 - values.mean()) / 60)
    assert (once.high - once.low) / 2 == pytest.approx(1.96 * se, rel=0.08)
    assert mean([("p", 1.0), ("p", 0.0)]).low is None, "one prompt leaves nothing to resample"


def test_bootstrap_covers_the_truth():
    """95% intervals of the mean of 40 normal prompts hold the mean of the world about as often as they say."""
    rng, inside = np.random.default_rng(5), 0
    for _ in range(60):
        got = mean([(str(i), float(x)) for i, x in enumerate(rng.normal(0.3, 1, 40))])
        inside += got.low <= 0.3 <= got.high
    assert 50 <= inside <= 60


def test_scores_and_their_difference():
    votes = []
    for i in range(12):
        votes += [vote(f"a{i}", "2" if i % 3 else "1", prompt=f"p{i}", run=0), vote(f"b{i}", "1" if i % 3 else "0", prompt=f"p{i}", run=1)]
    got = question_score("motion_aesthetics", votes)
    assert got.a.value == pytest.approx(20 / 12) and got.b.value == pytest.approx(8 / 12)
    # both runs move with the prompt, so their difference is known exactly although neither mean is
    assert (got.difference.value, got.difference.low, got.difference.high) == pytest.approx((1, 1, 1)) and got.a.high - got.a.low > 0.3
    summed = total([votes, votes])
    assert summed.a.value == pytest.approx(2 * got.a.value) and summed.difference.value == pytest.approx(2)
    assert (summed.a.low, summed.a.high) == pytest.approx((2 * got.a.low, 2 * got.a.high))
    only = question_score("x", [v for v in votes if v.run == 0])
    assert only.b is None and only.difference is None


def test_distortion_rate():
    votes = [vote(f"{run}{i}", "yes" if i < 2 * run + 1 else "no", run=run) for run in (0, 1) for i in range(10)]
    got = distortion(votes)
    assert (got.a.value, got.b.value) == (0.1, 0.3) and got.a == wilson(1, 10) and got.kappa is None
