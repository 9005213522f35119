"""Where the papers leave something open, or are read differently from their letter: what was decided (docs/errata.md)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from instep.diffusion.advantage import group_advantage
from instep.diffusion.path import RectifiedFlow
from instep.diffusion.prediction import score_of_x0
from instep.diffusion.rollout import draw_exits, rollout_few_step
from instep.lab.mixture import ExactTeacher, Mixture, labels
from instep.lab.networks import VelocityMLP
from instep.methods.align import AlignGroup, align_direction, group_factor
from instep.methods.critics import FakeScoreLoss, denoising_error
from instep.methods.matching import DistributionMatching
from instep.methods.recipe import RolloutConfig, Stage
from instep.methods.role_config import AdamWConfig
from instep.methods.term import Batch, View
from instep.training.state import TrainedParams, TrainState
from instep.training.step import iteration

PATH = RectifiedFlow()
LEVELS = (1.0, 0.75, 0.5, 0.25)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_difference_of_scores_pushes_away_from_the_preferred_sample():
    """Eq. 6 to the letter, with the exact score: away from x_plus; the difference of denoised estimates: toward it."""
    ring = Mixture.ring()
    teacher, n = ExactTeacher(ring, PATH), 2000
    cond = labels([""] * n)
    x, plus, noise = ring.sample(cond.label, rng(1)), ring.sample(cond.label, rng(2)), torch.randn(n, 2, generator=rng(3))
    for level in (0.2, 0.5, 0.8):
        t = torch.full((n,), level)
        x_t, plus_t = PATH.renoise(x, noise, t), PATH.renoise(plus, noise, t)
        own, other = teacher(x_t, t, cond).x0, teacher(plus_t, t, cond).x0
        literal = -(score_of_x0(PATH, plus_t, t, other) - score_of_x0(PATH, x_t, t, own))
        # a force is descended: the sample moves along its negative
        toward = lambda force: float((-force * (plus - x)).sum(1).mean())  # noqa: E731
        assert toward(literal) < 0 < toward(align_direction(x, own, other))


def test_a_group_shares_its_exit_and_a_batch_sees_all_of_them():
    """Uniform for every group, one for its members, spread as evenly over a batch as can be."""
    seen = torch.zeros(6, 4)
    generator = rng()
    for _ in range(400):
        exits = draw_exits(6, 3, 4, generator).reshape(6, 3)
        assert (exits == exits[:, :1]).all()
        counts = torch.bincount(exits[:, 0], minlength=4)
        assert counts.min() == 1 and counts.max() == 2
        seen += torch.nn.functional.one_hot(exits[:, 0], 4)
    assert (seen / 400 - 0.25).abs().max() < 0.1, "no group has a favourite exit"


class Watched:
    """A student x0 = theta[level] * x_t: its gradient tells which steps the graph reaches."""

    def __init__(self) -> None:
        self.theta = torch.full((4,), 0.5, requires_grad=True)

    def __call__(self, x_t: Tensor, t: Tensor, cond):
        from instep.diffusion.prediction import Prediction

        index = [LEVELS.index(float(level)) for level in t]
        x0 = self.theta[index][:, None] * x_t
        return Prediction(x0, x0)


def reached(**options) -> list[bool]:
    student = Watched()
    made = rollout_few_step(student, labels(["0"] * 8), LEVELS, PATH, (2,), draw_exits(8, 1, 4, rng()), rng(), to_the_end=True, **options)
    (made.final.x if "final" in options["live"] else made.exit.x).square().sum().backward()
    return (student.theta.grad != 0).tolist()


def test_how_far_the_gradient_of_the_final_sample_reaches():
    """The paper writes dG/dtheta: the last step by default, several or all on demand; an exit's is always its own step alone."""
    assert reached(live=frozenset({"final"})) == [False, False, False, True]
    assert reached(live=frozenset({"final"}), through=2) == [False, False, True, True]
    assert reached(live=frozenset({"final"}), through=4) == [True, True, True, True]
    student = Watched()
    exits = torch.full((8,), 1)
    rollout_few_step(student, labels(["0"] * 8), LEVELS, PATH, (2,), exits, rng(), live=frozenset({"exit"})).exit.x.square().sum().backward()
    assert (student.theta.grad != 0).tolist() == [False, True, False, False]


def state() -> TrainState:
    torch.manual_seed(0)
    student, fake = VelocityMLP(PATH), VelocityMLP(PATH)
    trained = {name: TrainedParams(dict(net.named_parameters()), AdamWConfig(1e-3)) for name, net in (("student", student), ("fake", fake))}
    return TrainState({"student": student, "fake": fake, "teacher": ExactTeacher(Mixture.ring(), PATH)}, trained, PATH, (2,), rng())


