"""One training iteration, the same for every recipe and every model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from instep.core.shards import assign, local
from instep.diffusion.bands import Band, in_band
from instep.diffusion.streams import SampleStreams
from instep.diffusion.transfer import to_device
from instep.methods.recipe import Stage
from instep.methods.role_config import AdamWConfig
from instep.methods.term import Batch, Force, View
from instep.training.rollouts import fresh_views, live_points, recompute, roll_out, score_rollout
from instep.training.scalars import Scalars
from instep.training.state import TrainState
from instep.training.term_gradients import TermGradients, due, observe, weights_now


def iteration(state: TrainState, stage: Stage, batches: Sequence[Batch], progress: float, log: Scalars | None = None, measure: bool = False) -> dict[str, Any]:
    """Takes one student step and its critics' steps on `batches` (the micro-batches). Returns scalars for the log.

    With `measure`, and where the stage's shares need it, the norm of each term's gradient is measured in the first inner epoch, by one more backward pass a
    term; the step itself is the same, bit for bit. It waits for the device once, at its end, for the scalars; in a stage of several inner epochs once after
    each, and after each step of a critic with an average.

    The student goes first and the critics follow on its detached samples, as in DM-Align's Algorithm 1: no graph is alive while
    critics train, and a re-used rollout costs nothing.
    """
    log = Scalars(state.ranks) if log is None else log
    snapshot_reference(state, stage)
    sync_average(state, stage)
    views: list[View] = []
    weights = weights_now(state, stage)
    # of everything that samples draw in this iteration
    key = int(torch.randint(2**63 - 1, (), generator=state.rng))
    gradients = TermGradients(state.trained["student"], state.ranks) if measure or due(stage, progress) else None
    for epoch in range(stage.inner_epochs):
        for i, batch in enumerate(batches):
            if epoch == 0:
                batch = batch if stage.guidance_scales is None else replace(batch, cond=batch.cond.with_guidance(stage.guidance_scales))
                view = View(
                    state.roles,
                    state.path,
                    batch,
                    progress,
                    SampleStreams(key, i * state.ranks.parts + state.ranks.part, state.rng),
                    reward_grad_fn=state.reward_grad_fn,
                    weights=state.weights,
                    latent_reward=state.latent_reward,
                    band=draw_band(state, stage),
                    boundary=state.boundary,
                    require=log.require,
                    ranks=state.ranks,
                )
                view = view.with_rollout(score_rollout(state, stage, view, roll_out(state, stage, view, with_graph=True), log))
                views.append(view.with_rollout(view.rollout and view.rollout.detach()))
            else:
                view = replace(views[i], rollout=recompute(state, stage, views[i]), epoch=epoch)
            backward(stage, view, 1 / len(batches), weights, log, gradients if epoch == 0 else None, last=i == len(batches) - 1)
        if gradients is not None and epoch == 0:
            log_terms(state, stage, weights, gradients.norms(), log)
        if stage.terms:
            optimizer_step(state, "student", progress, log, stage.optim)
        if stage.inner_epochs > 1:
            log.settle()
    for critic in stage.critics:
        views = [critic.prepare(view, state.reward_fn, log.add) for view in views]
        for seen in [views] * critic.updates if critic.reuse else fresh_views(state, stage, views, critic, log):
            for view in seen:
                for loss in critic.losses(view):
                    (loss / len(views)).backward()
                    log.add(f"critic/{critic.role}", loss.detach())
            optimizer_step(state, critic.role, progress, log)
            if state.trained[critic.role].ema is not None:
                # the average follows each step, and not the last one alone
                log.settle()
    log.settle()
    state.step += 1
    return log.means()


def draw_band(state: TrainState, stage: Stage) -> Band:
    """Returns the band of levels that a micro-batch trains at: all levels, or with two experts the band of one of them.

    A trained band is drawn with a probability proportional to the number of the student's levels in it. Nothing is drawn if there is only one.
    """
    levels = torch.tensor(stage.rollout.levels if stage.rollout else [(low + high) / 2 for low, high in state.bands])
    choices = [band for level in levels for band in state.bands if bool(in_band(level, band))]
    if len(set(choices)) < 2:
        return choices[0]
    return choices[int(torch.randint(len(choices), (), generator=state.rng))]


@torch.no_grad()
def snapshot_reference(state: TrainState, stage: Stage) -> None:
    """Copies the student into the reference at the beginning of a stage that compares with a reference."""
    if "reference" in stage.needs and state.reference_stage != stage.name:
        state.trained["student"].at_home()
        for mine, theirs in zip(state.reference, state.trained["student"].parameters.values(), strict=True):
            assign(mine, theirs)
        state.reference_stage = stage.name
        if stage.fresh:
            state.trained["student"].optimizer.state.clear()


@torch.no_grad()
def sync_average(state: TrainState, stage: Stage) -> None:
    """Copies the student's running average into the role `average`, if the stage needs it."""
    mean = state.trained["student"].ema
    if "average" in stage.needs and mean is not None:
        state.trained["student"].at_home()
        torch._foreach_copy_([local(p) for p in state.average], [local(p) for p in mean.values()])


