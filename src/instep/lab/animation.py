"""Figures of laboratory runs: densities, samples on their way, the force field, and training as an animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from instep.lab.figure import Panel, animate, draw
from instep.lab.metrics import mean_sd
from instep.lab.networks import VelocityMLP
from instep.lab.run import LabRun, force_field, trajectories
from instep.lab.world import World

SHOWN = 1500  # samples a panel


def draw_runs(out: Path, runs: Sequence[LabRun], world: World) -> list[Path]:
    """figure.png, and training.webp where runs have snapshots; the first member of each. Returns what was written."""
    written = [out / "figure.png"]
    draw(written[0], [panel(run) for run in runs], world.mixture, world.rewarded)
    if min(len(run.snapshots) for run in runs) > 1:
        written.append(out / "training.webp")
        animate(written[1], frames(runs), world.mixture, world.rewarded)
    return written


def panel(run: LabRun) -> Panel:
    """One run's column."""
    metrics = mean_sd(run.metrics)
    caption = f"quality {metrics['quality'][0]:.2f}, TV {metrics['tv'][0]:.2f}" + (f", rewarded {metrics['share'][0]:.2f}" if "share" in metrics else "")
    reach = float(run.world.mixture.means.abs().max()) + 1.0
    axis = torch.linspace(-reach, reach, 15)
    points = torch.cartesian_prod(axis, axis)
    network = isinstance(run.state.roles["student"], VelocityMLP)
    return Panel(
        run.name,
        run.snapshots[-1].samples[0][:SHOWN],
        caption,
        trajectories(run) if network else None,
        (points, force_field(run, points)) if network else None,
    )


def frames(runs: Sequence[LabRun]) -> list[tuple[str, list[Panel]]]:
    """Every run at every snapshot, side by side."""
    count = min(len(run.snapshots) for run in runs)
    return [(f"iteration {runs[0].snapshots[i].step}", [Panel(run.name, run.snapshots[i].samples[0][:SHOWN]) for run in runs]) for i in range(count)]
