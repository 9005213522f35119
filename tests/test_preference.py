"""Preferences: where pairs come from, at which levels they are compared, and gradients against float64 derivations by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2, norm
from test_forces import F64, view

from instep.diffusion.level_windows import SHIFTS, HighLow, NearTrajectory, Repeated
from instep.diffusion.levels import OneOf, Uniform, few_step_levels
from instep.diffusion.prediction import Prediction
from instep.diffusion.rollout import Point, Rollout
from instep.lab.mixture import labels
from instep.lab.run import common
from instep.methods.preference import Preference
from instep.methods.recipe import RolloutConfig, Stage
from instep.methods.term import Pairs
from instep.recipes.after import pso_offline


def draw(sampler, n=20000, seed=0):
    return sampler(n, progress=0.0, t_exit=None, rng=torch.Generator().manual_seed(seed))


def chi_square(observed, expected):
    """p-value of counts against expected ones; cells with few expected are put together."""
    observed, expected = torch.as_tensor(observed, dtype=F64), torch.as_tensor(expected, dtype=F64)
    order = expected.argsort()
    observed, expected = observed[order], expected[order]
    cells, o, e = [], 0.0, 0.0
    for a, b in zip(observed.tolist(), expected.tolist(), strict=True):
        o, e = o + a, e + b
        if e >= 8:
            cells.append((o, e))
            o = e = 0.0
    cells[-1] = (cells[-1][0] + o, cells[-1][1] + e)
    return float(chi2.sf(sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1))


def visited(steps, shift):
    """Eq. 5 by hand."""
    sigma = [(steps - i) / steps for i in range(steps)]
    return [round(1000 * shift * s / (1 + (shift - 1) * s)) for s in sigma]


def test_without_offset_every_anchor_of_every_shift_is_as_likely():
    drawn = (1000 * draw(NearTrajectory(10, SHIFTS, 0.0))).round().long()
    expected = torch.zeros(1001)
    for shift in SHIFTS:
        for t in visited(10, shift):
            expected[t] += 20000 / (10 * len(SHIFTS))
    assert set(drawn.unique().tolist()) == set(expected.nonzero().flatten().tolist())
    assert chi_square(torch.bincount(drawn, minlength=1001)[expected > 0], expected[expected > 0]) > 1e-3
    # a single shift: what the sampler of a recipe with it visits, to the training step
    single = draw(NearTrajectory(10, (3.0,), 0.0), 2000).unique()
    torch.testing.assert_close(single.flip(0), torch.tensor(few_step_levels(10, 3.0)), rtol=0, atol=6e-4)


def test_the_offset_is_a_gaussian_rounded_to_training_steps_and_clipped():
    """Around the first two anchors of one shift, 1,000 and 964; above 1,000 everything is clipped to it."""
    drawn = (1000 * draw(NearTrajectory(10, (3.0,), 5.0))).round().long()
    # at 5 from a mean in [0, 1000] with rounding: Phi of half steps
    expected = torch.zeros(1001, dtype=F64)
    for mean in visited(10, 3.0):
        edges = norm.cdf((torch.arange(1001, dtype=F64) + 0.5 - mean) / 5)
        mass = torch.tensor(edges).diff(prepend=torch.zeros(1, dtype=F64))
        mass[1000] = 1 - mass[:1000].sum()
        expected += 2000 * mass
    assert drawn.max() == 1000 and drawn.min() >= 1
    assert chi_square(torch.bincount(drawn, minlength=1001), expected) > 1e-3
    # rounded to anchors instead, as the paper's letter has it, hardly any level would move
    near = visited(10, 3.0)
    assert sum(int(t) in near for t in drawn) < 0.2 * len(drawn)


def test_a_window_has_four_high_levels_and_a_low_one():
    window = HighLow(50).window
    assert len(window) == 5 and window[0] is window[3]
    highs, low = [draw(part, 4000, i) for i, part in enumerate(window[:4])], draw(window[4], 4000, 9)
    assert all(high.min() >= 0.8 and high.max() <= 1 for high in highs) and low.min() >= 0.001 and low.max() < 0.8
    count = sum(1 for s in SHIFTS for t in visited(50, s) if t >= 800)
    assert count == sum(len(each) for each in window[0].anchors)
    others = (HighLow(50, high=5, low=0), HighLow(50, high=0, low=5), Uniform(), Repeated(Uniform(), 3))
    assert [len(sampler.window) for sampler in others] == [5, 5, 1, 3]
    # one level of it: four in five are high
    assert float((draw(HighLow(50)) >= 0.8).float().mean()) == pytest.approx(0.8, abs=0.01)


def test_levels_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="steps: a sampler of 2 steps with shift 5 has no level in .0, 0.799."):
        HighLow(2, (3.0, 5.0))
    with pytest.raises(ValueError, match="high, low: 0 and 0 levels are not allowed"):
        HighLow(50, high=0, low=0)
    with pytest.raises(ValueError, match="shifts: .. is not allowed"):
        NearTrajectory(50, ())
    with pytest.raises(ValueError, match="offset: -1 is not allowed"):
        NearTrajectory(50, offset=-1)
    with pytest.raises(ValueError, match="positive: 1.5 is not allowed"):
        Preference(positive=1.5)
    with pytest.raises(ValueError, match="beta: 0 is not allowed"):
        Preference(beta=0)


class Scaled:
    """x0 = scale x_t, v = (x_t - x0) / t: everything of it is known."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x_t, t, cond):
        x0 = self.scale * x_t
        return Prediction(x0, (x_t - x0) / t[:, None])


