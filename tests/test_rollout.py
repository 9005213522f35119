"""Rollouts: the samples of a straightforward loop, and calls whose number and rows do not depend on the exits."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from instep.diffusion import noise, rollout
from instep.diffusion.path import RectifiedFlow
from instep.diffusion.prediction import Prediction
from instep.diffusion.rollout import draw_exits, rollout_few_step
from instep.diffusion.streams import SampleStreams
from instep.diffusion.transitions import CPS, Deterministic, Renoise
from instep.lab.mixture import labels
from instep.methods.recipe import RolloutConfig
from instep.recipes.dm_align import dm_align_group

F64 = torch.float64
PATH = RectifiedFlow()
LEVELS = (1.0, 0.9, 0.75, 0.5)
LIVE = [frozenset(), frozenset({"exit"}), frozenset({"final"}), frozenset({"exit", "final"})]


class Student(nn.Module):
    """A small nonlinear network of x_t and t in float64; notes the rows of each call, and whether it had a graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8, dtype=F64), nn.Linear(8, 3, dtype=F64)
        self.calls: list[tuple[int, bool]] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: object) -> Prediction:
        self.calls.append((len(x_t), torch.is_grad_enabled()))
        x0 = self.second(torch.tanh(self.first(torch.cat([x_t, t[:, None].to(x_t)], 1))))
        return Prediction(x0, x0)


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    monkeypatch.setattr(rollout, "randn", lambda shape, rng, device, dtype=F64: noise.randn(shape, rng, device, F64))


