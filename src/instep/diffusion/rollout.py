"""Few-step rollouts of the student with a supervised exit.

A few-step student predicts x0 at level t_1 = 1, re-noises it with fresh noise to t_2, and so on. Training supervises one
of the steps, the *exit* (backward simulation, DMD2). Samples are rolled out to the inputs of their exits without a graph; then one call predicts all
exits, each at its own level, with the student's graph. Nothing after the exit is computed unless a method asks for the final sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from instep.diffusion.noise import Rng, copy_of, randn
from instep.diffusion.path import Path
from instep.diffusion.prediction import Condition, Denoiser
from instep.diffusion.sampling import Step, sample
from instep.diffusion.transfer import to_device
from instep.diffusion.transitions import Renoise, Transition

Where = Literal["exit", "final"]


@dataclass(frozen=True)
class Point:
    """Samples x [B, ...] that were predicted from `x_t` at `level` [B]; live if x carries the student's graph.

    Levels and exit indices are on the host, wherever the samples are: what they decide is decided without waiting for a device.
    """

    x: Tensor
    x_t: Tensor
    level: Tensor
    exit_id: Tensor

    def __getitem__(self, rows: slice) -> Point:
        return Point(self.x[rows], self.x_t[rows], self.level[rows], self.exit_id[rows])

    def detach(self) -> Point:
        return replace(self, x=self.x.detach())

    def predicted_again(self, student: Denoiser, cond: Condition) -> Point:
        """The same step with the student's present weights and a fresh graph: for a second inner epoch."""
        return replace(self, x=student(self.x_t, self.level, cond).x0)


@dataclass(frozen=True)
class Trajectory:
    """The stochastic transitions of a rollout, detached: x_t -> x_next [S, B, ...] from levels t to t_next [S].

    `log_prob` [S, B] is that of the student that rolled out, by `transition`, with `guidance` (1: none). The last step, to a clean sample, is
    deterministic and not among them.
    """

    x_t: Tensor
    x_next: Tensor
    t: Tensor
    t_next: Tensor
    log_prob: Tensor
    transition: Transition = Renoise()
    guidance: float = 1.0


