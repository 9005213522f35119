"""DOLLAR against closed forms: its steps, its velocity, the consistency function, the latent reward model; and its recipe in the laboratory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from instep.diffusion.path import RectifiedFlow, VariancePreserving, broadcast
from instep.diffusion.prediction import Condition, Prediction, eps_of_x0, to_prediction, x0_of_velocity
from instep.diffusion.rollout import Point, Rollout
from instep.diffusion.transitions import CPS, Deterministic, Posterior, Renoise
from instep.lab.mixture import ExactTeacher, LabelCondition, Mixture, labels
from instep.methods.consistency import Consistency, boundary, consistency_function, distance
from instep.methods.latent_reward import LatentFit, LatentGradient
from instep.methods.latent_reward_model import SETTLE, ConvLatentReward, LatentRewardShape
from instep.methods.term import Batch, View
from instep.models.wan import WanCondition
from instep.recipes.common import Common
from instep.recipes.dollar import dollar

F64 = torch.float64
PATHS = (VariancePreserving.linear(), VariancePreserving.scaled_linear(), VariancePreserving.cosine(), RectifiedFlow())
GRIDS = ((0.5, 0.48), (0.75, 0.25), (0.999, 0.5), (0.3, 0.001))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pair", GRIDS)
def test_ddpm_step_is_the_exact_posterior(path, pair):
    """x_s given x_t and x0, from Bayes' rule on the two Gaussians q(x_s | x0) and q(x_t | x_s), also on skipped grids."""
    t, s = (torch.tensor([v], dtype=F64) for v in pair)
    a, a2, b, b2 = path.a(t), path.a(s), path.b(t), path.b(s)
    x0, x_t = torch.randn(1, 5, dtype=F64), torch.randn(1, 5, dtype=F64)
    ratio = a / a2
    noise = b**2 - ratio**2 * b2**2
    precision = 1 / b2**2 + ratio**2 / noise
    mean = (a2 * x0 / b2**2 + ratio * x_t / noise) / precision
    got, std = Posterior().gaussian(path, x0, x_t, t, s)
    assert torch.allclose(got, mean, rtol=1e-9, atol=1e-11) and torch.allclose(std, precision.rsqrt(), rtol=1e-9)


def test_eq_27_as_derived_and_not_as_printed():
    """With alpha_t = abar_t / abar_prev the posterior mean has sqrt(abar_prev) on x0 and sqrt(alpha) on x_t; the printed indices give another one."""
    path = VariancePreserving.linear()
    t, s = torch.tensor([0.5], dtype=F64), torch.tensor([0.4], dtype=F64)
    bar, prev = path.alpha_bar(t), path.alpha_bar(s)
    alpha = bar / prev
    x0, x_t = torch.randn(1, 5, dtype=F64), torch.randn(1, 5, dtype=F64)
    got, std = Posterior().gaussian(path, x0, x_t, t, s)
    assert torch.allclose(got, ((1 - alpha) * prev.sqrt() * x0 + alpha.sqrt() * (1 - prev) * x_t) / (1 - bar))
    assert torch.allclose(std.square(), (1 - alpha) * (1 - prev) / (1 - bar)), "sigma_t of Eq. 5"
    assert not torch.allclose(got, ((1 - alpha) * bar.sqrt() * x0 + bar.sqrt() * (1 - prev) * x_t) / (1 - bar), rtol=1e-3)


def test_eq_5_printed_adds_noise_that_it_does_not_take_away():
    """With its own sigma, Eq. 5's variance as derived stays 1 - abar'; as printed (x_t's coefficient without sigma) it is too large."""
    path = VariancePreserving.linear()
    t, s = torch.tensor([0.5], dtype=F64), torch.tensor([0.25], dtype=F64)
    zero, one = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)
    (without, std), (with_x, _) = (Posterior().gaussian(path, zero, x_t, t, s) for x_t in (zero, one))
    coefficient, b, b2 = (with_x - without)[0], path.b(t), path.b(s)
    # of x_s given x0, where x_t = a x0 + b eps: what the mean keeps of eps, and the fresh noise
    assert torch.allclose((coefficient * b).square() + std.square(), b2.square())
    printed = b2 / b
    assert float(((printed * b).square() + std.square()) / b2.square()) > 1.3 and float(coefficient) < 0.9 * float(printed)


