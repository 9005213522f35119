"""Options of methods and their published defaults: the fake's error, the reward of the exit, units of GRPO, pairs of trajectories, ReFL through steps."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from test_forces import F64, Fixed, view
from test_reinforce import Scaled
from test_skeletons import LEVELS, PATH, batch_of, mlp_state, prompts

from instep.diffusion.advantage import group_advantage
from instep.diffusion.path import VariancePreserving
from instep.diffusion.prediction import to_prediction
from instep.diffusion.rollout import Rollout, Trajectory
from instep.diffusion.transitions import FlowSDE
from instep.lab.mixture import labels
from instep.lab.run import common
from instep.methods.critics import FakeScoreLoss
from instep.methods.policy import GRPO, PSO
from instep.methods.recipe import Advantage, RolloutConfig, Stage
from instep.methods.reward_gradient import RewardGradient
from instep.methods.term import View
from instep.recipes.after import rl_after
from instep.recipes.amd import amd
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.recipes.dmdr import dmdr
from instep.recipes.many_step import dance_grpo, flow_grpo
from instep.recipes.refl import refl
from instep.training.rollouts import roll_out, score_rollout
from instep.training.scalars import Scalars
from instep.training.step import iteration


@pytest.mark.parametrize("path", [PATH, VariancePreserving.linear()])
@pytest.mark.parametrize("kind", ["velocity", "eps", "x0"])
def test_a_fakes_error_is_that_of_x0_times_a_weight_of_the_level(path, kind):
    """x_t = a x0 + b eps: an error e of x0 is one of (a / b) e of the noise and of ((a + b) / b) e of the velocity eps - x0, on any path."""
    (critic,) = dmd2(Common(fake_target=kind), iterations=1).stages[0].critics
    critic = replace(critic, levels=Fixed())
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    noise, t = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=F64), torch.tensor(0.5, dtype=F64)
    a, b = path.a(t), path.b(t)

    class Fake:
        def __call__(self, x_t, t, cond):
            return to_prediction("x0", 0.5 * x_t, path, x_t, t)

    (loss,) = critic.losses(replace(view(x, {"fake": Fake()}), path=path))
    weight = {"velocity": ((a + b) / b) ** 2, "eps": (a / b) ** 2, "x0": torch.ones((), dtype=F64)}[kind]
    torch.testing.assert_close(loss, weight * (0.5 * (a * x + b * noise) - x).square().mean())
    with pytest.raises(ValueError, match="fake_target: 'score' is not known; allowed: velocity, eps, x0"):
        FakeScoreLoss(target="score")


def test_the_reward_may_be_that_of_the_exit():
    """AMD's Algorithm 1 scores the supervised step's own estimate: nothing past the exit is computed, and the advantage is that of the exits."""
    seen, calls = [], []
    state = mlp_state(reward_fn=lambda x, names: (seen.append(x.clone()), x[:, 0])[1])
    student = state.roles["student"]
    state.roles = {**state.roles, "student": lambda x_t, t, cond: (calls.append(len(x_t)), student(x_t, t, cond))[1]}
    rows = {}
    for where in ("exit", "final"):
        stage = amd(common(4), iterations=1, reward_on=where).stages[-1]
        stage = replace(stage, batch=32)
        batch = batch_of(prompts(4, state.rng))
        before = View(state.roles, state.path, batch, 0.0, torch.Generator().manual_seed(5))
        state.rng.manual_seed(5)
        calls.clear(), seen.clear()
        rollout = score_rollout(state, stage, before, roll_out(state, stage, before, with_graph=True), Scalars())
        rows[where] = sum(calls)
        torch.testing.assert_close(torch.cat(seen), rollout.point(where).x.detach(), rtol=0, atol=0)
        torch.testing.assert_close(rollout.advantage, group_advantage(rollout.point(where).x[:, 0].detach(), 8, clip=1.0))
        assert (rollout.final is None) == (where == "exit")
    # four groups of eight, an exit each at 1 to 4 passes: 10 of them, and Q = 4 each to the end
    assert rows == {"exit": 8 * 10, "final": 8 * 16}
    assert "force/dm/norm" in iteration(state, replace(amd(common(4), iterations=1, reward_on="exit").stages[-1], batch=32), [batch], 0.0)
    with pytest.raises(ValueError, match="reward_on: exit is not allowed in stage 'rl', where 'grpo' compares final samples"):
        Stage("rl", 1, 8, (GRPO(),), (), RolloutConfig((1.0, 0.5)), group=4, reward_on="exit")


def test_the_sum_is_the_divergence_as_flow_grpos_paper_writes_it():
    """dt / 2 (s (1 - t) / (2 t) + 1 / s)^2 |v - v_reference|^2 with s = 0.7 sqrt(t / (1 - t)), from the velocities alone."""
    rng = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 4, 3, generator=rng, dtype=F64)
    path = Trajectory(x_t, x_t, torch.tensor([0.8, 0.6], dtype=F64), torch.tensor([0.6, 0.3], dtype=F64), torch.zeros(2, 4, dtype=F64), transition=FlowSDE(0.7))
    seen = view(x_t[0], {"student": Scaled(0.7), "reference": Scaled(0.2)}, group=4)
    grpo = GRPO(kl=1.0, kl_unit="sum")
    found = grpo.divergence(seen, path, 0, *grpo.predict(seen, path, 0, Scaled(0.7)))
    t, dt = 0.8, 0.2
    s = 0.7 * math.sqrt(t / (1 - t))
    v = lambda scale: (1 - scale) * x_t[0] / t  # noqa: E731
    torch.testing.assert_close(found, dt / 2 * (s * (1 - t) / (2 * t) + 1 / s) ** 2 * (v(0.7) - v(0.2)).square().sum(1))


def test_advantages_may_keep_the_unit_of_the_reward():
    """Dr. GRPO divides by no deviation; clipped at 5 as in the released code of Flow-GRPO and DanceGRPO."""
    state = mlp_state(reward_fn=lambda x, names: 7 * x[:, 0])
    seen = View(state.roles, state.path, batch_of(prompts(4, state.rng)), 0.0, state.rng)
    rollout = None
    for advantage in (Advantage("none"), Advantage("none", 5.0)):
        stage = Stage("rl", 1, 16, (GRPO(),), (), RolloutConfig(LEVELS), group=4, advantage=advantage)
        rollout = rollout or roll_out(state, stage, seen, with_graph=False, to_the_end=True)
        groups = 7 * rollout.point("final").x[:, 0].reshape(4, 4)
        by_hand = (groups - groups.mean(1, keepdim=True)).flatten()
        bound = advantage.clip or math.inf
        torch.testing.assert_close(score_rollout(state, stage, seen, rollout, Scalars()).advantage, by_hand.clamp(-bound, bound), rtol=1e-5, atol=1e-5)
    assert by_hand.abs().max() > 5, "the bound acted"
    for recipe in (dance_grpo(), flow_grpo(), rl_after(rl="grpo", distil=0), dmdr(rl="grpo", warm=0)):
        assert recipe.stages[-1].advantage == Advantage("group", 5.0), "the published defaults"
    flow = flow_grpo().stages[0].terms[0]
    assert (flow.clip, flow.kl, flow.kl_unit) == (1e-4, 0.04, "mean") and dance_grpo().stages[0].terms[0].kl == 0
    assert dance_grpo().stages[0].rollout.shared_noise == 1 and flow_grpo().stages[0].rollout.shared_noise == 0, "one initial noise a group, or one a sample"
    assert dance_grpo(spread="none", advantage_clip=None).stages[0].advantage == Advantage("none", None)
    with pytest.raises(ValueError, match="spread: 'batch' is not known; allowed: group, run, none"):
        Advantage("batch")


def pso_view(student, reference, advantage, group=3):
    """Transitions of two groups in float64, whose probabilities are those of `Scaled` denoisers."""
    rng = torch.Generator().manual_seed(0)
    x_t, x_next = (torch.randn(2, 6, 2, generator=rng, dtype=F64) for _ in range(2))
    path = Trajectory(x_t, x_next, torch.tensor([1.0, 0.75], dtype=F64), torch.tensor([0.75, 0.5], dtype=F64), torch.zeros(2, 6, dtype=F64))
    rollout = Rollout(labels(["0"] * 3 + ["1"] * 3), group, trajectory=path, advantage=torch.tensor(advantage, dtype=F64))
    return replace(view(x_t[0], {"student": Scaled(student), "reference": Scaled(reference)}, group=3), rollout=rollout), x_t, x_next


def test_pso_by_hand():
    """log 2 at the reference; else autograd of torch.distributions' log-probabilities; none past the clip, none for a group of equal rewards."""
    scale, advantage = torch.tensor(0.4, dtype=F64, requires_grad=True), [0.1, 1.0, -1.1, 0.0, 0.0, 0.0]
    seen, x_t, x_next = pso_view(scale, 0.4, advantage)
    losses = list(PSO(beta=5.0)(seen))
    assert len(losses) == 2 and float(sum(losses).detach()) == pytest.approx(0.5 * math.log(2)), "one of the two groups makes a pair"
    scale = torch.tensor(0.41, dtype=F64, requires_grad=True)
    seen, *_ = pso_view(scale, 0.4, advantage)

    def log_ratio(s, row):
        level = (0.75, 0.5)[s]
        density = lambda k: torch.distributions.Normal((1 - level) * k * x_t[s, row], level).log_prob(x_next[s, row]).mean()  # noqa: E731
        return density(scale) - density(torch.tensor(0.4, dtype=F64))

    by_hand = sum(-torch.nn.functional.logsigmoid(5.0 * (log_ratio(s, 1) - log_ratio(s, 2))) / 2 / 2 for s in (0, 1))
    found = sum(PSO(beta=5.0)(seen))
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(torch.autograd.grad(found, scale)[0], torch.autograd.grad(by_hand, scale)[0])
    assert max(abs(float(log_ratio(s, row).detach())) for s in (0, 1) for row in (1, 2)) > 1e-4
    (gradient,) = torch.autograd.grad(sum(PSO(beta=5.0, clip=1e-4)(pso_view(scale, 0.4, advantage)[0])), scale)
    assert gradient == 0, "both trajectories are past this clip"
    assert PSO().needs == {"reward", "trajectory", "reference"} and (PSO().beta, PSO().clip) == (50.0, 0.1)
    with pytest.raises(ValueError, match="beta: 0 is not allowed"):
        PSO(beta=0)


