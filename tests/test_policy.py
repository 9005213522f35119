"""DMDR's parts: policy gradients on the few-step student, reward-tilted forces, annealed levels, the adapted teacher."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_family import AnyLevel, direction
from test_forces import F64, Linear, view
from test_skeletons import batch_of, mlp_state, prompts

from instep.diffusion.levels import AnnealedBeta, Uniform
from instep.diffusion.path import RectifiedFlow, VariancePreserving
from instep.diffusion.prediction import Prediction
from instep.diffusion.rollout import Trajectory
from instep.diffusion.transitions import Renoise
from instep.lab.mixture import LabelCondition
from instep.lab.run import common, ensemble_state, train, train_particles
from instep.lab.world import World, flow_start
from instep.methods.matching import DistributionMatching
from instep.methods.operators import Displacements, RewardTilted, relative
from instep.methods.policy import DDPO, GRPO, surrogate
from instep.methods.recipe import RolloutConfig, Stage
from instep.recipes.after import rl_after
from instep.recipes.common import Common
from instep.recipes.dmdr import dmdr
from instep.training.step import iteration

LEVELS = (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize("path", [RectifiedFlow(), VariancePreserving.linear()])
def test_log_probability_is_the_normals(path):
    """Against torch.distributions in float64; the library's is the mean over elements."""
    rng = torch.Generator().manual_seed(0)
    x0, t = torch.randn(5, 3, 2, generator=rng, dtype=F64), torch.linspace(0.2, 0.9, 5, dtype=F64)
    x_next = torch.randn(5, 3, 2, generator=rng, dtype=F64)
    a, b = path.a(t)[:, None, None], path.b(t)[:, None, None]
    expected = torch.distributions.Normal(a * x0, b).log_prob(x_next).flatten(1).mean(1)
    torch.testing.assert_close(Renoise().log_prob(path, x0, x0, x_next, t, t), expected)


def test_surrogate_by_hand():
    ratio, advantage = torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    # up to the clip where the sample is good, beyond it where it is bad: -min(r A, clip(r) A)
    torch.testing.assert_close(surrogate(ratio, advantage, 0.2), torch.tensor([-1.2, 1.5, -0.5, 0.8]))


def policy_state(objective, epochs, seed=0):
    state = mlp_state(reward_fn=lambda x, names: x[:, 0], seed=seed)
    return state, Stage("rl", 1, 64, (objective,), (), RolloutConfig(LEVELS), group=8, inner_epochs=epochs)


def test_ratio_is_one_before_the_update_and_the_clip_acts_after_it(monkeypatch):
    import instep.methods.policy as module

    seen = []
    real = module.surrogate
    monkeypatch.setattr(module, "surrogate", lambda r, a, c: (seen.append(r.detach().clone()), real(r, a, c))[1])
    state, stage = policy_state(GRPO(clip=1e-4), 2)
    iteration(state, stage, [batch_of(prompts(8, state.rng))], 0.0)
    assert len(seen) == 6, "three stochastic steps of four levels, in two epochs"
    assert all(bool((r == 1).all()) for r in seen[:3]), "before the first update the policy is the one that rolled out, bit for bit"
    moved = torch.stack(seen[3:])
    assert bool(((moved - 1).abs() > 1e-4).any()), "in the second epoch it has moved past the clip"


def test_a_policy_that_differs_from_itself_is_refused():
    """Before any update the ratio has to be 1; a network with dropout, say, is told so."""
    state, stage = policy_state(GRPO(), 1)
    student, calls = state.roles["student"], []

    def restless(x_t, t, cond):
        calls.append(1)
        answer = student(x_t, t, cond)
        return replace(answer, x0=answer.x0 + 0.3 * len(calls))

    state.roles = {**state.roles, "student": restless}
    with pytest.raises(RuntimeError, match="before any update the ratio of probabilities is .* and not 1"):
        iteration(state, stage, [batch_of(prompts(8, state.rng))], 0.0)


@pytest.mark.parametrize("objective", [GRPO(), DDPO()])
def test_one_step_students_have_no_policy(objective):
    with pytest.raises(ValueError, match="steps: 1 is not allowed in stage 'rl': a 1-step student has no stochastic step"):
        Stage("rl", 1, 8, (objective,), (), RolloutConfig((1.0,)), group=4)


