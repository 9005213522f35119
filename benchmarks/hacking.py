"""The hacking flag on fresh runs in the exact laboratory: how often it is raised without cause, and how often it stays silent.

    python benchmarks/hacking.py                                                # 40 runs; skips what is stored
    python benchmarks/hacking.py --seeds 5 --arms refl-right grpo-outward       # the two arms that are hardest to tell, once more
    make results

A run goes on from a distilled student of two steps, as `--start-from` does. Log, probe of 48 samples, teacher's figures and health monitor are those of
`instep train`; the points of the plane stand for images of one pixel. Whether a run was hacked follows from 4,000 samples against the mixture at its start and
its end, which the flag never sees (`was_hacked`). Runs of one seed share the distilled student.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from instep.core.files import write_json
from instep.diffusion.path import Path as NoisePath
from instep.lab.metrics import REACH, own_mode, reached, total_variation
from instep.lab.mixture import LabelCondition, labels
from instep.lab.networks import VelocityMLP
from instep.lab.run import SAMPLES, common, ensemble_state
from instep.lab.world import World, flow_start
from instep.methods.recipe import Recipe
from instep.recipes.after import rl_after
from instep.recipes.amd import amd
from instep.recipes.common import Common
from instep.recipes.dm_align import dm_align_group
from instep.recipes.dmd import dmd2
from instep.recipes.dmdr import dmdr
from instep.recipes.refl import refl
from instep.rewards.base import FunctionReward, checked_scores
from instep.training.build import averaged
from instep.training.health import HealthMonitor
from instep.training.probe import Probe
from instep.training.state import TrainState
from instep.training.step import iteration

RESULTS = Path(__file__).parent / "results" / "hacking"
WORLD = World.named("ring8", members=1)
STEPS, DISTIL, ALIGN = 2, 300, 120
EARLY = 10  # iterations of distillation after which an honest reward still has much to improve
PROBE_EVERY = 20  # as `instep train` does
SEEDS = (3, 4)  # fresh: the flag was last changed after runs of the seeds 0 to 2
LOST = 0.1  # share of samples that leave the modes, or of mass that is misplaced, in a hacked run
SPAN = 8.0  # width of the plane that the colours of a pixel show


def to_media(x: Tensor) -> Tensor:
    """Points [B, 2] as images of one pixel [B, 3, 1, 1, 1]: two colours are the coordinates, the third is constant."""
    return torch.cat([x / SPAN + 0.5, torch.full_like(x[:, :1], 0.5)], 1)[:, :, None, None, None]


def to_points(media: Tensor) -> Tensor:
    """The points of such images."""
    return (media.flatten(1)[:, :2] - 0.5) * SPAN


@dataclass(frozen=True)
class Points:
    """What a probe asks of a model family, for the laboratory."""

    path: NoisePath = WORLD.path
    latent_shape: tuple[int, ...] = (2,)
    device: torch.device = torch.device("cpu")
    micro_batch: int | None = None
    shift: float = 1.0

    def encode(self, prompts: Sequence[Any]) -> LabelCondition:
        return labels([prompt.text for prompt in prompts])

    def unconditional(self, prompts: Sequence[Any]) -> LabelCondition:
        return labels([""] * len(prompts))

    def decode(self, x: Tensor) -> Tensor:
        return to_media(x)


@dataclass(frozen=True)
class ModesMonitor:
    """The laboratory's monitor: the share of samples on a mode of their own class, and how many of its four modes eight samples of a class reach."""

    open_prompts: tuple[str, ...] = ("0", "1") * 5
    open_copies: int = 8

    def metrics(self, media: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        _, distance = own_mode(to_points(media), labels(prompts).label, WORLD.mixture)
        return {"monitor_both": float((distance <= REACH * WORLD.mixture.sigma).float().mean())}

    def modes(self, media: Tensor) -> float:
        nearest = torch.cdist(to_points(media), WORLD.mixture.means).argmin(1).reshape(-1, self.open_copies)
        return sum(len(set(group.tolist())) for group in nearest) / len(nearest)


def half(x: Tensor, prompts: Sequence[str]) -> Tensor:
    """Which modes are nearest: the right half of each class is preferred."""
    return replace(WORLD, reward="half").score(x, prompts)


def right(x: Tensor, prompts: Sequence[str]) -> Tensor:
    """The first coordinate, which rises past every mode."""
    return x[:, 0].clamp(-4, 4)


def outward(x: Tensor, prompts: Sequence[str]) -> Tensor:
    """The distance from the origin, which rises past every mode."""
    return x.norm(dim=1).clamp(max=5)


def corner(x: Tensor, prompts: Sequence[str]) -> Tensor:
    """How near a point is that is no sample of the data."""
    return -(x - torch.tensor([1.0, 0.0])).norm(dim=1)


def density(x: Tensor, prompts: Sequence[str]) -> Tensor:
    """The exact log density of the data, from -8 up."""
    return WORLD.mixture.log_density(WORLD.path, x, torch.zeros(len(x)), labels(prompts).label).clamp(min=-8)


def on_mode(x: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 on a mode of the sample's own class, else 0."""
    return replace(WORLD, reward="on-mode").score(x, prompts)


@dataclass(frozen=True)
class Arm:
    """Runs of one recipe with one reward, what they are meant to be, and after how many iterations of distillation they begin."""

    meant: Literal["hacked", "clean"]
    recipe: Callable[[Common], Recipe]
    reward: Callable[[Tensor, Sequence[str]], Tensor]
    distil: int = DISTIL


# rewards of hacked runs can be climbed off the data, or by giving up modes; the clean ones are honest rewards with the default weight of each recipe (of
# DM-Align: the paper's), and the same from a student that was distilled briefly, whose reward and quality rise together
ARMS = {
    "refl-half": Arm("hacked", lambda c: refl(c, iterations=ALIGN, weight=1.0), half),
    "refl-right": Arm("hacked", lambda c: refl(c, iterations=ALIGN, weight=1.0), right),
    "refl-outward": Arm("hacked", lambda c: refl(c, iterations=ALIGN, weight=2.0), outward),
    "refl-corner": Arm("hacked", lambda c: refl(c, iterations=ALIGN, weight=2.0), corner),
    "alone-right": Arm("hacked", lambda c: rl_after(c, distil=0, iterations=ALIGN, rl="refl"), right),
    "alone-corner": Arm("hacked", lambda c: rl_after(c, distil=0, iterations=ALIGN, rl="refl"), corner),
    "alone-grpo-half": Arm("hacked", lambda c: rl_after(c, distil=0, iterations=ALIGN, rl="grpo"), half),
    "grpo-outward": Arm("hacked", lambda c: dmdr(c, warm=0, iterations=ALIGN, rl="grpo", weight=2.0), outward),
    "alone-pso-right": Arm("hacked", lambda c: rl_after(c, distil=0, iterations=ALIGN, rl="pso"), right),
    "group-corner": Arm("hacked", lambda c: dm_align_group(c, distil=0, iterations=ALIGN, group=8, weight=0.9, matching=0.1), corner),
    "refl-density": Arm("clean", lambda c: refl(c, iterations=ALIGN), density),
    "grpo-on-mode": Arm("clean", lambda c: dmdr(c, warm=0, iterations=ALIGN, rl="grpo"), on_mode),
    "grpo-density": Arm("clean", lambda c: dmdr(c, warm=0, iterations=ALIGN, rl="grpo"), density),
    "group-on-mode": Arm("clean", lambda c: dm_align_group(c, distil=0, iterations=ALIGN, group=8, weight=0.5, matching=0.5), on_mode),
    "group-density": Arm("clean", lambda c: dm_align_group(c, distil=0, iterations=ALIGN, group=8, weight=0.5, matching=0.5), density),
    "amd-on-mode": Arm("clean", lambda c: amd(c, iterations=ALIGN), on_mode),
    "amd-density": Arm("clean", lambda c: amd(c, iterations=ALIGN), density),
    "early-refl-density": Arm("clean", lambda c: refl(c, iterations=ALIGN), density, EARLY),
    "early-grpo-on-mode": Arm("clean", lambda c: dmdr(c, warm=0, iterations=ALIGN, rl="grpo"), on_mode, EARLY),
    "early-group-on-mode": Arm("clean", lambda c: dm_align_group(c, distil=0, iterations=ALIGN, group=8, weight=0.5, matching=0.5), on_mode, EARLY),
}


def was_hacked(before: dict[str, float], after: dict[str, float]) -> bool:
    """Whether samples left the modes, or their mass moved between modes, by `LOST` or more."""
    return before["quality"] - after["quality"] >= LOST or after["tv"] - before["tv"] >= LOST


def options() -> Common:
    """The laboratory's, at a constant learning rate and with the average that probes look at."""
    base = common(STEPS, critic_updates=2)
    return replace(base, ema=0.95, student=replace(base.student, decay=0.0))


def distilled(start: VelocityMLP, seed: int, iterations: int) -> TrainState:
    """Student and fake after distillation alone."""
    recipe = dmd2(options(), iterations=iterations)
    state = ensemble_state(recipe, WORLD, start, seed)
    while state.step < recipe.steps:
        stage, progress = recipe.at(state.step)
        iteration(state, stage, [WORLD.batch(stage, 1.0, state.rng)], progress)
    return state


def begun(recipe: Recipe, base: TrainState, start: VelocityMLP, seed: int) -> TrainState:
    """A run's state with the roles of a distilled student, whose weights are its average."""
    state = ensemble_state(recipe, WORLD, start, seed)
    for role in ("student", "fake"):
        with averaged(base.trained[role]):
            state.roles[role].load_state_dict(base.roles[role].state_dict())  # type: ignore[attr-defined]
        mean = state.trained[role].ema
        for key, value in (mean or {}).items():
            value.copy_(state.trained[role].masters[key].detach())
    return state


def run(arm: Arm, base: TrainState, start: VelocityMLP, seed: int) -> dict[str, Any]:
    """One run: its health findings, what the flag read, and the exact figures of 4,000 samples at its start and its end."""
    recipe = arm.recipe(options())
    state = begun(recipe, base, start, seed)
    reward = FunctionReward(arm.reward, name=arm.reward.__name__, space="latent")
    state.reward_fn = state.reward_grad_fn = partial(checked_scores, reward)
    probe = Probe(Points(), ("0", "1") * 6, seed=1234 + seed, reward=reward, monitor=ModesMonitor())  # type: ignore[arg-type]
    teacher = {f"probe/{key}_teacher": value for key, value in probe.teacher(WORLD.teacher, 1.0).items()}
    rows: list[dict[str, Any]] = [{"step": 0, "stage": "start", **_probed(probe, state, recipe), **teacher}]
    before = _exact(state, recipe)
    with tempfile.TemporaryDirectory() as folder:
        health = HealthMonitor(Path(folder), recipe=recipe)
        raised = health.row(0, rows[0])
        while state.step < recipe.steps:
            stage, progress = recipe.at(state.step)
            row = {"stage": stage.name, **iteration(state, stage, [WORLD.batch(stage, 1.0, state.rng)], progress)}
            if state.step % PROBE_EVERY == 0:
                row |= _probed(probe, state, recipe) | teacher
                rows.append({"step": state.step, **row})
            raised += health.row(state.step, row)
    found = [{"step": one.step, "level": one.level, "flag": one.flag, "text": one.text} for one in raised]
    return {"meant": arm.meant, "seed": seed, "before": before, "after": _exact(state, recipe), "findings": found, "probes": [_kept(row) for row in rows]}


def _exact(state: TrainState, recipe: Recipe) -> dict[str, float]:
    """Share of samples on a mode of their class, misplaced mass, and modes of 8 that hold a quarter of their due, of 4,000 samples."""
    rng, mixture = torch.Generator().manual_seed(12345), WORLD.mixture
    cond, null = labels(["0", "1"] * (SAMPLES // 2)), labels([""] * SAMPLES)
    with averaged(state.trained["student"]):
        x = recipe.sampling_at(state.step)(state.roles["student"], cond, null, torch.randn(SAMPLES, 2, generator=rng), WORLD.path, rng)
    own, distance = own_mode(x, cond.label, mixture)
    on = distance <= REACH * mixture.sigma
    return {
        "quality": float(on.float().mean()),
        "tv": total_variation(x, cond.label, mixture),
        "reached": float(reached(own[on], cond.label, mixture)),
    }


def _probed(probe: Probe, state: TrainState, recipe: Recipe) -> dict[str, float]:
    with averaged(state.trained["student"]):
        return {f"probe/{key}": value for key, value in probe.student(state.roles["student"], recipe.sampling_at(state.step)).items()}


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """What the flag reads of a probe's row."""
    names = ("train_score", "train_spread", "monitor_both", "modes", "diversity", "diversity_teacher")
    kept = {key: row[key] for key in ("step", "stage", "reward/spread", "force/dm/norm", *(f"probe/{name}" for name in names)) if key in row}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    start = flow_start(WORLD, 0, steps=2500)
    for seed in args.seeds:
        bases: dict[int, TrainState] = {}
        for name in args.arms:
            file = RESULTS / f"{name}-{seed}.json"
            if file.is_file():
                continue
            distil = ARMS[name].distil
            if distil not in bases:
                bases[distil] = distilled(start, seed, distil)
            found = run(ARMS[name], bases[distil], start, seed)
            write_json(file, found)
            flagged = next((one["step"] for one in found["findings"] if one["flag"] == "hacking" and one["level"] == "alarm"), None)
            figures = ", ".join(f"{key} {found['before'][key]:.2f} to {found['after'][key]:.2f}" for key in ("quality", "tv", "reached"))
            print(f"{file.stem}: meant {found['meant']}, {figures}, flag {'silent' if flagged is None else f'at {flagged}'}", flush=True)


if __name__ == "__main__":
    main()
