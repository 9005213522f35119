"""Random numbers of samples: alike however the samples are shared among processes and micro-batches, and distributed as they should be."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from instep.diffusion.bands import draw_in_band
from instep.diffusion.level_windows import HighLow, NearTrajectory
from instep.diffusion.levels import AboveExit, AnnealedBeta, OneOf, Uniform
from instep.diffusion.noise import beta, copy_of, rand, randint, randn
from instep.diffusion.streams import CHUNK, SampleStreams

KEY = 2**63 - 25


def streams(part: int = 0, key: int = KEY) -> SampleStreams:
    return SampleStreams(key, part, torch.Generator().manual_seed(1))


def draws(rng, n: int) -> list[torch.Tensor]:
    """A draw of every kind, of n samples: they are made in one order."""
    now = {"progress": 0.3, "t_exit": torch.full((n,), 0.9)}
    samplers = (Uniform(), OneOf((1.0, 0.5)), AboveExit(), AnnealedBeta(), NearTrajectory(), HighLow())
    levels = [draw_in_band(lambda own, s=s: s(n, rng=own, **now), (0.875, 1.0), rng) for s in samplers]
    return [randn((n, 3, 5), rng, "cpu"), rand((n, 2), rng), randint(7, n, rng), *levels, rand((n // 2,), rng)]


@pytest.mark.parametrize("parts", [2, 4])
def test_a_sample_draws_the_same_in_any_part(parts):
    whole, shares = draws(streams(), 16), [draws(streams(part), 16 // parts) for part in range(parts)]
    for one, *several in zip(whole, *shares, strict=True):
        assert torch.equal(one, torch.cat(several))


def test_draws_keys_and_samples_are_independent():
    rng = streams()
    once, again, other = randn((1000, 50), rng, "cpu"), randn((1000, 50), rng, "cpu"), randn((1000, 50), streams(key=KEY - 1), "cpu")
    inner = rng.branch()
    for x in (again, other, once.roll(1, 0), once.roll(1, 1), randn((1000, 50), inner, "cpu"), randn((1000, 50), inner, "cpu")):
        assert abs(float((once * x).mean())) < 0.025  # five and a half standard errors


def test_a_copy_draws_again_and_rows_of_any_length_are_filled():
    rng = streams()
    rand((4,), rng)
    ahead = copy_of(rng)
    assert torch.equal(randn((4, 3), ahead, "cpu"), randn((4, 3), rng, "cpu"))
    long = randn((2, CHUNK + 3), streams(), "cpu")
    assert torch.equal(long[1:], randn((1, CHUNK + 3), streams(1), "cpu")) and float(long.std()) == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("shape", [(4.0, 1.5), (1.0, 1.0)])
def test_numbers_follow_their_distributions(shape):
    n = 20_000
    assert stats.kstest(beta(*shape, n, streams()).double(), stats.beta(*shape).cdf).pvalue > 1e-3
    assert stats.kstest(randn((n,), streams(), "cpu").double(), stats.norm.cdf).pvalue > 1e-3
    assert stats.kstest(rand((n,), streams()).double(), stats.uniform.cdf).pvalue > 1e-3
    assert stats.chisquare(torch.bincount(randint(6, n, streams()), minlength=6)).pvalue > 1e-3
    paired = randn((n // 2, 2), streams(), "cpu").double()
    assert stats.kstest(paired.square().sum(1), stats.chi2(2).cdf).pvalue > 1e-3