@pytest.mark.parametrize("path", PATHS)
def test_ddpm_steps_keep_the_marginal_whatever_eta(path):
    """x_s made of x_t = a x0 + b eps has mean a' x0 and deviation b' for every eta: what the step takes from eps it adds as noise."""
    t, s = torch.tensor([0.7], dtype=F64), torch.tensor([0.3], dtype=F64)
    one = torch.ones(1, 1, dtype=F64)
    for eta in (1e-6, 0.3, 0.7, 1.0):
        clean, std = Posterior(eta).gaussian(path, one, broadcast(path.a(t), one) * one, t, s)
        noisy, _ = Posterior(eta).gaussian(path, one, broadcast(path.a(t), one) * one + broadcast(path.b(t), one) * one, t, s)
        assert torch.allclose(clean[0], path.a(s)) and torch.allclose((noisy - clean)[0].square() + std.square(), path.b(s).square())
    ddim, _ = Deterministic().gaussian(path, one, 0.3 * one, t, s)
    assert torch.allclose(Posterior(1e-9).gaussian(path, one, 0.3 * one, t, s)[0], ddim), "eta -> 0 is DDIM"
    with pytest.raises(ValueError, match="eta: 0"):
        Posterior(0.0)


def test_ddpm_from_pure_noise_is_the_few_step_step():
    """Where nothing of x0 is left in x_t, the posterior forgets x_t: re-noising, and CPS at 1."""
    x0, x_t = torch.randn(3, 4, dtype=F64), torch.randn(3, 4, dtype=F64)
    t, s = torch.ones(3, dtype=F64), torch.full((3,), 0.5, dtype=F64)
    for step in (Renoise(), CPS(1.0)):
        for mine, other in zip(Posterior().gaussian(RectifiedFlow(), x0, x_t, t, s), step.gaussian(RectifiedFlow(), x0, x_t, t, s), strict=True):
            assert torch.allclose(mine, other)


@pytest.mark.parametrize("path", PATHS)
def test_conjugate_velocity(path):
    """Eq. 8 against its derivation: y = x_t / (a + b) is the straight line's point at b / (a + b), whose velocity eps - x0 gives x0 back."""
    x0, eps, t = torch.randn(6, 3, dtype=F64), torch.randn(6, 3, dtype=F64), torch.linspace(0.05, 0.95, 6, dtype=F64)
    x_t = path.renoise(x0, eps, t)
    a, b = path.a(t), path.b(t)
    y, level = x_t / (a + b)[:, None], b / (a + b)
    assert torch.allclose(y, RectifiedFlow().renoise(x0, eps, level))
    assert torch.allclose(x0_of_velocity(path, x_t, t, eps - x0), x0)
    assert torch.allclose(x0_of_velocity(path, x_t, t, eps - x0), y - level[:, None] * (eps - x0)), "on the line: y - level v"
    bar = path.a(t).square() if isinstance(path, VariancePreserving) else None
    if bar is not None:  # as Eq. 8 prints it, with its velocity x0 - eps
        root, rest = bar.sqrt()[:, None], (1 - bar).sqrt()[:, None]
        assert torch.allclose((x_t + rest * (x0 - eps)) / (root + rest), x0)
        # and the standard velocity of the same sample, a eps - b x0 (Eq. 3)
        assert torch.allclose(to_prediction("v_prediction", root * eps - rest * x0, path, x_t, t).x0, x0)


def test_a_variance_preserving_model_is_a_flow_at_other_levels():
    """Re-noising and deterministic steps of x_t, divided by a + b, are those of the flow at level b / (a + b), with the same network."""
    path, flow = VariancePreserving.cosine(), RectifiedFlow()

    class Network:
        def __call__(self, y, level, cond):
            v = torch.sin(3 * y) + level[:, None]
            return Prediction(x0_of_velocity(flow, y, level, v), v)

    class Conjugate:
        """The same network on the variance-preserving path."""

        def __call__(self, x_t, t, cond):
            a, b = path.a(t), path.b(t)
            v = Network()(x_t / (a + b)[:, None], b / (a + b), cond).v
            return Prediction(x0_of_velocity(path, x_t, t, v), v)

    def conjugate(t: float) -> float:
        a, b = (float(f(torch.tensor([t], dtype=F64))) for f in (path.a, path.b))
        return b / (a + b)

    noise, steps = torch.randn(5, 3, dtype=F64), (0.9, 0.6, 0.3)
    first = torch.full((5,), steps[0], dtype=F64)
    wide = (path.a(first) + path.b(first))[:, None]
    for rule in (Deterministic(), Renoise()):
        x, y = noise, noise / wide
        for t, s in zip(steps, (*steps[1:], 0.1), strict=True):
            fresh = torch.randn(5, 3, dtype=F64)
            t, s, u, r = (torch.full((5,), v, dtype=F64) for v in (t, s, conjugate(t), conjugate(s)))
            x0, y0 = Conjugate()(x, t, None).x0, Network()(y, u, None).x0
            assert torch.allclose(x0, y0)
            x, y = rule.step(path, x0, x, fresh, t, s), rule.step(flow, y0, y, fresh, u, r)
            assert torch.allclose(x / (path.a(s) + path.b(s))[:, None], y)


