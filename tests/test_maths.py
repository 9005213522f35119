"""Formulas against closed forms or a second derivation, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from instep.diffusion.advantage import constant_groups, group_advantage, group_variance, top_n
from instep.diffusion.guidance import guide, predict_guided
from instep.diffusion.levels import Uniform, check_levels, few_step_levels, shift_level
from instep.diffusion.path import Path, RectifiedFlow, VariancePreserving
from instep.diffusion.prediction import Condition, eps_of_x0, score_of_x0, to_prediction, velocity_of_x0, x0_of_velocity
from instep.diffusion.sampling import sample_ode
from instep.diffusion.transitions import Renoise
from instep.lab.mixture import ExactTeacher, LabelCondition, Mixture, labels

PATHS = [RectifiedFlow(), VariancePreserving.linear(), VariancePreserving.scaled_linear(), VariancePreserving.cosine()]
F64 = torch.float64


def batch(n: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, n, 3, 4, generator=rng, dtype=F64)
    return x0, eps, torch.linspace(0.05, 0.95, n, dtype=F64)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_every_parameterisation_gives_the_same_prediction(path: Path) -> None:
    """The exact x0, eps, velocity and v-prediction of one noised sample all read as that sample."""
    x0, eps, t = batch()
    x_t = path.renoise(x0, eps, t)
    a, b = path.a(t)[:, None, None], path.b(t)[:, None, None]
    raws = {"x0": x0, "eps": eps, "velocity": eps - x0, "v_prediction": a * eps - b * x0}
    tolerance = 1e-9 if isinstance(path, RectifiedFlow) else 1e-7  # eps divides by a, which is .005 at the noisy end of a DDPM path
    for kind, raw in raws.items():
        got = to_prediction(kind, raw, path, x_t, t)
        torch.testing.assert_close(got.x0, x0, rtol=0, atol=tolerance)
        torch.testing.assert_close(got.v, eps - x0, rtol=0, atol=tolerance)
        assert got.x0.dtype == F64
    torch.testing.assert_close(x0_of_velocity(path, x_t, t, velocity_of_x0(path, x_t, t, x0)), x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(eps_of_x0(path, x_t, t, x0), eps, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="prediction_type: 'noise'"):
        to_prediction("noise", eps, path, x_t, t)


def test_half_precision_is_read_in_float32() -> None:
    x = torch.randn(2, 3).bfloat16()
    got = to_prediction("velocity", x, RectifiedFlow(), x, torch.tensor([0.5, 0.7], dtype=torch.bfloat16))
    assert got.x0.dtype == got.v.dtype == torch.float32


@pytest.mark.parametrize("path", PATHS[1:], ids=lambda p: str(len(p.betas)) + str(p.betas[0])[:6])
def test_variance_preserving_table(path: VariancePreserving) -> None:
    """Level k / N has the product of the first k (1 - beta); a^2 + b^2 = 1; t = 0 is clean."""
    t = torch.tensor([0.0, 0.001, 0.25, 0.5, 1.0], dtype=F64)
    bar = torch.cat([torch.ones(1, dtype=F64), (1 - torch.tensor(path.betas, dtype=F64)).cumprod(0)])
    torch.testing.assert_close(path.a(t).square(), bar[[0, 1, 250, 500, 1000]], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(path.a(t).square() + path.b(t).square(), torch.ones(5, dtype=F64))
    with pytest.raises(ValueError, match="betas"):
        VariancePreserving((0.1, 1.5))


@pytest.mark.parametrize("path", PATHS[:2], ids=lambda p: type(p).__name__)
def test_exact_teacher_is_tweedie(path: Path) -> None:
    """The mixture's x0 gives the score that autograd finds in its log-density, conditional and not."""
    ring = Mixture.ring()
    ring = Mixture(ring.means.double(), ring.sigma, ring.classes)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(30, 2, generator=rng, dtype=F64).requires_grad_()
    t = torch.linspace(0.1, 0.95, 30, dtype=F64)
    label = torch.arange(30) % 3 - 1
    (score,) = torch.autograd.grad(ring.log_density(path, x, t, label).sum(), x)
    x0 = ExactTeacher(ring, path)(x.detach(), t, LabelCondition(label=label)).x0
    torch.testing.assert_close(score_of_x0(path, x.detach(), t, x0), score, rtol=1e-8, atol=1e-8)


def test_guidance_in_one_call() -> None:
    ring = Mixture.ring()
    teacher, seen = ExactTeacher(ring, RectifiedFlow()), []

    def counting(x_t, t, cond):
        seen.append(len(x_t))
        return teacher(x_t, t, cond)

    x, t = torch.randn(5, 2), torch.full((5,), 0.6)
    cond, null = labels(["0", "1", "0", "1", "0"]), labels([""] * 5)
    got = predict_guided(counting, x, t, cond, null, 3.0)
    c, u = teacher(x, t, cond).x0, teacher(x, t, null).x0
    torch.testing.assert_close(got.x0, u + 3 * (c - u))
    assert seen == [10], "conditional and unconditional are one stacked call"
    assert torch.equal(predict_guided(counting, x, t, cond, null, 1.0).x0, c) and seen == [10, 5]
    assert torch.equal(guide(c, u, 1.0), u + (c - u))