def test_ddpo_is_the_score_function_of_the_last_transitions():
    """By autograd of the Gaussian's log-probability, advantages held."""
    scale = torch.tensor(0.7, dtype=F64, requires_grad=True)

    class Student:
        def __call__(self, x_t, t, cond):
            return Prediction(scale * x_t, x_t)

    rng = torch.Generator().manual_seed(0)
    x_t, x_next = (torch.randn(3, 4, 2, generator=rng, dtype=F64) for _ in range(2))
    t, t_next = torch.tensor([1.0, 0.75, 0.5], dtype=F64), torch.tensor([0.75, 0.5, 0.25], dtype=F64)
    a = torch.tensor([1.0, -0.5, 0.2, -0.7], dtype=F64)
    seen = view(torch.zeros(4, 2, dtype=F64), {"student": Student()}, group=4, advantage=a)
    path = Trajectory(x_t, x_next, t, t_next, torch.zeros(3, 4, dtype=F64))
    seen = seen.with_rollout(replace(seen.rollout, trajectory=path, cond=LabelCondition(label=torch.zeros(4, dtype=torch.long))))
    total = sum(DDPO(truncate=2)(seen))
    (got,) = torch.autograd.grad(total, scale)
    by_hand = 0.0
    for s in (1, 2):  # d/dk of -(x' - (1 - t') k x)^2 / (2 t'^2), mean over elements
        residual = x_next[s] - (1 - t_next[s]) * scale.detach() * x_t[s]
        slope = (residual * (1 - t_next[s]) * x_t[s] / t_next[s] ** 2).mean(1)
        by_hand = by_hand - (a * slope).mean() / 2
    torch.testing.assert_close(got, by_hand)


@pytest.mark.parametrize("objective", [GRPO(clip=0.2), DDPO()])
def test_policy_gradients_raise_the_reward(objective):
    state, stage = policy_state(objective, 1)
    rewards = [iteration(state, stage, [batch_of(prompts(32, state.rng))], 0.0)["reward/train"] for _ in range(60)]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.1


def test_tilted_force_with_a_constant_reward_is_a_multiple_of_plain_matching():
    n = 16
    plain = direction(DistributionMatching(levels=AnyLevel(), guidance=2.0))
    force = DistributionMatching(levels=AnyLevel(), guidance=2.0, operator=RewardTilted("literal"))
    from test_family import ring_view

    seen = ring_view(advantage=torch.zeros(n, dtype=F64))
    seen = seen.with_rollout(replace(seen.rollout, reward=torch.full((n,), 0.8, dtype=F64)))
    torch.testing.assert_close(force.explain(seen).direction, plain * math.e)


def test_tilted_force_by_hand():
    one = torch.tensor([[1.0], [1.0]], dtype=F64)
    d = Displacements(real=3 * one, fake=one, dm=one, ca=one)
    reward, a = torch.tensor([3.0, 4.0], dtype=F64), torch.tensor([-1.0, 1.0], dtype=F64)
    torch.testing.assert_close(RewardTilted("literal")(d, a, relative(reward)), 2 * (reward / math.sqrt(12.5)).exp()[:, None])
    torch.testing.assert_close(RewardTilted("zscore")(d, a, reward), 2 * a.exp()[:, None])


def test_literal_tilting_does_not_depend_on_the_micro_batch():
    rng = torch.Generator().manual_seed(0)
    d, reward = torch.randn(4, 2, dtype=F64, generator=rng), torch.rand(4, dtype=F64, generator=rng) + 1
    of = lambda d, reward: RewardTilted("literal")(Displacements(d, 0 * d, d, d), 0 * reward, relative(reward))  # noqa: E731
    torch.testing.assert_close(of(d.repeat(8, 1), reward.repeat(8))[:4], of(d, reward))


def test_annealed_levels_go_from_high_noise_to_uniform():
    rng = torch.Generator().manual_seed(0)
    draw = lambda progress: AnnealedBeta()(20_000, progress=progress, t_exit=None, rng=rng)  # noqa: E731
    start, end = draw(0.0), draw(1.0)
    # Beta(4, 1.5): mean 4 / 5.5, variance 4 * 1.5 / (5.5^2 * 6.5)
    assert abs(float(start.mean()) - 4 / 5.5) < 0.005 and abs(float(start.var()) - 6 / (5.5**2 * 6.5)) < 0.002
    assert abs(float(end.mean()) - 0.5) < 0.006 and abs(float(end.var()) - 1 / 12) < 0.003
    assert float(draw(0.5).mean()) < float(start.mean()) and torch.equal(
        AnnealedBeta()(9, progress=0.3, t_exit=None, rng=torch.Generator().manual_seed(1)),
        AnnealedBeta()(9, progress=0.3, t_exit=None, rng=torch.Generator().manual_seed(1)),
    )