N = 4


def seen(scale, reference, *, own=None, real=None, seed=3):
    """A view of N prompts with labelled pairs, and samples of the student where `own` are given."""
    rng = torch.Generator().manual_seed(11)
    chosen, rejected = (torch.randn(N, 2, generator=rng, dtype=F64) for _ in range(2))
    x = torch.randn(N, 2, dtype=F64) if own is None else own
    base = view(x, {"student": Scaled(scale), "reference": Scaled(reference)})
    names = ("0", "1", "0", "1")
    batch = replace(base.batch, prompts=names, cond=labels(names), null=labels([""] * N), pairs=Pairs(chosen, rejected), real=real)
    end = Point(x, x, torch.ones(N, dtype=F64), torch.zeros(N, dtype=torch.long))
    rollout = None if own is None else Rollout(labels(names), 1, exit=end, final=end)
    return replace(base, batch=batch, rollout=rollout, rng=torch.Generator().manual_seed(seed))


def by_hand(won, lost, scale, reference, beta, levels, seed, first=()):
    """Loss and its derivative in `scale`, summed over the window: the same draws, and calculus."""
    rng = torch.Generator().manual_seed(seed)
    for n in first:
        torch.rand(n, generator=rng)
    losses, total = [], 0.0
    for part in levels.window:
        t = part(N, progress=0.0, t_exit=None, rng=rng).double()[:, None]
        eps = torch.randn(N, 2, generator=rng, dtype=F64)

        def error(x0, s, t=t, eps=eps):
            x_t = (1 - t) * x0 + t * eps
            residual = (1 - s) * x_t / t - (eps - x0)
            return residual.square().mean(1), (2 * residual * -x_t / t).mean(1)

        (w, dw), (x, dx) = error(won, scale), error(lost, scale)
        z = -beta / 2 * ((w - error(won, reference)[0]) - (x - error(lost, reference)[0]))
        losses.append(torch.log1p((-z).exp()).mean())
        total = total + ((1 - torch.sigmoid(z)) * beta / 2 * (dw - dx)).mean()
    return losses, total


LEVELS = [OneOf((1.0, 0.5)), HighLow(10), Uniform(0.2, 0.9), Repeated(Uniform(), 2)]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("reference", [0.4, 0.1])
def test_offline_gradients_are_the_hand_derivation_summed_over_the_window(levels, reference):
    scale = torch.tensor(0.4, dtype=F64, requires_grad=True)
    one = seen(scale, reference)
    terms = list(Preference(beta=3.0, levels=levels, pairs="offline")(one))
    losses, gradient = by_hand(one.batch.pairs.chosen, one.batch.pairs.rejected, 0.4, reference, 3.0, levels, 3)
    torch.testing.assert_close(torch.stack(terms), torch.stack(losses))
    if reference == 0.4:
        assert all(float(term.detach()) == pytest.approx(math.log(2), abs=1e-12) for term in terms)
    (got,) = torch.autograd.grad(sum(terms), scale)
    torch.testing.assert_close(got, gradient)


@pytest.mark.parametrize("positive", [0.0, 0.2, 1.0])
def test_half_online_gradients(positive):
    """A chosen sample beats the student's own, a rejected one loses to it; with the coin's own draws."""
    own = torch.randn(N, 2, generator=torch.Generator().manual_seed(5), dtype=F64)
    scale = torch.tensor(0.4, dtype=F64, requires_grad=True)
    real = torch.randn(N, 2, generator=torch.Generator().manual_seed(6), dtype=F64)
    one = seen(scale, 0.2, own=own, real=real)
    levels = HighLow(10, high=2, low=1)
    term = Preference(beta=3.0, levels=levels, pairs="half-online", positive=positive)
    assert term.needs == {"final", "reference", "preferred" if positive == 1 else "pairs"}
    terms = list(term(one))
    if positive == 1:
        won, lost, first = real, own, ()
    else:
        good = (torch.rand(N, generator=torch.Generator().manual_seed(3)) < positive)[:, None]
        assert positive == 0 or 0 < good.sum() < N
        won, lost, first = torch.where(good, one.batch.pairs.chosen, own), torch.where(good, own, one.batch.pairs.rejected), (N,)
    losses, gradient = by_hand(won, lost, 0.4, 0.2, 3.0, levels, 3, first)
    torch.testing.assert_close(torch.stack(terms), torch.stack(losses))
    torch.testing.assert_close(torch.autograd.grad(sum(terms), scale)[0], gradient)