@dataclass(frozen=True)
class Rollout:
    """What the student made of a batch: groups of `group` consecutive samples share a prompt and an exit."""

    cond: Condition
    group: int
    exit: Point | None = None
    final: Point | None = None
    trajectory: Trajectory | None = None
    reward: Tensor | None = None
    advantage: Tensor | None = None

    def point(self, where: Where) -> Point:
        found = {"exit": self.exit, "final": self.final}[where]
        assert found is not None, f"this rollout has no {where} point; the stage's rollout must ask for it"
        return found

    def detach(self) -> Rollout:
        """The same samples without graphs: what critics may re-use."""
        return replace(self, exit=self.exit and self.exit.detach(), final=self.final and self.final.detach())

    def apart(self, times: int) -> list[Rollout]:
        """The `times` rollouts that were made together, one after the other; without trajectory, reward and advantage."""
        n = len(self.cond) // times
        each = [slice(k * n, (k + 1) * n) for k in range(times)]
        return [Rollout(self.cond[rows], self.group // times, self.exit and self.exit[rows], self.final and self.final[rows]) for rows in each]


def draw_exits(n_groups: int, group: int, n_levels: int, rng: torch.Generator) -> Tensor:
    """Exit index of every sample, [n_groups * group]: uniform over the levels, one for a group, stratified over groups.

    Stratified: the exits of a batch are a random rotation of 0..Q-1 repeated, shuffled. Every group's exit is uniform, and a
    batch sees all levels as evenly as it can, which lowers the variance of the gradient.
    """
    offset = torch.randint(n_levels, (), generator=rng)
    even = (torch.arange(n_groups) + offset) % n_levels
    return even[torch.randperm(n_groups, generator=rng)].repeat_interleave(group)


def group_noise(n: int, group: int, shared: float, shape: Sequence[int], rng: Rng, device: torch.device | str) -> Tensor:
    """Initial noise of n samples [n, *shape], each standard normal; two of a group of consecutive samples have the correlation `shared`, in 0..1.

    With 1 a group begins as one point (as in DanceGRPO), and only the noise between steps tells its samples apart.
    """
    own = randn((n, *shape), rng, device)
    if not shared:
        return own
    common = randn((n // group, *shape), rng, device).repeat_interleave(group, 0)
    return math.sqrt(shared) * common + math.sqrt(1 - shared) * own


def rollout_few_step(
    student: Denoiser,
    cond: Condition,
    levels: Sequence[float],
    path: Path,
    shape: Sequence[int],
    exit_id: Tensor,
    rng: Rng,
    *,
    group: int = 1,
    shared_noise: float = 0.0,
    exits: range | None = None,
    live: frozenset[Where] = frozenset(),
    to_the_end: bool = False,
    through: int = 1,
    record: bool = False,
    transition: Transition = Renoise(),
    guidance: float = 1.0,
    device: torch.device | str = "cpu",
    same_calls: int = 0,
) -> Rollout:
    """Rolls out len(cond) samples of `shape`, each to its exit, or `to_the_end`.

    Of the initial noise's variance, a group has the part `shared_noise` in common (`group_noise`); the noise of later steps is each sample's own.
    Points named in `live` carry the graph: the exit through its own step alone; the final sample through the last `through` of its steps (memory times
    their number). All exits are predicted in one call. `exits` are the indices that `draw_exits` drew from (None: all levels). `record` stores the
    trajectory of a rollout to the end. `guidance` is only noted in it: a guided `student` brings its own.

    A rollout to the exit of Q levels costs (Q + 1) / 2 evaluations a sample on average, one to the end Q. With `same_calls`, the number of processes that
    share the batch (1: this one alone), the numbers of calls and of rows in each are the same for all exits that can be drawn: calls of a sharded network
    are collectives, and every process makes the same ones. Some samples are then evaluated further than they need to be, as far as another draw would need
    them: the fewer groups a process has, the more.
    """
    n, chained = len(cond), through > 1 and "final" in live
    assert len(exit_id) == n and (to_the_end or not record)
    before, after = (
        rows_beside_exits(range(len(levels)) if exits is None else exits, n // group, group, len(levels), same_calls)
        if same_calls
        else _rows(exit_id, len(levels))
    )
    noise = group_noise(n, group, shared_noise, shape, rng, device)
    again = copy_of(rng)
    way = _Way(student, cond, levels, path, transition, exit_id, torch.tensor(levels, dtype=noise.dtype)[exit_id], live)
    if to_the_end and (chained or record or "exit" not in live or sum(before) + sum(after) >= n * len(levels)):
        exit_, final, steps = way.whole(noise, rng, through=through if "final" in live else 0, record=record)
        return Rollout(cond, group, exit_, final, _stacked(steps, levels, transition, guidance) if record else None)
    x_t, predicted = way.to_the_exits(noise, rng, before)
    exit_ = way.exits(x_t)
    return Rollout(cond, group, exit_, way.onwards(noise, again, exit_, predicted, after) if to_the_end else None)


@dataclass(frozen=True)
class _Way:
    """A batch on its way through the levels; `level` [B] are those of the exits.

    The noise of each transition is drawn for the whole batch whatever the exits are, so a sample does not depend on its neighbours' exits.
    """

    student: Denoiser
    cond: Condition
    levels: Sequence[float]
    path: Path
    transition: Transition
    exit_id: Tensor
    level: Tensor
    live: frozenset[Where]

    def exits(self, x_t: Tensor) -> Point:
        """All exits, from their inputs x_t [B, ...], in one call."""
        with _graph("exit" in self.live):
            return Point(self.student(x_t, self.level, self.cond).x0, x_t, self.level, self.exit_id)

    def to_the_exits(self, noise: Tensor, rng: Rng, counts: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The inputs of the exits [B, ...], and what was predicted at each level; rows that are past their exit hold nothing of use there."""
        at_exit, predicted = noise, []

        def predict(step: Step) -> Tensor:
            nonlocal at_exit
            at_exit = _chosen(self.exit_id == step.index, step.x_t, at_exit)
            predicted.append(self._predicted(step, self.exit_id > step.index, counts[step.index], step.x_t, graph=False))
            return predicted[-1]

        sample(predict, noise, self.levels, self.path, self.transition, rng)
        return at_exit, predicted

    def onwards(self, noise: Tensor, rng: Rng, exit_: Point, predicted: Sequence[Tensor], counts: Sequence[int]) -> Point:
        """The final samples. The way to the exits is gone again without a call, from what was `predicted`; `rng` draws the same noise again."""
        final: Point | None = None

        def predict(step: Step) -> Tensor:
            nonlocal final
            graph = step.index == len(self.levels) - 1 and "final" in self.live
            known = _chosen(self.exit_id == step.index, exit_.x if graph else exit_.x.detach(), predicted[step.index])
            x0 = self._predicted(step, self.exit_id < step.index, counts[step.index], known, graph=graph)
            final = self._final(step, x0)
            return x0.detach()

        sample(predict, noise, self.levels, self.path, self.transition, rng)
        assert final is not None
        return final

    def whole(self, noise: Tensor, rng: Rng, *, through: int, record: bool) -> tuple[Point, Point, list[tuple[Tensor, Tensor, Tensor]]]:
        """Exits, final samples and recorded steps, with all samples taken through all levels, the last `through` of them with a graph. Live exits are
        predicted once more, with their graph."""
        at_exit, supervised, final = noise, noise, None
        steps: list[tuple[Tensor, Tensor, Tensor]] = []

        def predict(step: Step) -> Tensor:
            nonlocal at_exit, supervised, final
            with _graph(step.index >= len(self.levels) - through):
                x0 = self.student(step.x_t, step.t, self.cond).x0
            here = self.exit_id == step.index
            at_exit, supervised, final = _chosen(here, step.x_t.detach(), at_exit), _chosen(here, x0.detach(), supervised), self._final(step, x0)
            return x0

        def record_step(step: Step, x0: Tensor, x_next: Tensor) -> None:
            if step.t_next is not None:
                x_t, x_next = step.x_t.detach(), x_next.detach()
                steps.append((x_t, x_next, self.transition.log_prob(self.path, x0.detach(), x_t, x_next, step.t, step.t_next)))

        sample(predict, noise, self.levels, self.path, self.transition, rng, record_step if record else None)
        assert final is not None
        return self.exits(at_exit) if "exit" in self.live else Point(supervised, at_exit, self.level, self.exit_id), final, steps

    def _final(self, step: Step, x0: Tensor) -> Point:
        return Point(x0, step.x_t.detach(), step.t, torch.full_like(self.exit_id, step.index))

    def _predicted(self, step: Step, wanted: Tensor, count: int, x0: Tensor, *, graph: bool) -> Tensor:
        """x0 [B, ...] with the `wanted` rows [B] predicted. Others fill the call up to `count` rows; no rows, no call."""
        rows, others = wanted.nonzero().flatten(), (~wanted).nonzero().flatten()
        called = torch.cat([rows, others[: max(count - len(rows), 0)]])
        if len(called) == 0:
            return x0
        with _graph(graph):
            if len(rows) == len(wanted):
                return self.student(step.x_t, step.t, self.cond).x0
            found = self.student(step.x_t[to_device(called, x0.device)], step.t[called], self.cond[called]).x0
            return x0.index_copy(0, to_device(rows, x0.device), found[: len(rows)])


def _graph(wanted: bool) -> torch.set_grad_enabled:
    """With a graph, if it is wanted and the caller allows one."""
    return torch.set_grad_enabled(wanted and torch.is_grad_enabled())


def rows_beside_exits(exits: range, n_groups: int, group: int, n_levels: int, shares: int = 1) -> tuple[list[int], list[int]]:
    """The most of n_groups * group samples whose exit comes after each level, and before it, of a draw of `draw_exits` among `exits` for `shares` times as
    many, of which these are any share."""
    each, more = divmod(n_groups * shares, len(exits))

    def most(n_exits: int) -> int:
        wanted = min(max(n_exits, 0), len(exits))
        return group * min(n_groups, each * wanted + min(more, wanted))

    return [most(exits.stop - 1 - j) for j in range(n_levels)], [most(j - exits.start) for j in range(n_levels)]


def _rows(exit_id: Tensor, n_levels: int) -> tuple[list[int], list[int]]:
    """The samples whose exit comes after each level, and before it."""
    level = torch.arange(n_levels)[:, None]
    return (exit_id > level).sum(1).tolist(), (exit_id < level).sum(1).tolist()


def _stacked(steps: list[tuple[Tensor, Tensor, Tensor]], levels: Sequence[float], transition: Transition, guidance: float) -> Trajectory:
    if not steps:
        raise ValueError("levels: a 1-step student has no stochastic step (its only one is deterministic), so there is no policy; use 2 or more steps")
    x_t, x_next, log_prob = (torch.stack([step[i] for step in steps]) for i in range(3))
    t = torch.tensor(levels, dtype=x_t.dtype)
    return Trajectory(x_t, x_next, t[:-1], t[1:], log_prob, transition, guidance)


def _chosen(rows: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """The rows [B] of x, and the rest of `other`."""
    return torch.where(to_device(rows, x.device).reshape(-1, *(1,) * (x.ndim - 1)), x, other)
