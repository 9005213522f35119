"""Five shapes of method through the same `training/step.py`, in a minimal exact laboratory.

They settle the central types: two live points (DM-Align), two losses on the fake (DMD2 + GAN), a ratio over inner epochs (GRPO),
offline preferences without a rollout, and free particles with an exact fake.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from instep.diffusion.level_windows import HighLow
from instep.diffusion.path import RectifiedFlow
from instep.diffusion.transitions import Renoise
from instep.lab.mixture import ExactTeacher, Mixture, labels
from instep.lab.networks import ExactFake, Particles, VelocityMLP
from instep.methods.adversarial import Adversarial
from instep.methods.align import AlignGroup
from instep.methods.critics import FakeScoreGANLoss, FakeScoreLoss
from instep.methods.matching import DistributionMatching
from instep.methods.preference import Preference
from instep.methods.recipe import RolloutConfig, Stage
from instep.methods.role_config import AdamWConfig
from instep.methods.term import Batch, Objective, Pairs, View, as_force
from instep.training.state import TrainedParams, TrainState
from instep.training.step import iteration

PATH = RectifiedFlow()
RING = Mixture.ring()
LEVELS = (1.0, 0.75, 0.5, 0.25)
OPTIM = AdamWConfig(2e-3, betas=(0.5, 0.99), clip=5.0)


def prompts(n: int, rng: torch.Generator) -> tuple[str, ...]:
    return tuple(str(int(c)) for c in torch.randint(0, 2, (n,), generator=rng))


def batch_of(names: tuple[str, ...], real: Tensor | None = None, pairs: Pairs | None = None) -> Batch:
    return Batch(names, labels(names), labels([""] * len(names)), real, pairs)


def mlp_state(*, exits: int = 0, reward_fn=None, seed: int = 0, head: bool = False) -> TrainState:
    torch.manual_seed(seed)
    student, fake = VelocityMLP(PATH), VelocityMLP(PATH, exits=exits, head=head)
    trained = {"student": TrainedParams(student.trainable(), OPTIM), "fake": TrainedParams(fake.trainable(), OPTIM)}
    roles = {"student": student, "fake": fake, "teacher": ExactTeacher(RING, PATH)}
    return TrainState(roles, trained, PATH, (2,), torch.Generator().manual_seed(seed), reward_fn)


def quality(x: Tensor) -> float:
    """Share of samples within 3 sigma of a mode."""
    return float((torch.cdist(x, RING.means).amin(1) < 3 * RING.sigma).float().mean())


def test_dm_align_has_two_live_points():
    """Both forces reach the student, and the sum of their gradients is the gradient of the sum."""
    state = mlp_state(reward_fn=lambda x, names: x[:, 0])
    stage = Stage("align", 1, 32, (DistributionMatching(weight=0.5), AlignGroup(weight=0.5, on="final")), (FakeScoreLoss(),), RolloutConfig(LEVELS), group=4)
    assert stage.live == {"exit", "final"} and stage.to_the_end

    def gradient(terms) -> Tensor:
        one = mlp_state(reward_fn=lambda x, names: x[:, 0])
        seen: list[Tensor] = []
        student = one.trained["student"]

        def step(lr, optim):
            seen.append(torch.cat([p.grad.flatten() for p in student.parameters.values()]))
            return torch.tensor(0.0), torch.tensor(True)

        student.step = step
        iteration(one, Stage("align", 1, 32, terms, (), RolloutConfig(LEVELS), group=4), [batch_of(prompts(8, one.rng))], 0.0)
        return seen[0]

    dm, group = DistributionMatching(weight=0.5), AlignGroup(weight=0.5, on="final")
    both = gradient((dm, group))
    assert both.norm() > 0
    # the same rollout, the same random numbers: silence one of the two by its weight
    silent_group = gradient((dm, AlignGroup(weight=0.0, on="final")))
    silent_dm = gradient((DistributionMatching(weight=0.0), group))
    torch.testing.assert_close(both, silent_group + silent_dm, rtol=1e-4, atol=1e-6)
    log = iteration(state, stage, [batch_of(prompts(8, state.rng))], 0.0)
    assert {"force/dm/norm", "force/group/norm", "force/cosine/dm~group", "critic/fake", "reward/train"} <= log.keys()


def test_gan_puts_two_losses_on_the_fake():
    state = mlp_state(head=True)
    terms = (DistributionMatching(), Adversarial(weight=0.05))
    stage = Stage("gan", 1, 64, terms, (FakeScoreGANLoss(updates=5, gan_weight=0.1),), RolloutConfig((1.0,)))
    before = state.roles["fake"].head[0].weight.detach().clone()
    losses = []
    for _ in range(60):
        names = prompts(64, state.rng)
        real = RING.sample(labels(names).label, state.rng)
        losses.append(iteration(state, stage, [batch_of(names, real)], 0.0))
    assert not torch.equal(before, state.roles["fake"].head[0].weight), "the head is trained with the fake"
    assert "force/cosine/dm~gan" in losses[-1]
    assert sum(log["critic/fake"] for log in losses[-10:]) / 10 < 0.9 * losses[0]["critic/fake"]
    # and the head has learnt something: real samples score above a point far from every mode
    t, cond = torch.full((64,), 0.1), labels(names)
    with torch.no_grad():
        on, off = (state.roles["fake"](x, t, cond).logit.mean() for x in (real, torch.zeros_like(real)))
    assert on > off


RATIOS: list[float] = []


@dataclass(frozen=True, kw_only=True)
class ClippedPolicy(Objective):
    """GRPO's clipped surrogate on the student's own re-noise steps."""

    name: str = "grpo"
    clip: float = 0.2

    @property
    def needs(self):
        return frozenset({"reward", "trajectory"})

    def __call__(self, view: View) -> Iterator[Tensor]:
        path = view.samples.trajectory
        for s in range(len(path.t)):
            t, t_next = (level.expand(len(path.x_t[s])) for level in (path.t[s], path.t_next[s]))
            x0 = view.roles["student"](path.x_t[s], t, view.samples.cond).x0
            ratio = (Renoise().log_prob(view.path, x0, path.x_t[s], path.x_next[s], t_next, t_next) - path.log_prob[s]).exp()
            RATIOS.append(float((ratio - 1).abs().max().detach()))
            a = view.samples.advantage
            yield -torch.minimum(ratio * a, ratio.clamp(1 - self.clip, 1 + self.clip) * a).mean() / len(path.t)


def test_grpo_with_two_inner_epochs_leaves_ratio_one():
    state = mlp_state(reward_fn=lambda x, names: x[:, 0])
    stage = Stage("grpo", 1, 64, (ClippedPolicy(),), (), RolloutConfig(LEVELS), group=8, inner_epochs=2)
    RATIOS.clear()
    log = iteration(state, stage, [batch_of(prompts(8, state.rng))], 0.0)
    assert len(RATIOS) == 6, "three stochastic steps of four levels, in two epochs"
    assert max(RATIOS[:3]) == 0.0, "before the first update the policy is the one that rolled out"
    assert min(RATIOS[3:]) > 1e-4, "in the second epoch it has moved"
    assert state.trained["student"].steps == 2 and "objective/grpo" in log
    reward = [iteration(state, stage, [batch_of(prompts(32, state.rng))], 0.0)["reward/train"] for _ in range(80)]
    assert sum(reward[-10:]) / 10 > sum(reward[:10]) / 10 + 0.1, "and it raises the reward"


def test_offline_preferences_need_no_rollout():
    state = mlp_state()
    reference = VelocityMLP(PATH)
    reference.load_state_dict(state.roles["student"].state_dict())
    state.roles, state.reference = {**state.roles, "reference": reference}, tuple(reference.parameters())
    stage = Stage("apo", 1, 128, (Preference(beta=20.0, levels=HighLow(50), pairs="offline"),))
    history = []
    for _ in range(120):
        names = prompts(128, state.rng)
        label = labels(names).label
        good, bad = RING.sample(label, state.rng), RING.sample(label, state.rng)
        better = good[:, 0] > bad[:, 0]
        pairs = Pairs(torch.where(better[:, None], good, bad), torch.where(better[:, None], bad, good))
        history.append(iteration(state, stage, [batch_of(names, pairs=pairs)], 0.0)["objective/dpo"])
    # at policy = reference each of the window's five terms is log 2, and the log has their mean
    assert abs(history[0] - math.log(2)) < 1e-6
    assert sum(history[-20:]) / 20 < 0.95 * history[0]


def test_particles_find_the_mixture():
    """The fixed point of distribution matching is the teacher's distribution: every mode, and a spread that is not collapsed."""
    rng = torch.Generator().manual_seed(0)
    particles = Particles(torch.randn(512, 2, generator=rng))
    roles = {"student": particles, "fake": ExactFake(particles, PATH), "teacher": ExactTeacher(RING, PATH)}
    optim = AdamWConfig(3e-2, betas=(0.5, 0.99), clip=1e9, decay=0.6)
    state = TrainState(roles, {"student": TrainedParams(dict(particles.named_parameters()), optim)}, PATH, (2,), rng)
    stage = Stage("particles", 500, 512, (DistributionMatching(),), (), RolloutConfig((1.0,)))
    batch = batch_of(("",) * 512)
    for step in range(stage.steps):
        iteration(state, stage, [batch], step / stage.steps)
    x = particles.x.detach()
    share = torch.bincount(torch.cdist(x, RING.means).argmin(1), minlength=8) / len(x)
    assert quality(x) > 0.9
    assert 0.5 * (share - 1 / 8).abs().sum() < 0.08, "no mode is lost"


@pytest.mark.slow
def test_student_learns_with_a_conditioned_fake():
    """Distribution matching through networks: four steps, one fake told the exit; quality rises far above the start."""
    state = mlp_state(exits=4)
    stage = Stage("dmd", 400, 256, (DistributionMatching(),), (FakeScoreLoss(condition_on_exit=True),), RolloutConfig(LEVELS))
    assert as_force(torch.ones(4, 2)).sum() == 1
    for step in range(400):
        iteration(state, stage, [batch_of(prompts(256, state.rng))], step / 400)
    from instep.diffusion.sampling import sample_few_step

    names = prompts(1000, state.rng)
    noise = torch.randn(1000, 2, generator=state.rng)
    x = sample_few_step(state.roles["student"], labels(names), noise, LEVELS, PATH, state.rng)
    right = ((x[:, 1] < 0).long() == labels(names).label).float().mean()
    assert quality(x) > 0.3 and right > 0.9