def test_each_kind_asks_for_what_it_compares():
    assert Preference().needs == {"reward", "reference"}
    assert Preference(pairs="offline").needs == {"pairs", "reference"}
    half = Preference(pairs="half-online")
    assert Stage("h", 1, 4, (half,), (), RolloutConfig((1.0, 0.5))).to_the_end
    with pytest.raises(ValueError, match="stage 'h': it compares with samples of the student but rollout is None"):
        Stage("h", 1, 4, (half,))


def test_a_window_is_backwarded_one_level_at_a_time_and_summed():
    """The gradient that `iteration` leaves is the sum of those of its levels, not their mean."""
    from test_skeletons import batch_of, mlp_state, prompts

    from instep.lab.mixture import Mixture
    from instep.lab.networks import VelocityMLP
    from instep.training.step import iteration

    def gradient(levels):
        state = mlp_state()
        reference = VelocityMLP(state.path)
        state.roles = {**state.roles, "reference": reference}
        state.reference = tuple(reference.parameters())
        names = prompts(32, state.rng)
        good, bad = (Mixture.ring().sample(labels(names).label, state.rng) for _ in range(2))
        kept = []
        student = state.trained["student"]
        student.step = lambda lr, optim: (
            kept.append(torch.cat([p.grad.flatten() for p in student.parameters.values()])),
            (torch.tensor(0.0), torch.tensor(True)),
        )[1]
        term = Preference(beta=5.0, levels=levels, pairs="offline")
        log = iteration(state, Stage("apo", 1, 32, (term,)), [batch_of(names, pairs=Pairs(good, bad))], 0.0)
        assert log["objective/dpo"] == pytest.approx(math.log(2), abs=1e-6), "the log has their mean"
        return kept[0]

    class Always(OneOf):
        """Levels and noise that do not depend on how often it is asked."""

        def __call__(self, n, *, progress, t_exit, rng):
            rng.draws = 100
            return super().__call__(n, progress=progress, t_exit=t_exit, rng=rng)

    one = gradient(Always((1.0, 0.5)))
    assert one.norm() > 0
    torch.testing.assert_close(gradient(Repeated(Always((1.0, 0.5)), 3)), 3 * one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", ["velocity", "eps"])
@pytest.mark.parametrize("rejected", ["own", "labelled"])
def test_offline_pso_by_a_second_derivation(rejected, target):
    """-log sigmoid(beta ((e_lost - e_won) - (e_lost_ref - e_won_ref))), e the error of x0 times the weight of its target, at the student's own levels."""
    (stage,) = pso_offline(common(2), distil=0, rejected=rejected, beta=1.5, target=target).stages
    (term,) = stage.terms
    own, real = (torch.randn(N, 2, generator=torch.Generator().manual_seed(s), dtype=F64) for s in (5, 6))
    scale = torch.tensor(0.4, dtype=F64, requires_grad=True)
    one = seen(scale, 0.2, own=own, real=real)
    (found,) = term(one)
    rng = torch.Generator().manual_seed(3)
    t = OneOf((1.0, 0.5))(N, progress=0.0, t_exit=None, rng=rng).double()[:, None]
    eps = torch.randn(N, 2, generator=rng, dtype=F64)
    weight = {"velocity": 1 / t**2, "eps": ((1 - t) / t) ** 2}[target]
    won, lost = (real, own) if rejected == "own" else (one.batch.pairs.chosen, one.batch.pairs.rejected)
    error = lambda k, x0: (weight * (k * ((1 - t) * x0 + t * eps) - x0) ** 2).mean(1)  # noqa: E731
    by_hand = torch.log1p((-1.5 * ((error(scale, lost) - error(scale, won)) - (error(0.2, lost) - error(0.2, won)))).exp()).mean()
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(torch.autograd.grad(found, scale), torch.autograd.grad(by_hand, scale))
    assert term.needs == {"reference", *(("final", "preferred") if rejected == "own" else ("pairs",))} and stage.fresh
    with pytest.raises(ValueError, match="rejected: 'mine' is not known; allowed: own, labelled"):
        pso_offline(rejected="mine")
    with pytest.raises(ValueError, match="target: 'score' is not known"):
        Preference(target="score")