def rng(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(student: Student, exit_id: Tensor, **options):
    n = len(exit_id)
    return rollout_few_step(student, labels(["0"] * n), LEVELS, PATH, (3,), exit_id, rng(), **options)


def straightforward(student: Student, exit_id: Tensor, transition, through: int = 1) -> tuple[Tensor, Tensor]:
    """Exits and final samples, every sample predicted at every level with a graph."""
    generator, n = rng(), len(exit_id)
    x = torch.randn(n, 3, generator=generator, dtype=F64)
    each = []
    for j, level in enumerate(LEVELS):
        t = torch.full((n,), level, dtype=F64)
        own, reached = student(x.detach(), t, None).x0, j >= len(LEVELS) - through
        x0 = student(x, t, None).x0 if reached else own.detach()
        each.append(own)
        if j == len(LEVELS) - 1:
            return torch.stack(each)[exit_id, torch.arange(n)], x0
        fresh = torch.randn(n, 3, generator=generator, dtype=F64)
        x = transition.step(PATH, x0, x, fresh, t, torch.full((n,), LEVELS[j + 1], dtype=F64))
    raise AssertionError


def gradient(x: Tensor, student: Student) -> Tensor:
    weights = torch.arange(x.numel(), dtype=F64).reshape(x.shape).sin()
    return torch.cat([g.flatten() for g in torch.autograd.grad((weights * x).sum(), list(student.parameters()), retain_graph=True)])


@pytest.mark.parametrize("n_groups", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("live", LIVE, ids=["none", "exit", "final", "both"])
@pytest.mark.parametrize(("to_the_end", "through"), [(False, 1), (True, 1), (True, 2), (True, 4)])
@pytest.mark.parametrize("transition", [Renoise(), CPS()], ids=["renoise", "cps"])
def test_samples_and_gradients_are_those_of_a_straightforward_loop(n_groups, live, to_the_end, through, transition):
    student = Student()
    live = live if to_the_end else live - {"final"}
    for seed in range(4):
        exit_id = draw_exits(n_groups, 2, len(LEVELS), rng(seed))
        ours = made(student, exit_id, group=2, live=live, to_the_end=to_the_end, through=through, transition=transition)
        ends = dict(zip(("exit", "final"), straightforward(student, exit_id, transition, through if "final" in live else 1), strict=True))
        for where in ("exit", "final") if to_the_end else ("exit",):
            x = ours.point(where).x
            torch.testing.assert_close(x, ends[where], rtol=0, atol=1e-12)
            assert where in live or not x.requires_grad
            if where in live:
                torch.testing.assert_close(gradient(x, student), gradient(ends[where], student), rtol=0, atol=1e-12)


def test_predicting_a_point_again_from_its_input_gives_it_again():
    student, exit_id = Student(), draw_exits(4, 2, len(LEVELS), rng(1))
    for to_the_end in (False, True):
        ours = made(student, exit_id, group=2, live=frozenset({"exit"}), to_the_end=to_the_end)
        for point in (ours.exit, ours.final) if to_the_end else (ours.exit,):
            torch.testing.assert_close(point.predicted_again(student, labels(["0"] * 8)).x, point.x, rtol=0, atol=1e-12)


def calls(exit_id: Tensor, **options) -> list[tuple[int, bool]]:
    student = Student()
    made(student, exit_id, **options)
    return student.calls


@pytest.mark.parametrize("live", LIVE, ids=["none", "exit", "final", "both"])
@pytest.mark.parametrize(("to_the_end", "through"), [(False, 1), (True, 1), (True, 4)])
@pytest.mark.parametrize("n_groups", [1, 2, 3, 4, 5, 8])
def test_calls_and_their_rows_are_the_same_whatever_exits_are_drawn(n_groups, live, to_the_end, through):
    """Those of a sharded network are collectives: every process must make the same ones. At most one call has rows of several levels."""
    draws = {tuple(draw_exits(n_groups, 2, len(LEVELS), rng(seed)).tolist()) for seed in range(40)}
    assert len(draws) > 3
    live = live if to_the_end else live - {"final"}
    seen = {tuple(calls(torch.tensor(exits), group=2, live=live, to_the_end=to_the_end, through=through, same_calls=1)) for exits in draws}
    assert len(seen) == 1
    ((*made_,),) = seen
    if live == {"exit"}:
        assert [rows for rows, graph in made_ if graph] == [2 * n_groups]


@pytest.mark.parametrize("to_the_end", [False, True])
@pytest.mark.parametrize(("shares", "n_groups"), [(2, 1), (2, 2), (2, 3), (4, 1), (8, 1), (8, 4)])
def test_every_share_of_a_batch_makes_the_same_calls(shares, n_groups, to_the_end):
    """Exits are stratified over the whole batch, so that one share of it may have the same exit in all of its groups."""
    seen = set()
    for seed in range(20):
        for exits in draw_exits(n_groups * shares, 2, len(LEVELS), rng(seed)).chunk(shares):
            seen.add(tuple(calls(exits, group=2, live=frozenset({"exit"}), to_the_end=to_the_end, same_calls=shares)))
    assert len(seen) == 1


def test_the_number_of_calls_is_the_same_even_for_exits_that_no_draw_gives():
    """Exits of two groups that are not stratified."""
    seen = {len(calls(torch.tensor(exits), live=frozenset({"exit"}), same_calls=1)) for exits in product(range(len(LEVELS)), repeat=2)}
    assert seen == {len(LEVELS)}


def test_no_sample_is_evaluated_beyond_its_exit_unless_calls_must_be_the_same():
    for exits in product(range(len(LEVELS)), repeat=2):
        made_ = calls(torch.tensor(exits), live=frozenset({"exit"}))
        assert sum(rows for rows, _ in made_) == sum(exits) + 2 and made_[-1] == (2, True)


def test_samples_leave_the_batch_at_their_exit():
    exit_id = draw_exits(8, 2, len(LEVELS), rng())
    assert calls(exit_id, group=2, live=frozenset({"exit"})) == [(12, False), (8, False), (4, False), (16, True)]
    to_the_end = calls(exit_id, group=2, live=frozenset({"exit"}), to_the_end=True)
    assert to_the_end == [(12, False), (8, False), (4, False), (16, True), (4, False), (8, False), (12, False)]
    assert calls(exit_id, group=2, to_the_end=True) == [(16, False)] * 4, "without a graph one call a level"


def test_no_level_beyond_the_last_possible_exit_is_reached():
    """A micro-batch of the upper expert: its exits are among the first two levels, and nothing below them is evaluated."""
    for seed in range(4):
        exit_id = draw_exits(1, 2, 2, rng(seed))
        assert calls(exit_id, group=2, exits=range(2), live=frozenset({"exit"}), same_calls=1) == [(2, False), (2, True)]
        low = calls(exit_id + 2, group=2, exits=range(2, 4), live=frozenset({"exit"}), same_calls=1)
        assert low == [(2, False)] * 3 + [(2, True)]


@pytest.mark.parametrize("shared", [0.0, 0.3, 0.9, 1.0])
def test_initial_noise_is_normal_and_correlated_within_a_group_alone(shared):
    x = rollout.group_noise(30_000, 3, shared, (2,), rng(), "cpu").reshape(10_000, 3, 2)
    assert x.var().item() == pytest.approx(1, abs=0.02)
    within, across = ((x[:, 0] * x[:, 1]).mean().item(), (x[1:, 0] * x[:-1, 1]).mean().item())
    assert within == pytest.approx(shared, abs=0.03) and across == pytest.approx(0, abs=0.03)


def test_parts_of_a_batch_draw_the_groups_that_the_whole_draws():
    whole = rollout.group_noise(8, 2, 0.9, (3,), SampleStreams(5, 0, rng()), "cpu")
    halves = [rollout.group_noise(4, 2, 0.9, (3,), SampleStreams(5, part, rng()), "cpu") for part in range(2)]
    assert torch.equal(whole, torch.cat(halves))


def test_a_group_that_shares_its_noise_differs_from_the_second_step_on():
    """The first predictions of a group are one; the final samples are not. Without sharing, all differ."""
    for shared, alike in ((1.0, True), (0.0, False)):
        first = made(Student(), torch.zeros(6, dtype=torch.long), group=3, shared_noise=shared, to_the_end=True)
        assert first.exit is not None and first.final is not None
        assert torch.equal(first.exit.x[0], first.exit.x[1]) == alike and not torch.equal(first.exit.x[2], first.exit.x[3])
        assert not torch.equal(first.final.x[0], first.final.x[1])


def test_sharing_all_noise_needs_noise_between_steps():
    with pytest.raises(ValueError, match="shared_noise: 1 is not allowed for a student of one step"):
        RolloutConfig((1.0,), shared_noise=1.0)
    with pytest.raises(ValueError, match="shared_noise: 1 is not allowed"):
        RolloutConfig(LEVELS, transition=Deterministic(), shared_noise=1.0)
    with pytest.raises(ValueError, match="shared_noise: 1.5 is not allowed; it is 0 or more and at most 1"):
        dm_align_group(shared_noise=1.5)
    assert dm_align_group(shared_noise=0.9).stages[-1].rollout.shared_noise == 0.9
    assert dm_align_group(shared_noise=0.9).stages[0].rollout.shared_noise == 0.0, "matching alone compares nothing"
