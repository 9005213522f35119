"""Trains recipes in the laboratory, through the same `iteration` as every other model, and measures the results."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from instep.data.prompt import as_prompts
from instep.diffusion.advantage import group_advantage
from instep.diffusion.rollout import Point, Rollout
from instep.diffusion.sampling import Step, sample
from instep.diffusion.transitions import Deterministic, Renoise
from instep.lab.metrics import measure
from instep.lab.mixture import labels
from instep.lab.networks import ExactFake, LatentRewardMLP, Particles, VelocityMLP
from instep.lab.world import World
from instep.methods.critics import FakeScoreLoss
from instep.methods.matching import DistributionMatching
from instep.methods.recipe import Recipe, RolloutConfig, Stage
from instep.methods.reward_gradient import RewardGradient
from instep.methods.role_config import AdamWConfig, RoleConfig
from instep.methods.term import Batch, View
from instep.recipes.common import Common
from instep.training.state import TrainedParams, TrainState
from instep.training.step import iteration

SAMPLES = 4000  # a member and measurement


def common(steps: int = 1, guidance: float = 1.0, *, condition_on_exit: bool = True, reuse: bool = True, critic_updates: int = 5) -> Common:
    """The options that work in the laboratory. Nothing is clipped: members of an ensemble must not feel each other's gradients.

    Members still share what is one number a run: the deviation of rewards where a stage shares one, the size that literal RT-DM weighs by, the
    norms behind weights that are shares, mean and deviation of a latent reward model's labels, and a step that is skipped because a gradient is not finite.
    """
    student = AdamWConfig(2e-3 if steps == 1 else 1e-3, betas=(0.5, 0.99), clip=1e9, decay=0.6)
    return Common(
        steps=steps,
        batch=256,
        guidance=guidance,
        shift=1.0,
        critic_updates=critic_updates,
        reuse=reuse,
        ema=None,
        condition_on_exit=condition_on_exit,
        student=student,
        fake=AdamWConfig(2e-3, betas=(0.5, 0.99), clip=1e9, decay=0.6),
    )


@dataclass(frozen=True)
class Snapshot:
    """Metrics and samples of every member at one iteration."""

    step: int
    metrics: tuple[dict[str, float], ...]
    samples: Tensor
    label: Tensor


@dataclass(frozen=True)
class LabRun:
    """The result of one recipe: its snapshots (the last is the end), its world, and its CPU seconds."""

    name: str
    recipe: Recipe
    state: TrainState
    world: World
    snapshots: tuple[Snapshot, ...]
    cpu_s: float

    @property
    def metrics(self) -> tuple[dict[str, float], ...]:
        return self.snapshots[-1].metrics


def ensemble_state(recipe: Recipe, world: World, start: VelocityMLP, seed: int, *, learned_teacher: VelocityMLP | None = None) -> TrainState:
    """Student and fake as copies of `start`; the exact teacher, or a learned one (which is the one that can have an adapter)."""
    config = recipe.roles.get("fake", RoleConfig())
    classes, width = world.mixture.label_count, start.width
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prediction_type = recipe.roles["student"].prediction_type or "velocity"
        guidance_range = recipe.roles["student"].guidance_range
        student = VelocityMLP(world.path, members=world.members, classes=classes, width=width, prediction_type=prediction_type, guidance_range=guidance_range)
        fake = VelocityMLP(world.path, members=world.members, classes=classes, width=width, exits=len(recipe.levels) if config.exits else 0, head=config.head)
        roles: dict[str, Any] = {"student": student, "fake": fake, "teacher": world.teacher}
        if learned_teacher is not None or recipe.roles["teacher"].lora is not None:
            lora = recipe.roles["teacher"].lora
            roles["teacher"] = VelocityMLP(
                world.path,
                members=world.members,
                classes=classes,
                width=width,
                rank=lora.rank if lora else 0,
                scale=recipe.roles["teacher"].scale,
            )
            _copy(learned_teacher or start, roles["teacher"])
        latent_reward = LatentRewardMLP(members=world.members, classes=classes, width=width) if recipe.latent_reward else None
    _copy(start, student)
    _copy(start, fake)
    copies = {name: deepcopy(student) for name in ("reference", "average") if name in recipe.roles}
    roles |= copies
    reference, average = (tuple(copies[name].parameters()) if name in copies else () for name in ("reference", "average"))
    trained = {name: TrainedParams(roles[name].trainable(), config.optim, config.ema) for name, config in recipe.roles.items() if config.optim is not None}
    if latent_reward is not None and recipe.latent_reward is not None:
        trained["latent_reward"] = TrainedParams(dict(latent_reward.named_parameters()), recipe.latent_reward.optim)
    reward_fn = None if world.reward == "none" else world.score
    rng = torch.Generator().manual_seed(seed)
    return TrainState(roles, trained, world.path, (2,), rng, reward_fn, reward_fn, reference=reference, average=average, latent_reward=latent_reward)


@torch.no_grad()
def _copy(source: VelocityMLP, to: VelocityMLP) -> None:
    """Weights of `source` where they exist; inputs that only `to` has (the exit) start at zero, adapters and heads as they were made."""
    mine: Any
    theirs: Any
    for mine, theirs in zip(to.layers, source.layers, strict=True):
        mine.weight.zero_()
        mine.weight[:, : theirs.weight.shape[1]] = theirs.weight
        mine.bias.copy_(theirs.bias)


def train(
    name: str,
    recipe: Recipe,
    world: World,
    state: TrainState,
    *,
    snapshots: int = 1,
    on_step: Callable[[], object] = lambda: None,
) -> LabRun:
    """Runs all stages of the recipe on an ensemble and measures it at `snapshots` evenly spaced moments, the end among them."""
    total, taken, began = recipe.steps, [], time.process_time()
    at = {round(total * (i + 1) / snapshots) for i in range(snapshots)}
    if snapshots > 1:
        taken.append(snapshot(state, recipe, world))
    while state.step < total:
        stage, progress = recipe.at(state.step)
        iteration(state, stage, [world.batch(stage, recipe.guidance, state.rng) for _ in range(stage.accumulate)], progress)
        on_step()
        if state.step in at:
            taken.append(snapshot(state, recipe, world))
    return LabRun(name, recipe, state, world, tuple(taken), time.process_time() - began)


def snapshot(state: TrainState, recipe: Recipe, world: World, n: int = SAMPLES) -> Snapshot:
    """Samples and metrics of every member, with a separate generator, so that measuring does not change training."""
    rng = torch.Generator().manual_seed(12345)
    rows = n * world.members
    cond = labels([str(i % world.mixture.label_count) for i in range(rows)], world.member(rows))
    null = labels([""] * rows, world.member(rows))
    x = recipe.sampling(state.roles["student"], cond, null, torch.randn(rows, 2, generator=rng), world.path, rng)
    parts = zip(x.split(n), cond.label.split(n), strict=True)
    metrics = tuple(measure(a, b, world.mixture, rng, world.rewarded) for a, b in parts)
    return Snapshot(state.step, metrics, x.unflatten(0, (world.members, n)), cond.label[:n])


def train_particles(
    name: str, recipe: Recipe, world: World, *, seed: int, n: int = 1024, steps: int = 600, spread: float = 1.0, on_step=lambda: None
) -> LabRun:
    """The recipe's last stage with free particles for a student and the exact fake in place of a trained one: its fixed point.

    The weights of the fake's critic become the weights of the exact fake's points; the group of a sample is its class. ValueError for
    terms that need a network (regression, a discriminator, the teacher's adapter).
    """
    stage, tilt = particle_stage(recipe, world, n, steps)
    rng = torch.Generator().manual_seed(seed)
    each = n // world.mixture.label_count
    label = torch.arange(world.mixture.label_count).repeat_interleave(each)
    particles = Particles(spread * torch.randn(n, 2, generator=rng))
    names = tuple(str(int(c)) for c in label)

    def log_weight(points: Tensor) -> Tensor:
        return -tilt * group_advantage(world.score(points, names), each, clip=stage.advantage.clip)

    fake = ExactFake(particles, world.path, label, log_weight if tilt else None)
    optim = AdamWConfig(3e-2, betas=(0.5, 0.99), clip=1e9, decay=0.6)
    state = TrainState(
        {"student": particles, "fake": fake, "teacher": world.teacher},
        {"student": TrainedParams(particles.trainable(), optim)},
        world.path,
        (2,),
        rng,
        None if world.reward == "none" else world.score,
        None if world.reward == "none" else world.score,
    )
    prompts = names[::each] if stage.group > 1 else names
    batch = Batch(as_prompts(prompts), labels(prompts), labels([""] * len(prompts)))
    began = time.process_time()
    for step in range(steps):
        iteration(state, stage, [batch], step / steps)
        on_step()
    x = particles.x.detach()
    metrics = measure(x, label, world.mixture, torch.Generator().manual_seed(12345), world.rewarded)
    end = Snapshot(steps, (metrics,), x[None], label)
    return LabRun(name, recipe, state, replace(world, members=1), (end,), time.process_time() - began)


def particle_stage(recipe: Recipe, world: World, n: int, steps: int) -> tuple[Stage, float]:
    """The recipe's last stage for n particles, and the tilt of its fake."""
    last = recipe.stages[-1]
    unfit = [term.name for term in last.terms if not isinstance(term, DistributionMatching | RewardGradient) or getattr(term, "adapter", None)]
    if unfit or last.needs - {"reward", "gradient"}:
        raise ValueError(f"student: {recipe.name} cannot run on particles ({', '.join(unfit)} needs a network); leave it out, or use --student network")
    tilts = [critic.tilt for critic in last.critics if isinstance(critic, FakeScoreLoss)]
    group = n // world.mixture.label_count if "reward" in last.needs else 1
    return Stage(last.name, steps, n, last.terms, (), RolloutConfig((1.0,)), group=group, advantage=last.advantage), tilts[0] if tilts else 0.0


@torch.no_grad()
def trajectories(run: LabRun, n: int = 60, member: int = 0) -> Tensor:
    """Samples of one member on their way through the student's steps, [steps + 1, n, 2]: the noise, then each step's estimate of x0."""
    world, rng = run.world, torch.Generator().manual_seed(7)
    cond = run.recipe.sampling.conditioned(labels([str(i % world.mixture.label_count) for i in range(n)], torch.full((n,), member)))
    noise = torch.randn(n, 2, generator=rng)
    seen = [noise]
    transition = Renoise() if run.recipe.sampler == "few-step" else Deterministic()

    def predict(step: Step) -> Tensor:
        return run.state.roles["student"](step.x_t, step.t, cond).x0

    sample(predict, noise, run.recipe.levels, world.path, transition, rng, lambda step, x0, x_next: seen.append(x0))
    return torch.stack(seen)


@torch.no_grad()
def force_field(run: LabRun, points: Tensor, draws: int = 64, member: int = 0) -> Tensor:
    """Mean force of the last matching term on samples placed at `points` [G, 2], over levels, noise and classes; zero for a recipe without."""
    found = [term for stage in run.recipe.stages for term in stage.terms if isinstance(term, DistributionMatching)]
    if not found:
        return torch.zeros_like(points)
    force = found[-1]
    world, rng = run.world, torch.Generator().manual_seed(7)
    total = torch.zeros_like(points)
    level, at_exit = run.recipe.levels[-1], torch.full((len(points),), len(run.recipe.levels) - 1)
    for i in range(draws):
        names = (str(i % world.mixture.label_count),) * len(points)
        cond = labels(names, torch.full((len(points),), member))
        placed = Point(points, points, points.new_full((len(points),), level), at_exit)
        # equal rewards: the adaptive operator's effect on an average sample
        alike = torch.zeros(len(points))
        rollout = Rollout(cond, 1, exit=placed, reward=alike, advantage=alike)
        view = View(run.state.roles, world.path, Batch(as_prompts(names), cond, labels([""] * len(points), cond.member)), 1.0, rng, rollout)
        total += force.explain(view).direction
    return total / draws