def test_pairs_of_trajectories_raise_the_reward():
    state = mlp_state(reward_fn=lambda x, names: x[:, 0])
    state.roles = {**state.roles, "reference": copy.deepcopy(state.roles["student"])}
    state.reference = tuple(state.roles["reference"].parameters())
    stage = Stage("rl", 60, 64, (PSO(beta=5.0),), (), RolloutConfig(LEVELS), group=8)
    rewards = [iteration(state, stage, [batch_of(prompts(8, state.rng))], 0.0)["reward/train"] for _ in range(60)]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.1


def test_the_rewards_gradient_may_reach_several_steps():
    """0: the supervised step's own estimate (DMDR); K: the final sample, through its last K steps (held by test_rollout)."""
    for through, reached in ((0, {"exit"}), (1, {"final"}), (3, {"final"})):
        for recipe in (refl(common(4), through=through), dmdr(common(4), warm=0, through=through), rl_after(common(4), distil=0, through=through)):
            stage = recipe.stages[-1]
            reward = next(term for term in stage.terms if isinstance(term, RewardGradient))
            assert {reward.on} == reached and stage.rollout.through == max(through, 1)
    with pytest.raises(ValueError, match="through: 5 is not allowed; the last steps that the gradient reaches, between 1 and the 4 there are"):
        refl(common(4), through=5)
    with pytest.raises(ValueError, match="through: 1 is not allowed with grpo"):
        dmdr(common(4), rl="grpo", through=1)