def test_levels() -> None:
    assert few_step_levels(4, 5.0) == (1.0, 0.9375, 0.8333333, 0.625)  # the published Wan list
    assert few_step_levels(1, 3.0) == (1.0,)
    torch.testing.assert_close(shift_level(torch.tensor([0.0, 0.5, 1.0]), 3.0), torch.tensor([0.0, 0.75, 1.0]))
    for wrong in ([], [0.9, 0.5], [1.0, 1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="levels"):
            check_levels(wrong)
    rng = torch.Generator().manual_seed(0)
    plain = Uniform()(20000, progress=0, t_exit=None, rng=rng)
    assert plain.min() >= 0.02 and plain.max() <= 0.98 and abs(float(plain.mean()) - 0.5) < 0.01
    shifted = Uniform(shift=5.0)(20000, progress=0, t_exit=None, rng=rng)
    # median of a shifted uniform is shift_level(1/2) = 5/6
    assert abs(float(shifted.median()) - 5 / 6) < 0.01 and shifted.max() <= 0.98
    with pytest.raises(ValueError, match="low, high"):
        Uniform(low=0.5, high=0.2)


def test_advantage() -> None:
    reward = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0], dtype=F64)
    a = group_advantage(reward, 4)
    deviation = math.sqrt((4 + 1 + 0 + 9) / 4)
    torch.testing.assert_close(a[:4], torch.tensor([-2.0, -1.0, 0.0, 3.0], dtype=F64) / deviation, rtol=1e-5, atol=1e-5)
    assert a[4:].abs().max() == 0, "equal rewards say nothing"
    assert constant_groups(reward, 4) == 1
    assert group_advantage(reward, 4, clip=1.0).max() == 1
    # a group of equal rewards that differ by rounding must not saturate
    assert group_advantage(torch.tensor([0.1, 0.1 + 1e-9, 0.1, 0.1], dtype=F64), 4, clip=1.0).abs().max() == 0
    assert top_n(reward, 4, 2).tolist() == [[3, 2], [4, 5]]
    with pytest.raises(ValueError, match="group: 3"):
        group_advantage(reward, 3)
    with pytest.raises(ValueError, match="top_n: 5"):
        top_n(reward, 4, 5)


def test_a_shared_deviation_keeps_quiet_groups_quiet() -> None:
    """One group with a failure, one whose samples differ by a hundredth: with one deviation for both, the second says little."""
    reward = torch.tensor([0.0, 0.0, 0.0, -4.0, 0.01, 0.0, 0.0, -0.01], dtype=F64)
    own = group_advantage(reward, 4)
    assert own[4:].abs().max() > 1.2, "divided by its own deviation it is as loud as the other"
    deviation = group_variance(reward, 4) ** 0.5
    assert deviation == pytest.approx(math.sqrt((3.0 + 0.00005) / 2))
    shared = group_advantage(reward, 4, deviation=deviation)
    torch.testing.assert_close(shared, torch.tensor([1.0, 1.0, 1.0, -3.0, 0.01, 0.0, 0.0, -0.01], dtype=F64) / deviation, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS[:2], ids=lambda p: type(p).__name__)
def test_renoise_policy_is_the_normal_density(path: Path) -> None:
    x0, eps, t = batch()
    x_next = path.renoise(x0, eps, t)
    a, b = path.a(t)[:, None, None], path.b(t)[:, None, None]
    normal = torch.distributions.Normal(a * x0, b.expand_as(x0))
    torch.testing.assert_close(Renoise().log_prob(path, x0, x0, x_next, t, t), normal.log_prob(x_next).mean((1, 2)))


@pytest.mark.parametrize("path", PATHS[:2], ids=lambda p: type(p).__name__)
def test_ode_sampler_transports_a_gaussian(path: Path) -> None:
    """For one Gaussian the probability flow is x -> mean + x sigma' / sigma: the many-step sampler ends on the closed form."""
    one = Mixture(torch.tensor([[1.0, -2.0]], dtype=F64), 0.5, torch.zeros(1, dtype=torch.long))
    noise = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    cond = labels([""] * 50)
    x = sample_ode(ExactTeacher(one, path), cond, cond, noise, steps=1000, path=path)
    start = (noise - path.a(torch.ones(1, dtype=F64)) * one.means) / (
        path.a(torch.ones(1, dtype=F64)) ** 2 * 0.25 + path.b(torch.ones(1, dtype=F64)) ** 2
    ).sqrt()
    torch.testing.assert_close(x, one.means + 0.5 * start, rtol=0, atol=8e-3)


def test_condition_rows_and_stacking() -> None:
    cond = LabelCondition(label=torch.arange(3))
    assert cond.repeat(2).label.tolist() == [0, 0, 1, 1, 2, 2] and len(cond) == 3
    assert cond[torch.tensor([2, 0])].label.tolist() == [2, 0]
    told = cond.at_exit(torch.tensor([1, 2, 3]))
    assert told[slice(1, 2)].exit_id.tolist() == [2]
    assert told.stack(told).exit_id.tolist() == [1, 2, 3, 1, 2, 3]
    assert told.stack(cond).exit_id is None, "the teacher's batch has no exit"
    assert len(Condition(exit_id=torch.zeros(4))) == 4