def backward(
    stage: Stage, view: View, scale: float, weights: Mapping[str, float], log: Scalars, measured: TermGradients | None = None, *, last: bool = True
) -> None:
    """Weighs and adds the forces of each point and calls autograd once; then each objective's scalars, one by one.

    With `measured` each term is measured alone before.
    """
    live = live_points(stage, view)
    forces = [(force, checked_force(force, view)) for force in stage.forces if force.on in live]
    log_forces(forces, view, weights, log)
    if measured is not None:
        for force, g in forces:
            x = view.samples.point(force.on).x
            measured.add(force.name, partial(torch.autograd.backward, [x], [(scale * g).to(x)], retain_graph=True), last=last)
    points, gradients = [], []
    for where in sorted(live):
        total = torch.stack([weights[force.name] * g for force, g in forces if force.on == where]).sum(0)
        points.append(view.samples.point(where).x)
        gradients.append((scale * total).to(points[-1]))
    if points:
        torch.autograd.backward(points, gradients)
    for objective in stage.objectives:
        for loss in objective(view):
            if measured is not None:
                measured.add(objective.name, partial((scale * loss).backward, retain_graph=True), last=False)
            (scale * weights[objective.name] * loss).backward()
            log.add(f"objective/{objective.name}", loss.detach())


def checked_force(force: Force, view: View) -> Tensor:
    """Returns the force on the view's samples. Raises ValueError if it is no tensor of their shape or, in a stage's first iteration, not finite."""
    g = force(view)
    point = view.samples.point(force.on)
    what = f"force {force.name!r} ({type(force).__name__})"
    if not isinstance(g, Tensor) or g.shape != point.x.shape:
        got = f"a tensor of shape {tuple(g.shape)}" if isinstance(g, Tensor) else repr(g) if g is None else type(g).__name__
        raise ValueError(f"{what} returned {got}; it returns dL/dx of the samples at {force.on!r}, a tensor of their shape {tuple(point.x.shape)}")
    if view.progress == 0 and view.epoch == 0:
        error = f"{what} returned values that are not finite, at its first call; look for a division by zero or the root of zero"
        view.require(g.isfinite().all(), lambda: ValueError(error))
    return g


def optimizer_step(state: TrainState, name: str, progress: float, log: Scalars, optim: AdamWConfig | None = None) -> None:
    """Takes one optimiser step of a role with the settings `optim` (None: the role's own)."""
    trained = state.trained[name]
    optim = optim or trained.optim
    lr = optim.lr_at(state.step, progress)
    if state.boundary is not None:
        trained.even_out()
    state.ranks.average(trained.to_average())
    norm, finite = trained.step(lr, optim)
    log.add(f"grad/{name}", torch.where(finite, norm, 0.0))
    log.add(f"grad/{name}/skipped", (~finite).float())
    log.add(f"lr/{name}", torch.tensor(lr))
    log.after(finite, trained.settle)


def log_terms(state: TrainState, stage: Stage, weights: Mapping[str, float], norms: Mapping[str, Tensor], log: Scalars) -> None:
    """Logs the weight of each term and the norm of its gradient, with and without it; the ratios of shares move as soon as the norms are known."""
    known: dict[str, float] = {}
    for name, norm in norms.items():
        log.add(f"term/{name}/gradient", weights[name] * norm)
        log.add(f"term/{name}/gradient_unweighted", norm)
        log.add(f"term/{name}/weight", torch.tensor(weights[name]))
        log.read(norm, partial(known.__setitem__, name))
    if norms:
        log.after(torch.ones((), dtype=torch.bool), lambda _: observe(state, stage, known))


@torch.no_grad()
def log_forces(forces: Sequence[tuple[Force, Tensor]], view: View, weights: Mapping[str, float], log: Scalars) -> None:
    """Logs the weighted norm of each force per sample (of the batch-mean gradient times B), and the cosine of any two at the same point."""
    for force, g in forces:
        log.add(f"force/{force.name}/norm", weights[force.name] * g.flatten(1).norm(dim=1).mean() * len(g))
    for (f, g), (other, h) in combinations(forces, 2):
        same = torch.ones(len(g), dtype=torch.bool, device=g.device)
        if f.on != other.on:
            same = to_device(view.samples.point("exit").exit_id == view.samples.point("final").exit_id, g.device)
        # rows with a zero force have no direction to compare
        same = same & (g.flatten(1).abs().sum(1) > 0) & (h.flatten(1).abs().sum(1) > 0)
        cosine = nn.functional.cosine_similarity(len(g) * g.flatten(1), len(h) * h.flatten(1))
        log.add(f"force/cosine/{f.name}~{other.name}", torch.where(same, cosine, 0.0).sum() / same.sum(), same.to(cosine).mean())
