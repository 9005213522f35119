"""Transitions of samplers, preferences, several rewards and the reference: each against a closed form or a second derivation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_forces import F64, view
from test_run import PROMPTS, brightness, family, interrupted_before, rows, same
from test_skeletons import batch_of, mlp_state, prompts

from instep.diffusion.advantage import group_advantage, several_advantages
from instep.diffusion.guidance import GuidedDenoiser, predict_guided
from instep.diffusion.levels import OneOf
from instep.diffusion.path import RectifiedFlow, VariancePreserving
from instep.diffusion.prediction import Prediction, score_of_x0
from instep.diffusion.rollout import Point, Rollout, Trajectory
from instep.diffusion.transitions import CPS, DanceSDE, FlowSDE, Renoise, Transition
from instep.lab.mixture import labels
from instep.lab.run import common, ensemble_state
from instep.lab.run import train as train_lab
from instep.lab.world import World
from instep.methods.operators import AdvantageGuided, Displacements, MatchingOnly
from instep.methods.policy import GRPO
from instep.methods.preference import Preference, preference_loss
from instep.methods.recipe import RolloutConfig, Stage
from instep.methods.regression import Denoising
from instep.methods.reward_gradient import RewardGradient, balanced
from instep.recipes.after import rl_after, sft_after
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.recipes.dmdr import dmdr
from instep.recipes.refl import refl
from instep.rewards.base import FunctionReward
from instep.rewards.several import several
from instep.training.options import RunOptions
from instep.training.run import train
from instep.training.step import iteration

PATH = RectifiedFlow()
LEVELS = (1.0, 0.75, 0.5, 0.25)


def some(seed=0, n=5):
    rng = torch.Generator().manual_seed(seed)
    x0, x_t, x_next = (torch.randn(n, 3, 2, generator=rng, dtype=F64) for _ in range(3))
    return x0, x_t, x_next, torch.linspace(0.4, 0.95, n, dtype=F64), torch.linspace(0.2, 0.7, n, dtype=F64)


@pytest.mark.parametrize("transition", [Renoise(), CPS(0.6), FlowSDE(), DanceSDE()])
def test_log_probabilities_are_the_normals(transition: Transition):
    """Against torch.distributions; the library's is the mean over elements. And a step is what its own density says."""
    x0, x_t, x_next, t, t_next = some()
    mean, std = transition.gaussian(PATH, x0, x_t, t, t_next)
    expected = torch.distributions.Normal(mean, std[:, None, None].expand_as(mean)).log_prob(x_next).flatten(1).mean(1)
    torch.testing.assert_close(transition.log_prob(PATH, x0, x_t, x_next, t, t_next), expected)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    torch.testing.assert_close((transition.step(PATH, x0, x_t, noise, t, t_next) - mean) / std[:, None, None], noise)


@pytest.mark.parametrize(("transition", "strength"), [(FlowSDE(0.7), lambda t: 0.7 * (t / (1 - t)).sqrt()), (DanceSDE(0.3), lambda t: torch.full_like(t, 0.3))])
def test_diffusions_are_steps_of_the_reverse_sde(transition, strength):
    """dx = (v - s^2 / 2 score) dt + s dw with the score by Tweedie; and Flow-GRPO's own way of writing the mean."""
    x0, x_t, _, t, t_next = some()
    wide = lambda x: x[:, None, None]  # noqa: E731
    s, dt = strength(t), t_next - t
    v = (x_t - x0) / wide(t)
    mean, std = transition.gaussian(PATH, x0, x_t, t, t_next)
    torch.testing.assert_close(mean, x_t + wide(dt) * (v - wide(s.square() / 2) * score_of_x0(PATH, x_t, t, x0)))
    torch.testing.assert_close(mean, x_t * wide(1 + s**2 / (2 * t) * dt) + v * wide((1 + s**2 * (1 - t) / (2 * t)) * dt))
    torch.testing.assert_close(std, s * (-dt).sqrt())


