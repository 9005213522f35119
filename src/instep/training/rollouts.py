"""The student's rollouts in an iteration: which samples are made, and how they are scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from instep.core.rows import slices
from instep.data.prompt import Prompt
from instep.diffusion.advantage import constant_groups, group_variance, several_advantages
from instep.diffusion.bands import in_band
from instep.diffusion.guidance import GuidedDenoiser
from instep.diffusion.noise import Rng, branch, several
from instep.diffusion.rollout import Point, Rollout, Where, draw_exits, rollout_few_step
from instep.diffusion.transfer import constants, widest
from instep.methods.recipe import Stage
from instep.methods.term import Critic, View
from instep.training.scalars import Scalars
from instep.training.state import TrainState

# micro-batches over which the rewards' variance is averaged in stages that share one scale
REWARD_HORIZON = 10
# updates of a critic whose fresh rollouts are made together at most
TOGETHER = 8


def live_points(stage: Stage, view: View) -> frozenset[Where]:
    """Returns the points of the rollout that carry the student's graph in this micro-batch; the final sample does only if its last step is in the band."""
    if stage.rollout is None or bool(in_band(torch.tensor(stage.rollout.levels[-1]), view.band)):
        return stage.live
    return stage.live - {"final"}


@dataclass(frozen=True)
class Draw:
    """What a rollout is made from: the exits of this process's samples [B], and the streams of their noise."""

    exit_id: Tensor
    rng: Rng


def draw(state: TrainState, stage: Stage, view: View, rng: Rng) -> Draw:
    """Draws the exits of a rollout, among the levels of the view's band; `rng` are the streams of its noise."""
    here = _levels_in_band(stage, view)
    exits = here[draw_exits(len(view.batch.prompts) * state.ranks.parts, stage.group, len(here), state.rng)]
    return Draw(exits[state.ranks.share(len(exits))], rng)


def roll_out(state: TrainState, stage: Stage, view: View, *, with_graph: bool, to_the_end: bool = False) -> Rollout | None:
    """Rolls out the student on the view's prompts, `stage.group` samples a prompt; returns None for stages that only use data."""
    if stage.rollout is None:
        return None
    own, shared_noise = [draw(state, stage, view, view.rng)], stage.rollout.shared_noise
    return rolled_out(state, stage, view, own, with_graph=with_graph, to_the_end=to_the_end, shared_noise=shared_noise)


def rolled_out(
    state: TrainState, stage: Stage, view: View, draws: Sequence[Draw], *, with_graph: bool = False, to_the_end: bool = False, shared_noise: float = 0.0
) -> Rollout:
    """The rollouts of one or several draws, made in the same calls, as one: the samples of each draw follow those of the one before (`Rollout.apart`).

    `shared_noise` is of one draw alone; samples that nobody compares, such as a critic's own, begin apart.
    """
    assert stage.rollout is not None
    levels, guidance = stage.rollout.levels, stage.rollout.guidance
    student = state.roles["student"]
    if guidance != 1:
        student = GuidedDenoiser(student, view.batch.null.repeat(stage.group).tiled(len(draws)), guidance)
    here = _levels_in_band(stage, view)
    with torch.set_grad_enabled(with_graph):
        return rollout_few_step(
            student,
            view.batch.cond.repeat(stage.group).tiled(len(draws)),
            levels,
            state.path,
            state.shape,
            torch.cat([one.exit_id for one in draws]),
            several([one.rng for one in draws]),
            group=stage.group * len(draws),
            shared_noise=shared_noise,
            exits=range(int(here[0]), int(here[-1]) + 1),
            live=live_points(stage, view) if with_graph else frozenset(),
            to_the_end=to_the_end or (stage.to_the_end and with_graph),
            through=stage.rollout.through,
            record="trajectory" in stage.needs and with_graph,
            transition=stage.rollout.transition,
            guidance=guidance,
            device=state.device,
            same_calls=state.ranks.parts if state.sharded else 0,
        )


def _levels_in_band(stage: Stage, view: View) -> Tensor:
    """Which of the student's levels are in the view's band."""
    assert stage.rollout is not None
    return in_band(torch.tensor(stage.rollout.levels), view.band).nonzero().flatten()