def test_annealed_levels_end_as_the_shifted_uniform_ones_and_begin_as_the_shifted_beta():
    """P(t <= x) = P(u <= x / (s - (s - 1) x)) in closed form: u uniform at the end of the stage, Beta(4, 1.5) at its start, whose CDF is integrated."""
    shift, x = 3.0, torch.tensor([0.2, 0.5, 0.8, 0.95], dtype=F64)
    unshifted = x / (shift - (shift - 1) * x)
    grid = torch.linspace(0, 1, 100_001, dtype=F64)
    density = grid**3 * (1 - grid).sqrt()
    whole = torch.cumulative_trapezoid(density, grid)
    beta = whole[(unshifted * 100_000).long() - 1] / whole[-1]
    for progress, expected in ((0.0, beta), (1.0, unshifted)):
        drawn = AnnealedBeta(shift=shift)(40_000, progress=progress, t_exit=None, rng=torch.Generator().manual_seed(0))
        torch.testing.assert_close((drawn.double()[:, None] <= x).double().mean(0), expected, rtol=0, atol=0.01)
    uniform = Uniform(shift=shift)(40_000, progress=0.0, t_exit=None, rng=torch.Generator().manual_seed(0))
    torch.testing.assert_close((uniform.double()[:, None] <= x).double().mean(0), unshifted, rtol=0, atol=0.01)
    warm, joint = dmdr(Common(shift=5.0)).stages
    assert warm.terms[0].levels.shift == warm.critics[0].levels.shift == joint.terms[0].levels.shift == 5.0, "nothing jumps between the stages"


def test_dynamic_guidance_begins_as_released():
    """DMDR's released class-conditional code: the fake's adapter at 2, the teacher's at 0.75 times a half-cosine; ours is trained at 1."""
    for rank in (None, 4):
        anneal = dmdr(Common(lora_rank=rank)).stages[0].terms[0].adapter
        for progress in (0.0, 0.3, 1.0):
            assert anneal.at(progress) == pytest.approx(0.75 / 2.0 * 0.5 * (1 + math.cos(math.pi * progress)))


def test_the_fakes_adapter_adapts_the_teacher():
    """DynaDG with LoRA roles: the real estimate is the shared backbone under the fake's adapter at the annealed scale, not told the exit."""
    asked = []

    class Fake(Linear):
        def scaled(self, scale):
            asked.append(scale)
            return Linear(0.2 + scale)

    x = torch.ones(2, 2, dtype=F64)
    roles = {"teacher": Linear(0.2), "fake": Fake(0.9)}
    from instep.methods.adapted_teacher import Annealed

    force = DistributionMatching(levels=AnyLevel(), adapter=Annealed(0.5, 1.0), adapter_of="fake")
    adapted = force.explain(view(x, roles)).real
    plain = DistributionMatching(levels=AnyLevel()).explain(view(x, roles)).real
    assert asked == [0.5]
    torch.testing.assert_close(adapted, plain * (0.7 / 0.2))


def test_literal_tilting_does_not_move_the_fixed_point():
    """Particles: a factor on the force leaves its zero where it is; the fake's weight moves it (test_lab)."""
    world = World.named("ring8", members=1, reward="half")
    recipe = dmdr(common(), warm=1, iterations=0, tilt="literal", dyna_dg=0.0, dyna_rs=False)
    recipe = replace(recipe, stages=recipe.stages[:1])
    metrics = train_particles("rt-dm", recipe, world, seed=0, n=512, steps=350).metrics[0]
    assert abs(metrics["share"] - 0.5) < 0.06 and metrics["quality"] > 0.93


def test_recipes_are_what_they_say():
    warm, joint = dmdr(Common(lora_rank=4), rl="grpo").stages
    assert warm.needs == {"reward"} and isinstance(warm.terms[0].levels, AnnealedBeta) and warm.terms[0].adapter_of == "fake"
    assert joint.needs == {"reward", "trajectory"} and joint.group == 8
    full = dmdr(Common())
    assert full.roles["teacher"].lora is not None and full.stages[0].critics[1].role == "teacher" and full.stages[1].needs == {"gradient"}
    assert not rl_after().stages[1].critics, "reinforcement learning alone trains no fake"


@pytest.mark.slow
def test_joint_training_keeps_what_reinforcement_alone_loses():
    world = World.named("ring8", members=2, reward="right")
    start = flow_start(world, 0, steps=1000)
    base = common(4)

    def run(recipe):
        rows = train("x", recipe, world, ensemble_state(recipe, world, start, 0)).metrics
        return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}

    alone = run(rl_after(base, distil=150, iterations=150, rl="refl", weight=1.0))
    joint = run(dmdr(base, warm=150, iterations=150, tilt="none", dyna_dg=0.0, dyna_rs=False, rl="refl", weight=0.05, weight_unit="raw"))
    assert joint["quality"] > alone["quality"] + 0.2 and joint["reached"] > alone["reached"]
    assert joint["share"] > 0.52
