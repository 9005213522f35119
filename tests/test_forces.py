"""Forces: units, signs and numbers worked by hand."""

from __future__ import annotations

import pytest
import torch

from instep.diffusion.levels import LevelSampler
from instep.diffusion.path import RectifiedFlow
from instep.diffusion.prediction import Prediction
from instep.diffusion.rollout import Point, Rollout
from instep.lab.mixture import LabelCondition, labels
from instep.methods.align import AlignGroup, AlignPair, align_direction, group_factor
from instep.methods.matching import DistributionMatching
from instep.methods.operators import Displacements, Standard
from instep.methods.term import Batch, View, as_force
from instep.recipes.dm_align import dm_align_group, dm_align_pair

F64 = torch.float64


class Fixed(LevelSampler):
    """Always the same level."""

    def __call__(self, n, *, progress, t_exit, rng):
        return torch.full((n,), 0.5, dtype=F64)


class Linear:
    """A denoiser whose estimate is scale * x_t + shift."""

    def __init__(self, scale: float, shift: float = 0.0) -> None:
        self.scale, self.shift, self.calls = scale, shift, []

    def __call__(self, x_t, t, cond):
        self.calls.append((x_t, t, cond))
        x0 = self.scale * x_t + self.shift
        return Prediction(x0, x0)