def test_critics_follow_the_student_on_its_own_samples():
    """Algorithm 1: the student is updated first (line 15), then the fake N times on the same detached x with fresh noise (16 to 21)."""
    for reuse in (True, False):
        made, order, seen = state(), [], []
        for name, trained in made.trained.items():
            trained.step = lambda lr, optim, name=name, order=order: (order.append(name), (torch.tensor(0.0), torch.tensor(True)))[1]

        class Spy(FakeScoreLoss):
            def losses(self, view: View, seen=seen):
                point = view.samples.point("exit")
                seen.append(point.x)
                assert not point.x.requires_grad
                yield from super().losses(view)

        stage = Stage("s", 1, 8, (DistributionMatching(),), (Spy(updates=5, reuse=reuse),), RolloutConfig(LEVELS))
        names = ("0",) * 8
        iteration(made, stage, [Batch(names, labels(names), labels([""] * 8))], 0.0)
        assert order == ["student"] + ["fake"] * 5
        assert all(torch.equal(x, seen[0]) for x in seen) is reuse


def test_velocity_error_is_the_papers_error_weighed_by_level():
    """Eq. 4 prints |mu - x0|^2; the velocity error of a flow model is that divided by t^2."""
    x0, noise = torch.randn(2, 6, 2, generator=rng(), dtype=torch.float64)
    net, t = VelocityMLP(PATH).double(), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    names = ("0",) * 6
    view = View({}, PATH, Batch(names, labels(names), labels([""] * 6)), 0.0, rng())
    error = {kind: denoising_error(net, view, x0, t, noise, labels(names), kind) for kind in ("velocity", "x0")}
    torch.testing.assert_close(error["velocity"], error["x0"] / t.square())


def test_a_group_of_equal_rewards_feels_no_alignment():
    made = replace(state(), reward_fn=lambda x, names: torch.zeros(len(x)))
    stage = Stage("s", 1, 8, (AlignGroup(),), (), RolloutConfig(LEVELS), group=4)
    log = iteration(made, stage, [Batch(("0", "1"), labels(["0", "1"]), labels(["", ""]))], 0.0)
    assert log["reward/constant_groups"] == 1 and log["force/group/norm"] == 0 and log["grad/student"] == 0


def test_what_a_group_shares_cancels_when_signed():
    """A direction that every sample of a group feels alike, such as toward a paler image, sums to nothing; pull-only keeps it."""
    advantage = group_advantage(torch.randn(24, generator=rng()), 8)
    shared = {sign: group_factor(advantage, sign).reshape(3, 8).sum(1) for sign in ("signed", "pull")}
    torch.testing.assert_close(shared["signed"], torch.zeros(3), rtol=0, atol=1e-5)
    assert (shared["pull"] > 1).all()


def test_predictions_in_half_precision_are_subtracted_in_float32():
    """A bfloat16 network's last digit is still there in the difference of two estimates, which bfloat16 estimates would lose."""
    from instep.diffusion.prediction import to_prediction

    class Half:
        def __init__(self, v: float) -> None:
            self.v = v

        def __call__(self, x_t, t, cond):
            return to_prediction("velocity", torch.full_like(x_t, self.v).bfloat16(), PATH, x_t, t)

    made = state()
    names = ("0",) * 4
    view = View({"teacher": Half(0.5), "fake": Half(0.50390625)}, PATH, Batch(names, labels(names), labels([""] * 4)), 0.0, rng())
    rollout = rollout_few_step(made.roles["student"], labels(names), LEVELS, PATH, (2,), torch.zeros(4, dtype=torch.long), rng())
    seen = DistributionMatching().explain(view.with_rollout(rollout))
    torch.testing.assert_close(seen.fake - seen.real, -seen.level[:, None] * (0.50390625 - 0.5) * torch.ones(4, 2), rtol=1e-3, atol=1e-6)


def test_the_alignment_force_explodes_at_low_levels_in_its_own_units():
    """Two samples of one prompt that lie apart: divided by the distance to its own estimate the pull grows without bound as t falls, and by the
    distance to the target it never exceeds a mean of one by much."""
    ring = Mixture.ring()
    teacher, n = ExactTeacher(ring, PATH), 1000
    cond = labels([""] * n)
    x, plus, noise = ring.sample(cond.label, rng(1)), ring.sample(cond.label, rng(2)), torch.randn(n, 2, generator=rng(3))

    def pull(level: float, normaliser: str = "own") -> float:
        t = torch.full((n,), level)
        own, other = (teacher(PATH.renoise(y, noise, t), t, cond).x0 for y in (x, plus))
        return float(align_direction(x, own, other, normaliser).abs().mean())

    assert pull(0.05) > 4 * pull(0.5) > 4 * pull(0.9)
    assert pull(0.9) < 1
    assert max(pull(level, "target") for level in (0.05, 0.5, 0.9)) < 1.5