def test_consistency_function_is_the_identity_at_zero():
    class Blank:
        def __call__(self, x_t, t, cond):
            return Prediction(torch.full_like(x_t, torch.nan), x_t)

    x, zero = torch.randn(4, 3, dtype=F64), torch.zeros(4, dtype=F64)
    assert torch.equal(consistency_function(Blank(), x, zero, Condition()), x), "whatever the network says there"
    skip, out = boundary(torch.tensor([0.0, 1e-3, 1.0], dtype=F64))
    assert skip.tolist()[0] == 1 and out.tolist()[0] == 0
    # LCM: sigma_data^2 / ((10 t)^2 + sigma_data^2) at its step 1 of 1000
    assert float(skip[1]) == pytest.approx(0.25 / 100.25) and float(out[1]) == pytest.approx(10 / 100.25**0.5) and float(out[2]) > 1 - 1e-8


def test_distances():
    x, y = torch.tensor([[1.0, 2.0]], dtype=F64), torch.tensor([[0.0, 0.0]], dtype=F64)
    assert float(distance(x, y, "mse")) == 2.5
    c = 1e-3
    assert float(distance(x, y, "huber")) == pytest.approx(((1 + c * c) ** 0.5 + (4 + c * c) ** 0.5) / 2 - c)


MIXTURE = Mixture(torch.tensor([[2.0, 0.0], [-2.0, 0.0]], dtype=F64), 0.3, torch.tensor([0, 1]))


class Counted:
    """A denoiser that counts how many samples it is asked for."""

    def __init__(self, inner):
        self.inner, self.asked = inner, 0

    def __call__(self, x_t, t, cond):
        self.asked += len(x_t)
        return self.inner(x_t, t, cond)


def consistency_view(path, student, teacher, seed=0, n=64):
    names = [str(i % 2) for i in range(n)]
    rng = torch.Generator().manual_seed(seed)
    real = MIXTURE.sample(labels(names).label, rng).double()
    return View({"student": student, "teacher": teacher}, path, Batch(tuple(names), labels(names), labels([""] * n), real), 0.0, rng)


@pytest.mark.parametrize("path", [RectifiedFlow(), VariancePreserving.linear()])
def test_a_point_mass_is_its_own_consistency_function(path):
    """Data at one point: x0 is the same all along a trajectory, so the exact denoiser has no consistency loss, and a wrong one has."""
    point = torch.tensor([1.0, -2.0], dtype=F64)

    class Exact:
        def __call__(self, x_t, t, cond):
            return Prediction(point.expand_as(x_t), x_t)

    class Wrong:
        def __call__(self, x_t, t, cond):
            return Prediction(point * (1 - 0.5 * t)[:, None], x_t)

    view = consistency_view(path, Exact(), Exact())
    view = replace(view, batch=replace(view.batch, real=point.expand(64, 2)))
    for steps in (1, 5, 50):
        # at the last level before 0, c_skip lets 6e-6 of the noise through
        assert float(next(Consistency(steps=steps, guidance=1.0)(view))) < 1e-9
        assert float(next(Consistency(steps=steps, guidance=1.0)(replace(view, roles={"student": Wrong(), "teacher": Exact()})))) > 1e-4