def view(x: torch.Tensor, roles, *, group: int = 1, reward=None, advantage=None, real=None) -> View:
    n = len(x)
    point = Point(x, x, torch.full((n,), 0.25, dtype=F64), torch.zeros(n, dtype=torch.long))
    cond = LabelCondition(label=torch.zeros(n, dtype=torch.long))
    prompts = ("0",) * (n // group)
    batch = Batch(prompts, labels(prompts), labels([""] * len(prompts)), preferred=real)
    rollout = Rollout(cond, group, exit=point, final=point, reward=reward, advantage=advantage)
    return View(roles, RectifiedFlow(), batch, 0.0, torch.Generator().manual_seed(0), rollout)


def test_matching_force_is_autograd_of_the_surrogate() -> None:
    """The force equals the gradient of mean over batch of 0.5 * mean over elements of (x - sg(x - g))^2, taken by autograd."""
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    force = DistributionMatching(levels=Fixed(), guidance=1.0)
    g = force.explain(view(x, {"teacher": Linear(0.7, 0.3), "fake": Linear(0.4)})).direction
    live = x.clone().requires_grad_()
    loss = (0.5 * (live - (live - g).detach()).square().flatten(1).mean(1)).mean()
    (expected,) = torch.autograd.grad(loss, live)
    torch.testing.assert_close(force(view(x, {"teacher": Linear(0.7, 0.3), "fake": Linear(0.4)})), expected, rtol=1e-10, atol=1e-12)


def test_matching_force_by_hand() -> None:
    """Sign and scale: (x0_fake - x0_real) / mean|x - x0_real|; descending it moves x from the fake's to the teacher's estimate."""
    x = torch.tensor([[1.0, 3.0]], dtype=F64)
    seen = DistributionMatching(levels=Fixed()).explain(view(x, {"teacher": Linear(0.0, 2.0), "fake": Linear(0.0, -1.0)}))
    # |x - 2| is 1 and 1, mean 1: direction is -1 - 2 = -3, the target lies 3 above x
    torch.testing.assert_close(seen.direction, torch.full((1, 2), -3.0, dtype=F64))
    torch.testing.assert_close(seen.target, x + 3)
    # guidance: conditional 0, unconditional 0 (one denoiser): w does not matter where they agree
    guided = DistributionMatching(levels=Fixed(), guidance=4.0).explain(view(x, {"teacher": Linear(0.0, 2.0), "fake": Linear(0.0, -1.0)}))
    torch.testing.assert_close(guided.direction, seen.direction)
    two, five = torch.tensor([2.0]), torch.tensor([5.0])
    d = Displacements(real=two, fake=five, dm=two, ca=five)
    assert Standard()(d, None).item() == -3.0


def test_matching_force_survives_a_teacher_that_agrees() -> None:
    x = torch.ones(2, 2, dtype=F64)

    class Same(Linear):
        def __call__(self, x_t, t, cond):
            return Prediction(x[: len(x_t)], x[: len(x_t)])

    g = DistributionMatching(levels=Fixed())(view(x, {"teacher": Same(0), "fake": Linear(0.0, 1.0)}))
    assert g.isfinite().all() and g.abs().max() == 0


def test_align_direction_by_hand() -> None:
    x = torch.tensor([[0.0, 4.0]], dtype=F64)
    estimate = torch.tensor([[1.0, 1.0]], dtype=F64)  # |x - estimate| is 1 and 3: mean 2
    preferred = torch.tensor([[3.0, 0.0]], dtype=F64)
    torch.testing.assert_close(align_direction(x, estimate, preferred, "own"), torch.tensor([[-1.0, 0.5]], dtype=F64))
    # |x - preferred| is 3 and 4: mean 3.5
    torch.testing.assert_close(align_direction(x, estimate, preferred), torch.tensor([[-2.0, 1.0]], dtype=F64) / 3.5)


def test_pair_moves_toward_the_preferred_estimate_with_the_same_noise() -> None:
    x, real = torch.zeros(3, 2, dtype=F64), torch.full((3, 2), 4.0, dtype=F64)
    fake = Linear(0.5)
    g = AlignPair(levels=Fixed(), normaliser="own")(view(x, {"fake": fake}, real=real[:, None]))
    ((x_t, t, _),) = fake.calls
    own, other = x_t.chunk(2)
    # same level and same noise: the two noised points differ by a(t) (x - x_plus) alone
    torch.testing.assert_close(own - other, 0.5 * (x - real))
    scale = (x - 0.5 * own).abs().mean(1, keepdim=True)
    torch.testing.assert_close(g, as_force(0.5 * (own - other) / scale))
    assert (g < 0).all(), "descending a negative force raises x toward the preferred 4"


@pytest.mark.parametrize(("sign", "factors"), [("pull", [0.0, 1.0]), ("signed", [-1.0, 1.0]), ("printed", [1.0, -1.0])])
def test_group_sign(sign, factors) -> None:
    """The best of two is the preferred one (top 1): the low sample's force points to it; what the high one gets depends on the sign."""
    advantage = torch.tensor([1.0, -1.0], dtype=F64)
    torch.testing.assert_close(group_factor(advantage, sign), torch.tensor(factors, dtype=F64))
    x = torch.tensor([[2.0, 2.0], [0.0, 0.0]], dtype=F64)
    fake = Linear(0.5)
    g = AlignGroup(levels=Fixed(), top_n=1, sign=sign, toward="mean", normaliser="own")(view(x, {"fake": fake}, group=2, reward=advantage, advantage=advantage))
    ((x_t, _, cond),) = fake.calls
    assert len(x_t) == 3 and len(cond) == 3, "two samples and one preferred mean"
    low = 0.5 * (x_t[1] - x_t[2])  # estimate minus preferred estimate
    torch.testing.assert_close(g[1], factors[1] * low / (x[1] - 0.5 * x_t[1]).abs().mean() / x.numel())
    assert (g[1] < 0).all() == (factors[1] > 0), "a pull lowers the distance to the preferred sample at 2"
    assert g[0].abs().max() == 0, "the best sample of a top-1 group is its own target"


def test_group_mean_of_the_best_shares_noise_and_level() -> None:
    x = torch.arange(8, dtype=F64).reshape(4, 2)
    reward = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=F64)
    fake = Linear(0.5)
    AlignGroup(levels=Fixed(), top_n=2, toward="mean")(view(x, {"fake": fake}, group=4, reward=reward, advantage=reward - 1.5))
    ((x_t, t, _),) = fake.calls
    noise = 2 * x_t[:4] - x
    torch.testing.assert_close(noise, noise[:1].expand(4, 2))
    torch.testing.assert_close(2 * x_t[4] - noise[0], x[2:].mean(0))
    with pytest.raises(ValueError, match="sign: 'other'"):
        group_factor(reward, "other")