def test_a_diffusion_in_small_steps_has_the_marginals_of_the_flow():
    """Of data N(2, .3^2) in one dimension, whose x0 is known exactly; one coarse step instead leaves too much noise."""
    mean, sigma, rng = 2.0, 0.3, torch.Generator().manual_seed(0)

    def x0_of(x, t):
        variance = (1 - t).square() * sigma**2 + t.square()
        return mean + ((1 - t) * sigma**2 / variance)[:, None] * (x - (1 - t)[:, None] * mean)

    for transition in (FlowSDE(0.7), DanceSDE(0.5)):
        x, grid = torch.randn(20000, 1, generator=rng, dtype=F64), torch.linspace(1, 0.25, 151, dtype=F64)
        for a, b in zip(grid, grid[1:], strict=False):
            t, t_next = a.expand(len(x)), b.expand(len(x))
            x = transition.step(PATH, x0_of(x, t), x, torch.randn(x.shape, generator=rng, dtype=F64), t, t_next)
        assert float(x.mean()) == pytest.approx(0.75 * mean, abs=0.02) and float(x.std()) == pytest.approx(math.hypot(0.75 * sigma, 0.25), abs=0.01)
    one = torch.ones(1, dtype=F64)
    x0, eps = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)
    kept, std = FlowSDE(0.7).gaussian(PATH, x0, eps, one, 0.75 * one)
    assert math.hypot(float(kept), float(std)) == pytest.approx(0.863, abs=1e-3), "the metric in its docstring; the path has .75"


@pytest.mark.parametrize("path", [RectifiedFlow(), VariancePreserving.linear()])
def test_cps_at_one_is_the_few_step_step_and_keeps_the_noise(path):
    x0, x_t, _, t, t_next = some()
    for mine, theirs in zip(CPS(1.0).gaussian(path, x0, x_t, t, t_next), Renoise().gaussian(path, x0, x_t, t, t_next), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-15)
    eps = (x_t - path.a(t)[:, None, None] * x0) / path.b(t)[:, None, None]
    mean, std = CPS(0.3).gaussian(path, x0, x_t, t, t_next)
    kept = (mean - path.a(t_next)[:, None, None] * x0) / eps
    # as much noise as the path has
    torch.testing.assert_close(kept.square() + std[:, None, None].square(), path.b(t_next)[:, None, None].square().expand_as(kept))
    with pytest.raises(ValueError, match="FlowSDE is a step of the rectified flow, and this model's path is VariancePreserving; use CPS"):
        FlowSDE().gaussian(VariancePreserving.linear(), x0, x_t, t, t_next)
    with pytest.raises(ValueError, match="noise: 0 is not allowed"):
        CPS(0)


def test_a_guided_denoiser_is_the_guided_prediction():
    class Net:
        def __call__(self, x_t, t, cond):
            x0 = x_t * (1 + cond.label[:, None])
            return Prediction(x0, x_t - x0)

    cond, null = labels(["0", "1", "1"]), labels([""] * 3)
    x, t = torch.randn(3, 2), torch.rand(3)
    answer = GuidedDenoiser(Net(), null, 3.0)(x, t, cond)
    torch.testing.assert_close(answer.x0, predict_guided(Net(), x, t, cond, null, 3.0).x0)
    # guidance is linear, so the two stay consistent
    torch.testing.assert_close(answer.v, x - answer.x0)