def test_consistency_distillation_finds_the_trajectory_of_the_teacher():
    """One Gaussian, flow path: the probability-flow map from noise is affine and known, and minimising the loss over affine students finds it."""
    torch.manual_seed(0)
    path, std = RectifiedFlow(), 0.5
    gaussian = Mixture(torch.tensor([[1.0, 0.0]], dtype=F64), std, torch.tensor([0]))
    teacher = ExactTeacher(gaussian, path)
    scale = nn.Parameter(torch.ones(21, dtype=F64))
    shift = nn.Parameter(torch.zeros(21, dtype=F64))

    class Affine:
        """f(x, t) on a grid of 20: one scale and one shift a level, on the first coordinate's and the second's own centre."""

        def __call__(self, x_t, t, cond):
            at = (t * 20).round().long()
            x0 = scale[at][:, None] * x_t + shift[at][:, None] * torch.tensor([1.0, 0.0], dtype=F64)
            return Prediction(x0, x_t)

    optimizer = torch.optim.Adam([scale, shift], 2e-2)
    names, rng = ["0"] * 256, torch.Generator().manual_seed(0)
    objective = Consistency(steps=2, grid=20, guidance=1.0)
    for _ in range(1500):
        real = gaussian.sample(labels(names).label, rng).double()
        view = View({"student": Affine(), "teacher": teacher}, path, Batch(tuple(names), labels(names), labels([""] * 256), real), 0.0, rng)
        loss = next(objective(view))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # along 20 Euler steps the deviation of a Gaussian goes from 1 to the product of (1 + dt * slope)
    grown = 1.0
    for j in range(20, 0, -1):
        t = j / 20
        slope = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
        grown *= 1 - slope / 20
    assert scale[20].item() == pytest.approx(grown, abs=0.03) and shift[20].item() == pytest.approx(1.0, abs=0.03)


def test_consistency_steps_of_the_teacher_are_counted_and_guided():
    teacher, student = Counted(ExactTeacher(MIXTURE, RectifiedFlow())), Counted(ExactTeacher(MIXTURE, RectifiedFlow()))
    view = consistency_view(RectifiedFlow(), student, teacher)
    next(Consistency(steps=3, guidance=3.0)(view))
    assert (teacher.asked, student.asked) == (3 * 2 * 64, 2 * 64)
    next(Consistency(steps=3, guidance=1.0, target="teacher")(view))
    assert teacher.asked == 3 * 2 * 64 + 4 * 64, "the target as Eq. 6 prints it is the teacher's"
    with pytest.raises(ValueError, match="cd_steps: 51"):
        Consistency(steps=51)


# ------------------------------------------------------------------------------------------------------ latent reward model


def text(n: int, length: int = 5, width: int = 32, seed: int = 0) -> WanCondition:
    rng = torch.Generator().manual_seed(seed)
    bias = torch.zeros(n, length)
    bias[:, -1] = -torch.inf
    return WanCondition(text=torch.randn(n, length, width, generator=rng), bias=bias)


def test_parameters_are_those_of_the_papers_tables():
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    norms = 2 * 2 * 128
    assert count(ConvLatentReward(12)) == 189_441, "Table 12, group norms among them"
    # Table 13's sum leaves them out; its text layer of 524,544 is 4096 x 128 and a layer norm
    assert count(ConvLatentReward(12, text_width=4096)) == 763_009 + norms
    assert ConvLatentReward(12).rate(torch.randn(2, 12, 24, 40), Condition()).shape == (2,)
    shapes = []
    net = ConvLatentReward(12)
    for layer in (0, 3):
        net.features[layer].register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[1:])))
    net.rate(torch.randn(1, 12, 24, 40), Condition())
    assert shapes == [(128, 6, 10), (128, 3, 5)], "Table 12's column of output shapes"


@pytest.mark.parametrize("frames", ["average", "volume"])
def test_the_gradient_reaches_the_latent_and_depends_on_the_text(frames):
    torch.manual_seed(0)
    net = LatentRewardShape("text-video", frames).build((16, 3, 6, 6), text(1))
    x = torch.randn(4, 16, 3, 6, 6, requires_grad=True)
    slopes = [torch.autograd.grad(net.rate(x, text(4, seed=seed)).sum(), x)[0] for seed in (0, 1)]
    assert all(float(g.norm()) > 1e-3 for g in slopes)
    assert float((slopes[0] - slopes[1]).norm()) > 0.01 * float(slopes[0].norm()), "another text, another direction"
    blind = LatentRewardShape("video", frames).build((16, 3, 6, 6), text(1))
    a, b = (torch.autograd.grad(blind.rate(x, text(4, seed=seed)).sum(), x)[0] for seed in (0, 1))
    assert torch.equal(a, b), "a reward without text has none"


def test_padding_is_not_read():
    torch.manual_seed(0)
    net = ConvLatentReward(16, text_width=32, volume=True, patch=2)
    x, cond = torch.randn(3, 16, 3, 6, 6), text(3)
    other = replace(cond, text=cond.text.clone())
    other.text[:, -1] += 100
    assert torch.equal(net.rate(x, cond), net.rate(x, other))