class Affine(Linear):
    """An estimate that depends on the point nonlinearly, so that no two readings agree by accident."""

    def __call__(self, x_t, t, cond):
        x0 = self.scale * x_t + 0.1 * x_t.square()
        return Prediction(x0, x0)


NOISE_SEED = 0


def group_by_hand(x, reward, advantage, *, toward, normaliser, sign, top_n, estimate, t=0.5):
    """A second derivation of the group force, sample by sample: one group, the noise that the view draws first."""
    noise = torch.randn(1, *x.shape[1:], generator=torch.Generator().manual_seed(NOISE_SEED), dtype=F64)[0]
    best = sorted(range(len(x)), key=lambda i: -float(reward[i]))[:top_n]
    rows = []
    for i in range(len(x)):
        point = (1 - t) * x[i] + t * noise
        own = estimate(point) if estimate else x[i]
        plus = sum(x[j] for j in best) / top_n if toward == "mean" else x[min(best, key=lambda j: float((x[i] - x[j]).norm()))]
        target = estimate((1 - t) * plus + t * noise) if estimate else plus
        if toward == "kernel":
            density = [torch.distributions.Normal((1 - t) * x[j], t).log_prob(point).sum().exp() for j in best]
            target = sum(p * x[j] for p, j in zip(density, best, strict=True)) / sum(density)
        size = (x[i] - (target if normaliser == "target" else own)).abs().mean().clamp(min=1e-3)
        a = float(advantage[i])
        rows.append({"signed": -a, "pull": max(-a, 0.0), "printed": a}[sign] * (own - target) / size)
    return torch.stack(rows) / x.numel()


@pytest.mark.parametrize("sign", ["pull", "signed", "printed"])
@pytest.mark.parametrize(("toward", "normaliser"), [(a, b) for a in ("nearest", "mean", "kernel") for b in ("target", "own")])
def test_every_reading_of_the_group_force_by_a_second_derivation(toward, normaliser, sign) -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(4), dtype=F64)
    reward = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.9, -2.0], dtype=F64)
    advantage = (reward - reward.mean()) / reward.std(unbiased=False)
    options = {"toward": toward, "normaliser": normaliser, "sign": sign, "top_n": 3}
    for role in ("fake", "teacher", "student"):
        fakes = {name: Linear(9.0) for name in ("fake", "teacher", "student")} | {role: Affine(0.6)}
        g = AlignGroup(levels=Fixed(), estimate_by=role, **options)(view(x, fakes, group=6, reward=reward, advantage=advantage))
        expected = group_by_hand(x, reward, advantage, **options, estimate=lambda point: 0.6 * point + 0.1 * point.square())
        torch.testing.assert_close(g, expected, rtol=1e-9, atol=1e-12)
    if toward != "kernel" and normaliser == "target":
        g = AlignGroup(levels=Fixed(), estimate_by="samples", **options)(view(x, {}, group=6, reward=reward, advantage=advantage))
        torch.testing.assert_close(g, group_by_hand(x, reward, advantage, **options, estimate=None), rtol=1e-9, atol=1e-12)


def test_a_preferred_sample_is_its_own_nearest_and_others_take_the_closer_of_two() -> None:
    x = torch.tensor([[0.0, 0.0], [10.0, 0.0], [1.0, 1.0], [8.0, 1.0]], dtype=F64)
    reward = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=F64)
    force = AlignGroup(levels=Fixed(), top_n=2, sign="signed")
    seen = force.explain(view(x, {"fake": Linear(0.5)}, group=4, reward=reward, advantage=reward - 1.5))
    torch.testing.assert_close(seen.own - seen.preferred, 0.25 * torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [-2.0, 1.0]], dtype=F64))
    torch.testing.assert_close(seen.target, seen.x - seen.direction)


