"""Few-step rollouts of the student with a supervised exit.

A few-step student predicts x0 at level t_1 = 1, re-noises it with fresh noise to t_2, and so on. Training supervises one
of the steps, the *exit* (backward simulation, DMD2): samples at their exit carry the student's graph, everything before
runs without one, and nothing after the exit is computed unless a method asks for the final sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from instep.diffusion.noise import randn
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


def draw_exits(n_groups: int, group: int, n_levels: int, rng: torch.Generator) -> Tensor:
    """Exit index of every sample, [n_groups * group]: uniform over the levels, one for a group, stratified over groups.

    Stratified: the exits of a batch are a random rotation of 0..Q-1 repeated, shuffled. Every group's exit is uniform, and a
    batch sees all levels as evenly as it can, which lowers the variance of the gradient.
    """
    offset = torch.randint(n_levels, (), generator=rng)
    even = (torch.arange(n_groups) + offset) % n_levels
    return even[torch.randperm(n_groups, generator=rng)].repeat_interleave(group)


def rollout_few_step(
    student: Denoiser,
    cond: Condition,
    levels: Sequence[float],
    path: Path,
    shape: Sequence[int],
    exit_id: Tensor,
    rng: torch.Generator,
    *,
    group: int = 1,
    live: frozenset[Where] = frozenset(),
    to_the_end: bool = False,
    through: Literal["last", "trajectory"] = "last",
    record: bool = False,
    transition: Transition = Renoise(),
    guidance: float = 1.0,
    device: torch.device | str = "cpu",
) -> Rollout:
    """Rolls out len(cond) samples of `shape`, each to its exit, or `to_the_end`.

    Points named in `live` carry the graph: the exit through its own step alone; the final sample through its last step, or
    with `through="trajectory"` through every step (memory times the number of steps). Samples past their exit are dropped
    from the batch, so a rollout of Q levels costs (Q + 1) / 2 evaluations a sample on average, Q to the end. `record` stores
    the trajectory of a rollout to the end. `guidance` is only noted in it: a guided `student` brings its own.
    """
    n, last = len(cond), len(levels) - 1
    assert len(exit_id) == n and (to_the_end or not record)
    chained = through == "trajectory" and "final" in live
    exits: list[tuple[Tensor, Tensor, Tensor]] = []
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    final: Point | None = None

    def predict(step: Step) -> Tensor:
        nonlocal final
        x_t, t, here = step.x_t, step.t, exit_id == step.index
        alive = torch.ones_like(here) if to_the_end else exit_id >= step.index
        graph = alive & (here if "exit" in live else torch.zeros_like(here))
        if chained or (step.index == last and "final" in live):
            graph = alive
        x0 = _predict_rows(student, x_t, t, cond, graph, alive & ~graph)
        rows = here.nonzero().flatten()
        if len(rows):
            seen = to_device(rows, x_t.device)
            supervised = x0[seen]
            if chained and step.index > 0 and "exit" in live:
                supervised = student(x_t[seen].detach(), t[rows], cond[rows]).x0
            exits.append((rows, supervised, x_t[seen].detach()))
        if step.index == last and to_the_end:
            final = Point(x0, x_t.detach(), t, exit_id.new_full((n,), last))
        return x0 if chained else x0.detach()

    def record_step(step: Step, x0: Tensor, x_next: Tensor) -> None:
        if step.t_next is not None:
            before, after = step.x_t.detach(), x_next.detach()
            steps.append((before, after, transition.log_prob(path, x0.detach(), before, after, step.t, step.t_next)))

    noise = randn((n, *shape), rng, device)
    # the noise of each transition is drawn for the whole batch whatever the exits are, so a sample does not depend on its neighbours' exits
    sample(predict, noise, levels, path, transition, rng, record_step if record else None)
    point = _gather(exits, levels, exit_id) if exits else None
    return Rollout(cond, group, exit=point, final=final, trajectory=_stacked(steps, levels, transition, guidance) if record else None)


def _stacked(steps: list[tuple[Tensor, Tensor, Tensor]], levels: Sequence[float], transition: Transition, guidance: float) -> Trajectory:
    if not steps:
        raise ValueError("levels: a 1-step student has no stochastic step (its only one is deterministic), so there is no policy; use 2 or more steps")
    x_t, x_next, log_prob = (torch.stack([step[i] for step in steps]) for i in range(3))
    t = torch.tensor(levels, dtype=x_t.dtype)
    return Trajectory(x_t, x_next, t[:-1], t[1:], log_prob, transition, guidance)


def _predict_rows(student: Denoiser, x_t: Tensor, t: Tensor, cond: Condition, graph: Tensor, plain: Tensor) -> Tensor:
    """x0 for the rows in `graph` with a graph and for those in `plain` without; other rows keep x_t (they are not used)."""
    if bool(graph.all()):
        return student(x_t, t, cond).x0
    x0 = x_t.detach().clone()
    for mask, with_graph in ((plain, False), (graph, True)):
        rows = mask.nonzero().flatten()
        if len(rows):
            with torch.set_grad_enabled(with_graph and torch.is_grad_enabled()):
                seen = to_device(rows, x_t.device)
                x0 = x0.index_copy(0, seen, student(x_t[seen], t[rows], cond[rows]).x0)
    return x0


def _gather(parts: list[tuple[Tensor, Tensor, Tensor]], levels: Sequence[float], exit_id: Tensor) -> Point:
    order = torch.cat([rows for rows, _, _ in parts]).argsort()
    x, x_t = (torch.cat([part[i] for part in parts])[to_device(order, parts[0][1].device)] for i in (1, 2))
    return Point(x, x_t, torch.tensor(levels, dtype=x.dtype)[exit_id], exit_id)
