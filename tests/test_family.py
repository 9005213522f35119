"""The matching family: operators, levels, external forces, the tilted critic and the teacher's adapter, each against a closed form."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_forces import F64, Fixed, Linear, view

from instep.diffusion.advantage import constant_groups, group_advantage
from instep.diffusion.guidance import guide
from instep.diffusion.levels import AboveExit, AnnealedBeta, LevelSampler
from instep.diffusion.path import RectifiedFlow, VariancePreserving
from instep.diffusion.prediction import Prediction, at_scale, score_of_x0
from instep.lab.mixture import ExactTeacher, LabelCondition, Mixture, labels
from instep.lab.networks import VelocityMLP
from instep.lab.run import common, ensemble_state
from instep.lab.world import World
from instep.methods.adapted_teacher import Annealed
from instep.methods.adversarial import Adversarial
from instep.methods.critics import FakeScoreGANLoss, FakeScoreLoss, tilted
from instep.methods.matching import DistributionMatching
from instep.methods.operators import Adaptive, Decoupled, Displacements, NaiveAdaptive, RewardTilted, Standard
from instep.methods.recipe import Advantage
from instep.methods.regression import Regression
from instep.methods.reward_gradient import RewardGradient
from instep.methods.term import Stored
from instep.recipes.amd import amd, naive_adaptive
from instep.recipes.decoupled_dmd import decoupled_dmd
from instep.recipes.dmd import dmd, dmd2
from instep.recipes.dmdr import dmdr
from instep.recipes.magic import magic
from instep.recipes.refl import refl
from instep.training.step import iteration

PATH = RectifiedFlow()


class AnyLevel(LevelSampler):
    """A level of its own for every sample."""

    def __call__(self, n, *, progress, t_exit, rng):
        return torch.rand(n, generator=rng, dtype=F64) * 0.9 + 0.05


class ByLabel:
    """Estimates x0 = t for a class and x0 = -t without one: guidance is visible, and so is the level it was taken at."""

    def __call__(self, x_t, t, cond):
        sign = torch.where(cond.label < 0, -1.0, 1.0).to(x_t)
        x0 = (sign * t)[:, None].expand_as(x_t)
        return Prediction(x0, x0)


def ring_view(n: int = 16, group: int = 4, advantage=None):
    ring = Mixture.ring()
    ring = Mixture(ring.means.double(), ring.sigma, ring.classes)
    rng = torch.Generator().manual_seed(5)
    x = 2 * torch.randn(n, 2, generator=rng, dtype=F64)
    roles = {"teacher": ExactTeacher(ring, PATH), "fake": Linear(0.6, 0.2)}
    return view(x, roles, group=group, advantage=advantage)


def direction(force: DistributionMatching, advantage=None) -> torch.Tensor:
    return force.explain(ring_view(advantage=advantage)).direction


def test_the_decomposition_of_eq_9_is_exact():
    """real - fake = dm + ca, with the guided teacher of the ring."""
    seen = {}

    class Watch(Standard):
        def __call__(self, d, advantage, reward=None):
            seen["d"] = d
            return super().__call__(d, advantage)

    direction(DistributionMatching(levels=AnyLevel(), guidance=3.5, operator=Watch()))
    d = seen["d"]
    torch.testing.assert_close(d.dm + d.ca, d.real - d.fake, rtol=0, atol=1e-13)
    assert d.ca.abs().max() > 0.01, "guidance does something here"


def test_amd_without_sensitivity_is_decoupled_is_standard():
    a = torch.linspace(-1, 1, 16, dtype=F64)
    make = lambda operator: direction(DistributionMatching(levels=AnyLevel(), guidance=3.5, operator=operator), a)  # noqa: E731
    standard = make(Standard())
    torch.testing.assert_close(make(Decoupled()), standard, rtol=0, atol=1e-12)
    torch.testing.assert_close(make(Adaptive(0.0)), standard, rtol=0, atol=1e-12)
    torch.testing.assert_close(make(NaiveAdaptive(0.0)), standard, rtol=0, atol=1e-12)
    assert (make(Adaptive(0.5)) - standard).abs().max() > 1e-3


def test_adaptive_operators_by_hand():
    one = lambda v: torch.tensor([[v]], dtype=F64)  # noqa: E731
    d = Displacements(real=one(5.0), fake=one(2.0), dm=one(1.0), ca=one(2.0))
    a = torch.tensor([0.5], dtype=F64)
    # s = .4: alpha = 1.2, beta = .8
    assert Adaptive(0.4)(d, a).item() == pytest.approx(0.8 * 1 + 1.2 * 2)
    assert NaiveAdaptive(0.4)(d, a).item() == pytest.approx(1.2 * 5 - 0.8 * 2)
    with pytest.raises(ValueError, match="sensitivity: -1 is not allowed"):
        Adaptive(-1)


def test_naive_adaptation_leaves_a_multiple_of_the_distance():
    """alpha d_real - beta d_fake where both teachers agree is not zero but (alpha - beta)(x - x0): why Eq. 8 has no rest at the manifold."""
    x0, x = torch.tensor([[1.0, -2.0]], dtype=F64), torch.tensor([[4.0, 0.0]], dtype=F64)
    zero = torch.zeros_like(x)
    d, a = Displacements(x - x0, x - x0, zero, zero), torch.tensor([-0.5], dtype=F64)
    torch.testing.assert_close(NaiveAdaptive(0.6)(d, a), -0.6 * (x - x0))
    assert Adaptive(0.6)(d, a).abs().max() == 0


def test_potential_of_proposition_3_1():
    """V = |x - real|^2 / 2 - |x - fake|^2 / 2 with the estimates held has the gradient d_real - d_fake."""
    seen = DistributionMatching(levels=AnyLevel(), guidance=2.0).explain(ring_view())
    x = seen.x.clone().requires_grad_()
    potential = 0.5 * (x - seen.real).square().sum() - 0.5 * (x - seen.fake).square().sum()
    (gradient,) = torch.autograd.grad(potential, x)
    torch.testing.assert_close(gradient, Standard()(Displacements(seen.x - seen.real, seen.x - seen.fake, x, x), None))
    scale = (seen.x - seen.real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(gradient / scale, seen.direction)


def test_guidance_at_levels_of_its_own():
    """DM sees the level .5 and CA its own, .9, where the guided estimate is -.9 + 1.8 w; each is divided by the distance at its own level."""

    class High(Fixed):
        def __call__(self, n, *, progress, t_exit, rng):
            return torch.full((n,), 0.9, dtype=F64)

    x = torch.tensor([[4.0, 6.0]], dtype=F64)
    roles = {"teacher": ByLabel(), "fake": Linear(0.0, 0.0)}
    for w in (1.0, 3.0):
        seen = DistributionMatching(levels=Fixed(), ca_levels=High(), guidance=w, operator=Decoupled()).explain(view(x, roles))
        dm, ca = -0.5 / (x - 0.5).abs().mean(), -(w - 1) * 1.8 / (x - (-0.9 + 1.8 * w)).abs().mean()
        torch.testing.assert_close(seen.direction, (dm + ca).expand(1, 2))


def test_levels_above_the_exit():
    rng = torch.Generator().manual_seed(0)
    t_exit = torch.tensor([0.25, 0.75, 1.0]).repeat_interleave(2000)
    t = AboveExit(low=0.02, high=0.98)(6000, progress=0.0, t_exit=t_exit, rng=rng)
    low, middle, first = t.split(2000)
    assert low.min() > 0.25 and middle.min() > 0.75 and t.max() <= 0.98
    assert abs(float(low.mean()) - (0.25 + 0.98) / 2) < 0.02 and abs(float(middle.mean()) - (0.75 + 0.98) / 2) < 0.01
    assert first.min() < 0.05 and abs(float(first.mean()) - 0.5) < 0.02, "nothing lies above the first exit: all levels serve"
    with pytest.raises(ValueError, match="low, high"):
        AboveExit(low=0.9, high=0.2)


class Headed(Linear):
    """A denoiser whose discriminator's logit is sum(x_t^2) / 10 - t."""

    def __call__(self, x_t, t, cond):
        return replace(super().__call__(x_t, t, cond), logit=x_t.square().sum(1) / 10 - t)