@pytest.mark.parametrize("toward", ["nearest", "mean", "kernel"])
def test_pair_chooses_among_the_preferred_samples_of_its_prompt(toward) -> None:
    x = torch.tensor([[0.0, 0.0], [4.0, 4.0]], dtype=F64)
    preferred = torch.tensor([[[1.0, 0.0], [9.0, 9.0]], [[1.0, 0.0], [5.0, 5.0]]], dtype=F64)
    seen = AlignPair(levels=Fixed(), toward=toward).explain(view(x, {"fake": Linear(0.5)}, real=preferred))
    noise = torch.randn(2, 2, generator=torch.Generator().manual_seed(NOISE_SEED), dtype=F64)
    x_t = 0.5 * x + 0.5 * noise
    plus = {"nearest": torch.stack([preferred[0, 0], preferred[1, 1]]), "mean": preferred.mean(1)}.get(toward)
    if plus is None:
        density = torch.stack([torch.distributions.Normal(0.5 * preferred[:, j], 0.5).log_prob(x_t).sum(1).exp() for j in range(2)], 1)
        expected = ((density / density.sum(1, keepdim=True))[:, :, None] * preferred).sum(1)
    else:
        expected = 0.5 * (0.5 * plus + 0.5 * noise)
    torch.testing.assert_close(seen.preferred, expected)
    torch.testing.assert_close(seen.direction, (0.5 * x_t - expected) / (x - expected).abs().mean(1, keepdim=True))


def test_pair_leaves_a_sample_to_matching_whose_preferred_ones_are_far() -> None:
    """Six samples whose nearest of two preferred ones is 1, 2, ... 6 away, by the root of the squared distance: the mean square is 91 / 6."""
    x = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    unit = torch.ones(3, 2, dtype=F64) / 6**0.5
    near = x + torch.arange(1, 7, dtype=F64)[:, None, None] * unit
    preferred, roles = torch.stack([x - 9 * unit, near], 1), {"fake": Linear(0.5)}
    every = AlignPair(levels=Fixed())(view(x, roles, real=preferred))
    assert every.flatten(1).any(1).all()
    for within, moved in ((1.0, 3), (16.0001 / (91 / 6), 4), (15.9999 / (91 / 6), 3), (0.01, 0), (3.0, 6)):
        force = AlignPair(levels=Fixed(), within=within)(view(x, roles, real=preferred))
        torch.testing.assert_close(force, torch.cat([every[:moved], torch.zeros_like(every[moved:])]))
    # a sample alone in its batch is as near as the mean
    alone = AlignPair(levels=Fixed(), within=1.0)(view(x[5:], roles, real=preferred[5:]))
    torch.testing.assert_close(alone, AlignPair(levels=Fixed())(view(x[5:], roles, real=preferred[5:])))
    assert alone.any()


def test_options_of_the_alignment_forces_are_refused_early() -> None:
    for options, message in (
        ({"toward": "far"}, "toward: 'far' is not known; allowed: nearest, mean, kernel"),
        ({"normaliser": "x"}, "normaliser: 'x' is not known"),
        ({"estimate_by": "real"}, "estimate_by: 'real' is not known; allowed: fake, teacher, student, samples"),
        ({"estimate_by": "samples", "toward": "kernel"}, "without noise there is no posterior"),
        ({"estimate_by": "samples", "normaliser": "own"}, "a sample's distance to itself is zero"),
    ):
        with pytest.raises(ValueError, match=message):
            AlignGroup(**options)
    with pytest.raises(ValueError, match="candidates: 0 is not allowed"):
        AlignPair(candidates=0)
    with pytest.raises(ValueError, match="within: 0 is not allowed; it is a factor of the mean squared distance, or none"):
        AlignPair(within=0)
    with pytest.raises(ValueError, match="top_n: 8 is not allowed; between 1 and 3 of a group of 4"):
        dm_align_group(top_n=8)
    with pytest.raises(ValueError, match="reach: 'far' is not known; allowed: exit, last, trajectory"):
        dm_align_pair(reach="far")
    assert dm_align_group(weight=0.2, matching=0.9).stages[-1].terms[0].weight == 0.9, "the two weights of Eq. 8 are apart"