def fresh_views(state: TrainState, stage: Stage, views: Sequence[View], critic: Critic, log: Scalars) -> Iterator[list[View]]:
    """The views of each update of a critic that does not re-use the student's rollouts, each with a fresh one; it is scored if the critic needs rewards.

    The student stays as it is meanwhile, so rollouts of several updates are made in the same calls: fewer and larger ones, which cost less a sample. What is
    drawn does not depend on how many these are.
    """
    if stage.rollout is None:
        yield from [[view.with_rollout(None) for view in views]] * critic.updates
        return
    scored = "reward" in critic.needs
    draws = [[draw(state, stage, view, branch(view.rng)) for view in views] for _ in range(critic.updates)]
    rows = len(views[0].batch.prompts) * stage.group
    for part in slices(critic.updates, TOGETHER if state.micro_batch is None else min(max(state.micro_batch // rows, 1), TOGETHER)):
        made = []
        for view, drawn in zip(views, zip(*draws[part], strict=True), strict=True):
            rollout = rolled_out(state, stage, view, drawn, to_the_end=scored and stage.reward_on == "final")
            made.append(rollout.apart(len(drawn)))
        for rollouts in zip(*made, strict=True):
            scores = [score_rollout(state, stage, view, rollout, log) if scored else rollout for view, rollout in zip(views, rollouts, strict=True)]
            yield [view.with_rollout(rollout) for view, rollout in zip(views, scores, strict=True)]


@torch.no_grad()
def score_rollout(state: TrainState, stage: Stage, view: View, rollout: Rollout | None, log: Scalars) -> Rollout | None:
    """Adds the rewards of the samples that the stage scores and their advantages within groups; groups of equal rewards get advantage 0 and are counted."""
    if rollout is None or "reward" not in stage.needs:
        return rollout
    if state.reward_fn is None:
        raise ValueError(f"reward: stage {stage.name!r} needs one and none was given; pass reward= to train(), or choose a recipe without")
    prompts = [prompt for prompt in view.batch.prompts for _ in range(stage.group)]
    x = rollout.point(stage.reward_on).x.detach()
    each = torch.cat([state.reward_fn(x[rows], prompts[rows]) for rows in scoring_slices(prompts, stage.group)]).to(x)
    each = each[:, None] if each.ndim == 1 else each
    weights = constants(state.weights, each)
    reward = weights[0] * each[:, 0] if len(weights) == 1 else each @ weights
    log.add("reward/train", reward.mean())
    for i in range(len(weights) if len(weights) > 1 else 0):
        log.add(f"reward/train/{i}", each[:, i].mean())
    log.add("reward/spread", reward.reshape(-1, stage.group).std(1, unbiased=False).mean())
    log.add("reward/constant_groups", constant_groups(reward, stage.group) * stage.group / len(reward))
    deviations: Sequence[Tensor | None] = [None] * len(weights)
    if stage.advantage.spread == "none":
        deviations = [torch.ones(()) for _ in weights]
    elif stage.advantage.spread == "run":
        now = state.ranks.mean(torch.stack([group_variance(column, stage.group).to(widest(column.device)) for column in each.unbind(1)])).unbind()
        before = state.reward_variance or now
        state.reward_variance = [old + (new - old) / REWARD_HORIZON for old, new in zip(before, now, strict=True)]
        deviations = [variance.sqrt() for variance in state.reward_variance]
    return replace(rollout, reward=reward, advantage=several_advantages(each, state.weights, stage.group, deviations, stage.advantage.clip))


def scoring_slices(prompts: Sequence[Prompt], group: int) -> list[slice]:
    """Returns the slices of rows to score in one call: all rows, unless two adjacent groups share a prompt, which a ranker would treat as one group."""
    starts = [0] + [i for i in range(group, len(prompts), group) if prompts[i] == prompts[i - 1]]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(prompts)], strict=True)]


def recompute(state: TrainState, stage: Stage, view: View) -> Rollout | None:
    """Returns the stored rollout with its live points predicted again by the current student, for a further inner epoch."""
    rollout, live = view.rollout, live_points(stage, view)
    if rollout is None:
        return None

    def predicted(where: Where, point: Point | None) -> Point | None:
        return point.predicted_again(state.roles["student"], rollout.cond) if point and where in live else point

    return replace(rollout, exit=predicted("exit", rollout.exit), final=predicted("final", rollout.final))