def test_adversarial_force_is_autograd_of_its_loss():
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    seen = view(x, {"fake": Headed(0.5)})
    g = Adversarial(levels=Fixed())(seen)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    live = x.clone().requires_grad_()
    x_t = 0.5 * live + 0.5 * noise
    loss = -torch.log(torch.sigmoid(x_t.square().sum(1) / 10 - 0.5)).mean()
    torch.testing.assert_close(g, torch.autograd.grad(loss, live)[0])
    # by hand: -(1 - D) dl/dx_t dx_t/dx / B
    by_hand = -(1 - torch.sigmoid(x_t.square().sum(1) / 10 - 0.5))[:, None] * (x_t / 5) * 0.5 / len(x)
    torch.testing.assert_close(g, by_hand.detach())


def test_discriminator_losses_by_hand():
    x, real = torch.full((3, 2), 1.0, dtype=F64), torch.full((3, 2), 2.0, dtype=F64)
    seen = view(x, {"fake": Headed(0.5)})
    seen = replace(seen, batch=replace(seen.batch, real=real))
    _, on_real, on_fake = FakeScoreGANLoss(levels=Fixed(), gan_levels=Fixed(), gan_weight=0.1).losses(seen)
    rng = torch.Generator().manual_seed(0)
    noises = [torch.randn(3, 2, generator=rng, dtype=F64) for _ in range(3)]
    logit = lambda x, noise: (0.5 * x + 0.5 * noise).square().sum(1) / 10 - 0.5  # noqa: E731
    assert on_real.item() == pytest.approx(0.1 * F.softplus(-logit(real, noises[1])).mean().item())
    assert on_fake.item() == pytest.approx(0.1 * F.softplus(logit(x, noises[2])).mean().item())