class Scaled:
    """x0 = scale x_t, v = (x_t - x0) / t: everything of it is known."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x_t, t, cond):
        x0 = self.scale * x_t
        return Prediction(x0, (x_t - x0) / t[:, None])


def pairs_view(scale, reference, advantage):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, generator=rng, dtype=F64)
    end = Point(x, x, torch.ones(6, dtype=F64), torch.zeros(6, dtype=torch.long))
    rollout = Rollout(labels(["0"] * 3 + ["1"] * 3), 3, exit=end, final=end, advantage=torch.tensor(advantage, dtype=F64))
    return replace(view(x, {"student": Scaled(scale), "reference": Scaled(reference)}, group=3), rollout=rollout), x


def test_dpo_is_log_two_at_the_reference_and_its_gradient_is_the_hand_derivation():
    scale = torch.tensor(0.4, dtype=F64, requires_grad=True)
    seen, x = pairs_view(scale, 0.4, [0.1, 1.0, -1.1, 0.0, 0.0, 0.0])
    (loss,) = list(Preference(beta=5.0, levels=OneOf((1.0, 0.5)))(replace(seen, rng=torch.Generator().manual_seed(3))))
    assert float(loss.detach()) == pytest.approx(0.5 * math.log(2)), "one of the two groups makes a pair; equal rewards make none"
    (gradient,) = torch.autograd.grad(loss, scale)
    # by hand: the same draws, d error / d scale of v = (1 - s) x_t / t against eps - x0
    rng = torch.Generator().manual_seed(3)
    t = OneOf((1.0, 0.5))(2, progress=0, t_exit=None, rng=rng).double()
    eps = torch.randn(2, 2, generator=rng, dtype=F64)

    def slope(x0):
        x_t = (1 - t[0]) * x0 + t[0] * eps[0]
        error = (1 - 0.4) * x_t / t[0] - (eps[0] - x0)
        return (2 * error * -x_t / t[0]).mean()

    won, lost = x[1], x[2]
    expected = 0.5 * 0.5 * (5.0 / 2) * (slope(won) - slope(lost))  # half of the groups; sigmoid(0) = 1/2
    torch.testing.assert_close(gradient, expected)


def test_preference_loss_falls_where_the_preferred_is_denoised_better():
    zero, one = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
    assert float(preference_loss(zero, zero, zero, zero, 100.0)) == pytest.approx(math.log(2))
    assert preference_loss(-0.1 * one, zero, zero, zero, 10.0) < math.log(2) < preference_loss(zero, -0.1 * one, zero, zero, 10.0)
    assert float(preference_loss(0.3 * one, 0.1 * one, 0.1 * one, 0.2 * one, 4.0)) == pytest.approx(math.log1p(math.exp(2 * 0.3)))


def test_grpos_penalty_is_the_divergence_of_the_two_gaussians():
    scale = 0.7
    rng = torch.Generator().manual_seed(0)
    x_t, x_next = (torch.randn(3, 4, 2, generator=rng, dtype=F64) for _ in range(2))
    t, t_next = torch.tensor([1.0, 0.75, 0.5], dtype=F64), torch.tensor([0.75, 0.5, 0.25], dtype=F64)
    path = Trajectory(x_t, x_next, t, t_next, torch.zeros(3, 4, dtype=F64), transition=DanceSDE(0.3))
    rollout = Rollout(labels(["0"] * 4), 4, trajectory=path, advantage=torch.zeros(4, dtype=F64))
    seen = replace(view(x_t[0], {"student": Scaled(scale), "reference": Scaled(0.2)}, group=4), rollout=rollout)
    grpo = GRPO(kl=0.5)
    x0, level, below = grpo.predict(seen, path, 1, Scaled(scale))
    found = grpo.divergence(seen, path, 1, x0, level, below)
    normal = lambda s: torch.distributions.Normal(*(lambda m, d: (m, d[:, None].expand_as(m)))(*DanceSDE(0.3).gaussian(PATH, s * x_t[1], x_t[1], level, below)))  # noqa: E731
    torch.testing.assert_close(found, torch.distributions.kl_divergence(normal(scale), normal(0.2)).mean(1))
    whole = replace(grpo, kl_unit="sum").divergence(seen, path, 1, x0, level, below)
    torch.testing.assert_close(whole, torch.distributions.kl_divergence(normal(scale), normal(0.2)).sum(1))
    assert GRPO().needs == {"reward", "trajectory"} and grpo.needs == {"reward", "trajectory", "reference"}
    with pytest.raises(ValueError, match="kl_unit: 'element' is not known; allowed: mean, sum"):
        GRPO(kl_unit="element")


def test_several_rewards_are_normalised_apart():
    rng = torch.Generator().manual_seed(0)
    r = torch.randn(8, 2, generator=rng)
    big = r * torch.tensor([1.0, 1000.0])
    a = several_advantages(big, (1.0, 0.5), 4, [None, None])
    torch.testing.assert_close(a, group_advantage(r[:, 0], 4) + 0.5 * group_advantage(r[:, 1], 4), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(several_advantages(r[:, :1], (1.0,), 4, [None], clip=0.5), group_advantage(r[:, 0], 4, clip=0.5), rtol=0, atol=0)
    assert several_advantages(big, (1.0, 0.5), 4, [None, None], clip=0.7).abs().max() <= 0.7


def test_gradients_of_several_rewards_are_brought_to_one_norm():
    g = torch.randn(2, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 50.0], dtype=F64)[:, None, None]
    norm = lambda x: x.flatten(1).norm(dim=1).mean()  # noqa: E731
    both = [balanced(g, w) for w in ((1.0, 0.0), (0.0, 1.0))]
    torch.testing.assert_close(norm(both[0]), norm(both[1]))
    torch.testing.assert_close(norm(both[0]), (norm(g[0]) + norm(g[1])) / 2)
    torch.testing.assert_close(balanced(g, (1.0, 2.0)), both[0] + 2 * both[1])
    torch.testing.assert_close(balanced(g[:1], (1.0,)), g[0], rtol=0, atol=0)
    x = torch.randn(4, 2, dtype=F64)
    seen = replace(view(x, {}, group=2), reward_grad_fn=lambda x, names: torch.stack([x[:, 0], 100 * x[:, 1]], 1), weights=(1.0, 1.0))
    force = RewardGradient()(seen)
    # one reward is a hundred times the other, and pulls no harder
    torch.testing.assert_close(force[:, 0], force[:, 1])
    assert (force < 0).all(), "descended: the samples climb both"


def test_several_checks_what_it_is_given():
    both = several((brightness, 1.0), (FunctionReward(lambda media, prompts: -media.mean((1, 2, 3, 4)), name="darkness"), 2.0))
    media = torch.rand(3, 3, 2, 4, 4)
    assert both.name == "1 brightness + 2 darkness" and both.each(media, ["a"] * 3).shape == (3, 2) and not both.differentiable
    torch.testing.assert_close(both.score(media, ["a"] * 3), brightness(media, None) - 2 * media.mean((1, 2, 3, 4)))
    with pytest.raises(ValueError, match="reward 'wrong' returned"):
        several((FunctionReward(lambda media, prompts: media.mean(), name="wrong"), 1.0)).score(media, ["a"] * 3)
    with pytest.raises(ValueError, match="some look at pixels and some at latents"):
        several((brightness, 1.0), (FunctionReward(brightness, space="latent"), 1.0))


def test_operators_of_the_authors_variants():
    rng = torch.Generator().manual_seed(0)
    dm, ca = (torch.randn(3, 2, generator=rng, dtype=F64) for _ in range(2))
    d, a = Displacements(dm + ca, torch.zeros_like(dm), dm, ca), torch.tensor([1.0, 0.0, -0.5], dtype=F64)
    torch.testing.assert_close(MatchingOnly()(d, None), dm)
    torch.testing.assert_close(AdvantageGuided()(d, a), dm + a[:, None] * ca)


def test_the_reference_is_the_student_at_the_beginning_of_its_stage():
    state = mlp_state(reward_fn=lambda x, names: x[:, 0])
    import copy

    state.roles = {**state.roles, "reference": copy.deepcopy(state.roles["student"])}
    state.reference = tuple(state.roles["reference"].parameters())
    stage = Stage("rl", 3, 32, (Preference(levels=OneOf(LEVELS)),), (), RolloutConfig(LEVELS), group=8)
    start = [p.detach().clone() for p in state.trained["student"].parameters.values()]
    first = iteration(state, stage, [batch_of(prompts(4, state.rng))], 0.0)
    assert first["objective/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    iteration(state, stage, [batch_of(prompts(4, state.rng))], 0.3)
    moved = [p.detach().clone() for p in state.trained["student"].parameters.values()]
    assert all(torch.equal(a, b) for a, b in zip(state.reference, start, strict=True)) and not torch.equal(moved[0], start[0])
    again = iteration(state, replace(stage, name="next"), [batch_of(prompts(4, state.rng))], 0.0)
    assert again["objective/dpo"] == pytest.approx(math.log(2), abs=1e-6), "a new stage, a new reference"
    assert all(torch.equal(a, b) for a, b in zip(state.reference, moved, strict=True))


@pytest.mark.parametrize("lora", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_with_a_reference_resumes_to_the_same_weights(tmp_path, lora):
    recipe = dmdr(Common(steps=2, batch=4, critic_updates=1, lora_rank=lora), warm=1, iterations=3, group=2, tilt="none", dyna_dg=0.0, rl="dpo")
    options = RunOptions(save_every=1, probe_every=50)
    both = several((brightness, 1.0), (FunctionReward(lambda media, prompts: media.std((1, 2, 3, 4)), name="contrast"), 0.5))
    whole = train(recipe, family(), out=tmp_path / "whole", prompts=PROMPTS, reward=both, options=options)
    assert {"objective/dpo", "reward/train/0", "reward/train/1"} <= rows(whole.out)[-1].keys()
    with interrupted_before(3):
        train(recipe, family(), out=tmp_path / "cut", prompts=PROMPTS, reward=both, options=options)
    same(whole.out, train(recipe, family(), out=tmp_path / "cut", prompts=PROMPTS, reward=both, options=options).out)


def mean(run, key):
    return sum(metrics[key] for metrics in run.metrics) / len(run.metrics)


@pytest.mark.slow
def test_preferences_beside_matching_raise_the_rewarded_share(start):
    """In the laboratory, four steps, half of the modes rewarded (share .5 without)."""
    world = World.named("ring8", members=2, reward="half")
    recipe = dmdr(common(4), warm=0, iterations=300, rl="dpo", beta=2.0, weight=0.5, weight_unit="raw")
    run = train_lab("dpo", recipe, world, ensemble_state(recipe, world, start, 0))
    assert mean(run, "share") > 0.62 and mean(run, "quality") > 0.4


@pytest.mark.slow
def test_a_policy_gradient_climbs_and_matching_or_its_dm_part_holds_it(start):
    """Alone it goes all the way and leaves the modes; beside matching it stays on them."""
    world = World.named("ring8", members=2, reward="half")
    policy = {"rl": "grpo", "clip": 0.2}
    alone = rl_after(common(4), distil=0, iterations=150, **policy)
    run = train_lab("alone", alone, world, ensemble_state(alone, world, start, 0))
    assert mean(run, "share") > 0.9 and mean(run, "tv") > 0.5
    for beside in ("matching", "dm"):
        recipe = dmdr(common(4), warm=0, iterations=150, weight=0.3, weight_unit="raw", beside=beside, **policy)
        held = train_lab(beside, recipe, world, ensemble_state(recipe, world, start, 0))
        assert mean(held, "quality") > mean(run, "quality") + 0.2 and mean(held, "tv") < 0.2


def test_reinforcement_alone_with_preferences_is_a_recipe():
    stage = rl_after(common(4), distil=0, iterations=5, rl="dpo").stages[-1]
    assert stage.group == 8 and not stage.critics and stage.needs == {"reward", "reference"}


def test_fine_tuning_is_the_velocity_error_at_the_students_levels():
    real = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    seen = view(real, {"student": Scaled(0.3)})
    seen = replace(seen, batch=replace(seen.batch, real=real), rng=torch.Generator().manual_seed(2), rollout=None)
    (loss,) = list(Denoising(levels=OneOf((1.0, 0.5)))(seen))
    rng = torch.Generator().manual_seed(2)
    t = OneOf((1.0, 0.5))(4, progress=0, t_exit=None, rng=rng).double()[:, None]
    eps = torch.randn(4, 2, generator=rng, dtype=F64)
    x_t = (1 - t) * real + t * eps
    torch.testing.assert_close(loss, ((0.7 * x_t / t) - (eps - real)).square().mean())


@pytest.mark.slow
def test_fine_tuning_a_distilled_student_blurs_it(start):
    """The mean of what a noisy sample could be lies between modes (DM-Align, Appendix C.1: a distilled model collapses under fine-tuning)."""
    world = World.named("ring8", members=2)
    both = {}
    for name, recipe in (("tuned", sft_after(common(), distil=200, iterations=200)), ("distilled", dmd2(common(), iterations=200))):
        both[name] = mean(train_lab(name, recipe, world, ensemble_state(recipe, world, start, 0)), "quality")
    assert both["tuned"] < 0.5 * both["distilled"]


SHORT = Common(steps=2, batch=4, critic_updates=1)
QUICK = RunOptions(save_every=1, probe_every=50)


def test_dmdr_goes_on_from_a_distilled_student_with_its_default_options(tmp_path):
    """Without a tilted stage nothing adapts the teacher, so a plain run has all the roles it needs."""
    plain = train(dmd2(SHORT, iterations=1), family(), out=tmp_path / "plain", prompts=PROMPTS, options=QUICK)
    for rl in ("dpo", "grpo"):
        recipe = dmdr(SHORT, warm=0, iterations=1, group=2, rl=rl)
        run = train(recipe, family(), out=tmp_path / rl, prompts=PROMPTS, reward=brightness, options=QUICK, start_from=plain.out)
        assert set(run.state.trained) == {"student", "fake"}


def test_a_reference_beside_an_adapted_teacher_is_a_plain_copy(tmp_path):
    """DynaDG puts an adapter into the pretrained network; the reference must not have it."""
    run = train(dmdr(SHORT, warm=1, iterations=2, group=2, rl="dpo"), family(), out=tmp_path / "run", prompts=PROMPTS, reward=brightness, options=QUICK)
    assert run.state.roles["reference"].named_parameters().keys() == run.state.roles["student"].named_parameters().keys()
    assert run.state.reference_stage == "joint" and len(run.state.reference) == len(run.state.trained["student"].parameters)


def test_the_weight_of_a_single_reward_counts_everywhere():
    g = torch.randn(1, 4, 2, dtype=F64)
    torch.testing.assert_close(balanced(g, (-0.5,)), -0.5 * g[0])
    state = mlp_state(reward_fn=lambda x, names: x[:, 0])
    state.weights = (-2.0,)
    stage = Stage("rl", 1, 16, (Preference(levels=OneOf(LEVELS)),), (), RolloutConfig(LEVELS), group=4)
    from instep.methods.term import View
    from instep.training.rollouts import roll_out, score_rollout
    from instep.training.scalars import Scalars

    batch = batch_of(prompts(4, state.rng))
    view = View(state.roles, state.path, batch, 0.0, state.rng)
    scored = score_rollout(state, stage, view, roll_out(state, stage, view, with_graph=False, to_the_end=True), Scalars())
    x = scored.point("final").x[:, 0]
    torch.testing.assert_close(scored.reward, -2 * x)
    torch.testing.assert_close(scored.advantage, -2 * group_advantage(x, 4), rtol=1e-4, atol=1e-5)


def test_a_silent_reward_does_not_quieten_the_others():
    g = torch.stack([torch.ones(3, 2, dtype=F64), torch.zeros(3, 2, dtype=F64)])
    torch.testing.assert_close(balanced(g, (1.0, 1.0)), g[0])


def test_of_several_rewards_the_one_without_a_gradient_is_named(tmp_path):
    good = FunctionReward(lambda media, prompts: media.mean((1, 2, 3, 4)), name="good", differentiable=True)
    cut = FunctionReward(lambda media, prompts: media.detach().mean((1, 2, 3, 4)), name="cut", differentiable=True)
    with pytest.raises(ValueError, match="reward: 'cut' is declared differentiable, but its scores have no gradient"):
        train(refl(SHORT, iterations=1), family(), out=tmp_path / "a", prompts=PROMPTS, reward=several((good, 1.0), (cut, 1.0)), options=QUICK)
    with pytest.raises(ValueError, match="'blunt' is not differentiable"):
        both = several((good, 1.0), (FunctionReward(brightness, name="blunt"), 1.0))
        train(refl(SHORT, iterations=1), family(), out=tmp_path / "b", prompts=PROMPTS, reward=both, options=QUICK)


def test_stale_samples_are_refused_where_nothing_bounds_them():
    with pytest.raises(ValueError, match="inner_epochs: 2 is not allowed with ddpo"):
        dmdr(SHORT, group=2, rl="ddpo", inner_epochs=2)


def test_another_network_of_the_same_name_is_another_run(tmp_path):
    train(dmd2(SHORT, iterations=1), family(), out=tmp_path / "run", prompts=PROMPTS, options=QUICK)
    other = family()
    with torch.no_grad():
        next(other.pretrained.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="holds another run .its weights differ"):
        train(dmd2(SHORT, iterations=1), other, out=tmp_path / "run", prompts=PROMPTS, options=QUICK)


def test_a_run_that_was_refused_leaves_its_folder_free(tmp_path):
    """start_from is found wanting after the folder was claimed: the repaired command may use it."""
    plain = train(dmd2(SHORT, iterations=1), family(), out=tmp_path / "plain", prompts=PROMPTS, options=QUICK)
    with pytest.raises(ValueError, match="has no role 'teacher'"):
        tilted = dmdr(SHORT, warm=1, iterations=0, group=2)
        train(tilted, family(), out=tmp_path / "run", prompts=PROMPTS, reward=brightness, options=QUICK, start_from=plain.out)
    train(dmd2(SHORT, iterations=1), family(), out=tmp_path / "run", prompts=PROMPTS, options=QUICK)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "recipe.json").write_text('{"soup": 1}')
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        train(dmd2(SHORT, iterations=1), family(), out=tmp_path / "theirs", prompts=PROMPTS, options=QUICK)