def test_frame_by_frame_is_the_mean_of_the_frames():
    torch.manual_seed(0)
    net = ConvLatentReward(8, text_width=32, patch=2)
    x, cond = torch.randn(2, 8, 3, 8, 8), text(2)
    images = torch.stack([net.rate(x[:, :, k], cond) for k in range(3)], 1).mean(1)
    assert torch.allclose(net.rate(x, cond), images, atol=1e-6)


def test_a_kind_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="'text-image' does not fit this model, whose latents are videos"):
        LatentRewardShape("text-image").build((16, 3, 6, 6), text(1))
    with pytest.raises(ValueError, match="no text tokens"):
        LatentRewardShape("text-image").build((4, 8, 8), LabelCondition(label=torch.zeros(1)))
    with pytest.raises(ValueError, match="patch: 0"):
        LatentRewardShape(patch=0)


def test_mean_and_deviation_settle_and_are_part_of_the_state():
    torch.manual_seed(0)
    net = ConvLatentReward(4)
    rng = torch.Generator().manual_seed(0)
    seen = 1e6 + 3 * torch.randn(SETTLE, generator=rng)
    for part in seen.split(7):
        net.settle(part)
    assert float(net.mean) == pytest.approx(float(seen.double().mean()), abs=1e-6)
    assert float(net.std) == pytest.approx(float(seen.double().std(correction=0)), rel=1e-4), "a deviation of 3 on a mean of a million"
    before = net.mean.clone()
    net.settle(torch.full((64,), 100.0))
    assert torch.equal(net.mean, before), "settled"
    other = ConvLatentReward(4)
    other.load_state(net.state())
    x = torch.randn(2, 4, 16, 16)
    assert torch.equal(other.rate(x, Condition()), net.rate(x, Condition())) and torch.equal(other.standard(seen), net.standard(seen))
    with pytest.raises(ValueError, match="does not fit this one"):
        ConvLatentReward(5).load_state(net.state())


def test_a_reward_that_begins_without_spread_is_waited_for():
    """A sparse reward: all labels 0 at first. Their deviation is not taken for that of the reward."""
    net = ConvLatentReward(4)
    for _ in range(3):
        net.settle(torch.zeros(SETTLE))
    assert float(net.std) == 1 and net.standard(torch.tensor([1.0])).tolist() == [1.0]
    net.settle(torch.ones(SETTLE))
    assert float(net.mean) == 0.25 and float(net.std) == pytest.approx(3**0.5 / 4)
    before = net.std.clone()
    net.settle(torch.full((8,), 9.0))
    assert torch.equal(net.std, before), "settled now"


def test_several_rewards_are_standardised_apart():
    net = ConvLatentReward(4, rewards=2)
    each = torch.stack([torch.arange(SETTLE) / SETTLE, 1000.0 * (torch.arange(SETTLE) % 2)], 1)
    net.settle(each)
    standard = net.standard(each, (1.0, 0.5))
    expected = (each - each.mean(0)) / each.std(0, correction=0) @ torch.tensor([1.0, 0.5])
    assert torch.allclose(standard, expected, atol=1e-5), "the second's unit is a thousand times larger, its weight a half"


class Quadratic(ConvLatentReward):
    """-(x - 1)^2 / 2: a reward with a known gradient."""

    def rate(self, x, cond):
        return -0.5 * (x - 1).square().flatten(1).sum(1)


def test_the_force_is_the_gradient_of_the_batch_mean():
    x = torch.randn(4, 2, 3, 3, dtype=F64)
    one = torch.ones(4, dtype=F64)
    cond = LabelCondition(label=torch.zeros(4))
    rollout = Rollout(cond, 1, exit=Point(x, x, one, one.long()))
    view = View({}, RectifiedFlow(), Batch(("0",) * 4, cond, cond), 0.0, torch.Generator(), rollout, latent_reward=Quadratic(2))
    assert torch.allclose(LatentGradient()(view), (x - 1) / 4), "-grad R / B"