def test_reward_force_is_autograd_of_its_loss(monkeypatch):
    import instep.methods.reward_gradient as module

    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    reward = lambda x, prompts: x.sin().sum(1) * torch.tensor([float(p) + 1 for p in prompts], dtype=F64)  # noqa: E731
    seen = replace(view(x, {}), reward_grad_fn=reward)
    live = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(-reward(live, seen.batch.prompts).mean(), live)
    for elements in (2**18, 4):  # all at once, and two rows at a time
        monkeypatch.setattr(module, "CHUNK", elements)
        torch.testing.assert_close(RewardGradient()(seen), expected)


def test_regression_pulls_a_sample_to_what_the_teacher_made_of_its_noise():
    """Its gradient with respect to G(z) is (x - x_gt) / numel, and it asks the student at pure noise."""
    noise, target = torch.randn(4, 2, dtype=F64), torch.randn(4, 2, dtype=F64)
    cond = LabelCondition(label=torch.zeros(4, dtype=torch.long))
    made = []

    class Student(Linear):
        def __call__(self, x_t, t, cond):
            assert bool((t == 1).all())
            made.append((0.3 * x_t).requires_grad_())
            return Prediction(made[-1], made[-1])

    seen = view(torch.zeros(4, 2, dtype=F64), {"student": Student(1.0)})
    seen = replace(seen, batch=replace(seen.batch, stored=Stored(cond, noise, target)))
    (loss,) = Regression()(seen)
    (gradient,) = torch.autograd.grad(loss, made[0])
    torch.testing.assert_close(gradient, (0.3 * noise - target) / 8)


def test_the_critics_weight_is_applied_once():
    """exp(-a): an advantage of 1 counts 1/e as much. The paper's Algorithm 1 multiplies twice, which would be 1/e^2."""
    error, a = torch.tensor([2.0, 2.0]), torch.tensor([1.0, -1.0])
    torch.testing.assert_close(tilted(error, a, 1.0), torch.tensor([2 / math.e, 2 * math.e]))
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    a = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=F64)
    seen = view(x, {"fake": Linear(0.5)}, group=4, advantage=a)
    (plain,) = FakeScoreLoss(levels=Fixed(), target="x0").losses(view(x, {"fake": Linear(0.5)}, group=4))
    (weighed,) = FakeScoreLoss(levels=Fixed(), target="x0", tilt=1.0).losses(seen)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    each = (0.5 * (0.5 * x + 0.5 * noise) - x).square().mean(1)
    assert plain.item() == pytest.approx(each.mean().item()) and weighed.item() == pytest.approx(((-a).exp() * each).mean().item())
    assert FakeScoreLoss(tilt=1.0).needs == {"reward"} and not FakeScoreLoss().needs


def test_a_constant_group_moves_as_under_plain_matching():
    """No spread in reward: no advantage, so both weights are 1 and the critic weighs all alike."""
    a = group_advantage(torch.full((16,), 0.3, dtype=F64), 4, clip=1.0)
    assert not a.any()
    force = DistributionMatching(levels=AnyLevel(), guidance=2.0)
    torch.testing.assert_close(direction(replace(force, operator=Adaptive(0.7)), a), direction(force), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("k", "value"), [(12, 12.7), (3, 1000.1), (7, 100.1), (6, 25.3)])
def test_equal_rewards_of_any_size_give_no_advantage(k, value):
    """The mean of equal float32 numbers is off by rounding of their own size; divided by eps it was an advantage near 1."""
    reward = torch.full((k,), value)
    assert not group_advantage(reward, k, clip=1.0).any() and constant_groups(reward, k) == 1
    reward[0] += 0.01 * value
    assert group_advantage(reward, k).abs().max() > 1 and constant_groups(reward, k) == 0


def test_advantages_are_clipped_where_the_stage_says_so():
    reward = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 1])
    assert group_advantage(reward, 8).max() > 2.5
    clipped = group_advantage(reward, 8, clip=1.0)
    assert clipped.max() == 1 and clipped.min() > -1
    assert amd().stages[-1].advantage == Advantage("group", 1.0)
    with pytest.raises(ValueError, match="clip: 0 is not allowed"):
        Advantage(clip=0)


def test_the_adapters_scale_falls_to_zero():
    anneal = Annealed(0.5, 0.8)
    assert anneal.at(0.0) == 0.5 and anneal.at(0.4) == pytest.approx(0.25) and anneal.at(0.8) == pytest.approx(0) and anneal.at(1.0) == pytest.approx(0)
    with pytest.raises(ValueError, match="start: 1.0 is not allowed"):
        Annealed(1.0)
    with pytest.raises(ValueError, match="ExactTeacher has no adapter to scale"):
        at_scale(ExactTeacher(Mixture.ring(), PATH), 0.5)


def test_magic_trains_the_teachers_adapter_and_nothing_else_of_it():
    world = World.named("ring8", members=2)
    recipe = magic(common(), iterations=3)
    start = VelocityMLP(PATH, members=2)
    state = ensemble_state(recipe, world, start, 0)
    teacher = state.roles["teacher"]
    before = {key: p.detach().clone() for key, p in teacher.named_parameters()}
    cond = labels(["0", "1"], torch.tensor([0, 1]))
    x, t = torch.randn(2, 2), torch.tensor([0.3, 0.7])
    plain = teacher(x, t, cond).x0.detach()
    for step in range(3):
        stage, progress = recipe.at(step)
        iteration(state, stage, [world.batch(stage, 1.0, state.rng)], progress)
    changed = {key for key, p in teacher.named_parameters() if not torch.equal(p, before[key])}
    assert changed and all(".adapter_" in key for key in changed)
    torch.testing.assert_close(teacher(x, t, cond).x0, plain, rtol=0, atol=0)
    assert (teacher.scaled(1.0)(x, t, cond).x0 - plain).abs().max() > 1e-6, "adapted where a force asks for it"


@pytest.mark.parametrize("path", [PATH, VariancePreserving.linear()])
@pytest.mark.parametrize("label", [-1, 0, 1])
def test_the_exact_teacher_is_autograd_of_the_log_density(path, label):
    """Tweedie: the score of the noised mixture by autograd, on both paths, conditional and unconditional."""
    ring = Mixture.ring()
    ring = Mixture(ring.means.double(), ring.sigma, ring.classes)
    rng = torch.Generator().manual_seed(2)
    x = (2 * torch.randn(64, 2, generator=rng, dtype=F64)).requires_grad_()
    t, cond = torch.rand(64, generator=rng, dtype=F64) * 0.9 + 0.05, LabelCondition(label=torch.full((64,), label))
    (score,) = torch.autograd.grad(ring.log_density(path, x, t, cond.label).sum(), x)
    x0 = ExactTeacher(ring, path)(x.detach(), t, cond).x0
    torch.testing.assert_close(score_of_x0(path, x.detach(), t, x0), score, rtol=1e-9, atol=1e-9)