def test_labels_are_the_rewards_of_made_real_and_misnamed_samples():
    asked = []

    def score(x, prompts):
        asked.append(list(prompts))
        return x.flatten(1).mean(1)

    n, x, real = 3, torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 2, 16, 16), torch.full((3, 2, 16, 16), 10.0)
    cond = text(n)
    rollout = Rollout(cond, 1, exit=Point(x, x, torch.ones(n), torch.zeros(n).long()))
    notes = {}
    batch = Batch(("a", "b", "c"), cond, cond, real)
    view = View({}, RectifiedFlow(), batch, 0.0, torch.Generator(), rollout, latent_reward=ConvLatentReward(2, text_width=32))
    out = LatentFit(others=True).prepare(view, score, notes.__setitem__)
    assert asked == [["a", "b", "c", "b", "c", "a", "a", "b", "c"]]
    expected = torch.tensor([0.0, 1, 2, 0, 1, 2, 10, 10, 10])
    assert torch.allclose(out.labels.target, (expected - expected.mean()) / expected.std(correction=0))
    assert torch.equal(out.labels.cond.text[3], cond.text[1]) and torch.equal(out.labels.cond.text[6], cond.text[0])
    assert float(notes["reward/train"]) == 1 and set(notes) == {"reward/train", "latent_reward/error", "latent_reward/correlation"}
    loss = next(LatentFit().losses(out))
    assert torch.allclose(loss, (out.latent_reward.rate(out.labels.x, out.labels.cond) - out.labels.target).square().mean())


def test_others_are_other_prompts_in_groups_and_ensembles_and_a_lone_prompt_has_none():
    asked = []

    def score(x, prompts):
        asked.append(list(prompts))
        return torch.arange(len(x)).float()

    x = torch.randn(4, 2, 16, 16)
    cond = text(2).repeat(2)
    made = Rollout(cond, 2, exit=Point(x, x, torch.ones(4), torch.zeros(4)))
    view = View({}, RectifiedFlow(), Batch(("a", "b"), text(2), text(2)), 0.0, torch.Generator(), made, latent_reward=ConvLatentReward(2, text_width=32))
    out = LatentFit(others=True, real=False).prepare(view, score, lambda name, value: None)
    assert asked[-1] == ["a", "a", "b", "b", "b", "b", "a", "a"] and torch.equal(out.labels.cond.text[4], cond.text[2])
    one = Rollout(text(1), 1, exit=Point(x[:1], x[:1], torch.ones(1), torch.zeros(1)))
    alone = replace(view, batch=Batch(("a",), text(1), text(1)), rollout=one)
    notes = {}
    LatentFit(others=True, real=False).prepare(alone, score, notes.__setitem__)
    assert asked[-1] == ["a"] and "latent_reward/correlation" not in notes
    both = labels(["0", "1", "0", "1"], torch.tensor([0, 0, 1, 1]))
    assert both.rolled(1).label.tolist() == [1, 0, 1, 0] and both.rolled(1).member.tolist() == [0, 0, 1, 1]


# ---------------------------------------------------------------------------------------------------------------- recipe


def test_what_the_recipe_asks_for():
    whole = dollar(Common(steps=2))
    assert [stage.name for stage in whole.stages] == ["fit", "dollar"] and whole.stages[0].terms == ()
    assert whole.needs == {"real", "labels", "latent_reward"} and whole.latent_reward is not None
    assert dollar(weight=0).latent_reward is None and dollar(weight=0).needs == {"real"}
    assert dollar(weight=0, cd=0).needs == frozenset(), "VSD alone is DMD2 without a discriminator"
    assert dollar(weight=0, matching=0).stages[0].rollout is None, "consistency distillation rolls nothing out"
    assert "average" in dollar(target="average").roles and "average" not in dollar().roles
    with pytest.raises(ValueError, match="ema: None"):
        dollar(Common(ema=None), target="average")
    with pytest.raises(ValueError, match="nothing would be trained"):
        dollar(matching=0, cd=0, weight=0)
    with pytest.raises(ValueError, match="cd: -1 is not allowed"):
        dollar(cd=-1)
    with pytest.raises(ValueError, match="latent_reward_updates: 0"):
        dollar(latent_reward_updates=0)
    assert dollar(weight=0, latent_reward_updates=0).latent_reward is None and "fake" not in dollar(weight=0, matching=0).roles
    assert dollar(prediction_type="x0").roles["student"].prediction_type == "x0"


def test_eps_is_read_on_both_paths():
    """`eps_of_x0` after a DDIM step is the same noise: nothing is lost along a trajectory."""
    path, t, s = VariancePreserving.linear(), torch.tensor([0.9], dtype=F64), torch.tensor([0.4], dtype=F64)
    x0, x_t = torch.randn(1, 4, dtype=F64), torch.randn(1, 4, dtype=F64)
    moved, _ = Deterministic().gaussian(path, x0, x_t, t, s)
    assert torch.allclose(eps_of_x0(path, moved, s, x0), eps_of_x0(path, x_t, t, x0))