def test_members_of_an_ensemble_share_nothing():
    """Rows in any order reach their own member: the same numbers as that member alone, and no gradient for the others."""
    torch.manual_seed(0)
    net = VelocityMLP(PATH, members=3, exits=4, head=True)
    member = torch.tensor([2, 0, 0, 2, 1, 2, 0])
    cond = replace(labels(["0", "1", "", "1", "0", "0", "1"], member), exit_id=torch.tensor([0, 1, 2, 3, 0, 1, 2]))
    x, t = torch.randn(7, 2), torch.rand(7)
    torch.nn.init.normal_(net.head[1].weight)
    together = net(x, t, cond)
    for i in range(3):
        alone = VelocityMLP(PATH, members=1, exits=4, head=True)
        with torch.no_grad():
            for mine, theirs in zip(alone.parameters(), net.parameters(), strict=True):
                mine.copy_(theirs[i : i + 1])
        rows = member == i
        answer = alone(x[rows], t[rows], cond[rows])
        torch.testing.assert_close(together.x0[rows], answer.x0, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together.logit[rows], answer.logit, rtol=1e-5, atol=1e-6)
    net.zero_grad()
    net(x, t, cond).v[member == 1].square().sum().backward()
    assert all((p.grad[[0, 2]] == 0).all() and (p.grad[1] != 0).any() for p in net.layers[0].parameters())


def test_recipes_differ_in_exactly_the_cells_of_the_table():
    base = common(4, 3.0)
    plain = dmd2(base, iterations=5).stages[0]
    force, critic = plain.terms[0], plain.critics[0]
    assert dmd(base, iterations=5).stages[0].terms == (force, Regression(weight=0.25)) and dmd(base, iterations=5).stages[0].critics == (critic,)
    with_gan = dmd2(base, iterations=5, gan=0.01).stages[0]
    assert with_gan.terms[0] == force and isinstance(with_gan.terms[1], Adversarial) and with_gan.terms[1].weight == 0.01
    stage = amd(base, iterations=5).stages[-1]
    assert stage.terms == (replace(force, operator=Adaptive(0.5)),) and stage.critics == (replace(critic, tilt=1.0),)
    assert decoupled_dmd(base, iterations=5).stages[0].terms == (replace(force, operator=Decoupled(), ca_levels=AboveExit(shift=base.shift)),)
    assert naive_adaptive(base, iterations=5).stages[-1].terms == (replace(force, operator=NaiveAdaptive(0.5)),)
    stage = refl(base, iterations=5).stages[-1]
    assert stage.terms == (force, RewardGradient(weight=0.5, unit="share")) and stage.critics == (critic,)
    stage = dmdr(base, warm=5, iterations=0, dyna_dg=0.0).stages[0]
    assert stage.terms == (replace(force, operator=RewardTilted("zscore"), levels=AnnealedBeta(shift=base.shift)),)
    for find in (dmd, dmd2, decoupled_dmd, magic, amd, refl):
        two = find(base, distil=2, iterations=1)
        assert [s.steps for s in two.stages] == [2, 1] and two.stages[0].terms == (force,) and two.stages[0].name == "distil", "the two-stage protocol"
    stage = magic(base, iterations=5).stages[0]
    assert stage.terms == (replace(force, adapter=Annealed()),) and stage.critics[0] == critic and stage.critics[1].role == "teacher"


def test_guide_is_what_the_force_uses():
    """The one-call and the two-level forms of the guided estimate agree where levels do."""
    c, u = torch.tensor([2.0], dtype=F64), torch.tensor([0.5], dtype=F64)
    assert (c + guide(c, u, 3.0) - c).item() == pytest.approx(guide(c, u, 3.0).item()) == pytest.approx(0.5 + 3 * 1.5)


def test_every_operator_that_needs_rewards_says_so():
    for operator, needs in ((Standard(), set()), (Decoupled(), set()), (Adaptive(), {"reward"}), (NaiveAdaptive(), {"reward"}), (RewardTilted(), {"reward"})):
        assert DistributionMatching(operator=operator).needs == needs
