"""A run: the loop around `iteration`, its files, its checkpoints, and what happens when it is interrupted."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from instep import __version__
from instep.files import write_json
from instep.models.base import Family
from instep.rewards.base import Reward, as_reward
from instep.rewards.ranker import relative
from instep.roles import Role
from instep.rollout import Sampling
from instep.strengths import Ranges, Strengths, fold
from instep.train import checkpoint, stop
from instep.train.cache import teacher_samples
from instep.train.checks import check_inputs, claim, scorer, slope, weights_of
from instep.train.health import Finding, HealthMonitor
from instep.train.lock import held
from instep.train.log import RunLog, Tracker
from instep.train.probe import Monitor, Probe, few_of
from instep.train.recipe import Recipe
from instep.train.setup import averaged, make_state
from instep.train.source import PairSamples, RealSamples, Source
from instep.train.step import TrainState, iteration
from instep.train.views import matching_views, samples, save_samples, save_views

if TYPE_CHECKING:
    from instep.export import ExportReport

# steps of the teacher's own sampler where a recipe needs samples of it
TEACHER_STEPS = 50


@dataclass(frozen=True)
class RunOptions:
    """How a run is kept: `save_every` steps a checkpoint (the last `keep` stay), `probe_every` steps a probe, one `seed` for all.

    `teacher_samples`: how many samples of the teacher are made and kept for recipes that need such. `stop_on`: health flags at which the run stops,
    goes back to its best checkpoint by the monitor and exports that; probes that are the best so far are then saved too. ValueError for
    what is no flag.
    """

    seed: int = 0
    save_every: int = 25
    probe_every: int = 20
    keep: int = 2
    checkpointing: bool = False
    teacher_samples: int = 512
    stop_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        stop.check_flags(self.stop_on)


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, roles and recipe; `student` is the exported pipeline's folder, None of a student that no stock pipeline samples.
    `stopped`: if it stopped itself, where and why."""

    out: Path
    recipe: Recipe
    family: Family
    state: TrainState
    student: Path | None
    stopped: stop.Stopped | None = None


class Interrupted(Exception):
    """The run was asked to stop; it is saved and goes on with the same command."""


def train(
    recipe: Recipe,
    family: Family,
    *,
    out: Path | str,
    prompts: Sequence[str],
    reward: Reward | Callable[[Tensor, Sequence[str]], Any] | None = None,
    monitor: Monitor | None = None,
    real: RealSamples | None = None,
    pairs: PairSamples | None = None,
    start_from: Path | str | None = None,
    options: RunOptions | None = None,
    tracker: Tracker | None = None,
    command: str = "",
) -> Run:
    """Trains `recipe` on `family` and exports the student; the same call goes on where an interrupted one stopped.

    `reward` scores media [B, 3, F, H, W] in [0, 1] for their prompts; `real` are real samples (preferred ones for
    pair recipes; where a discriminator has none, samples of the teacher serve, made once and kept with the run);
    `pairs` are labelled ones, whose chosen samples serve as real and preferred ones where there are no others;
    `start_from` is another run whose roles this one begins with; `tracker` is called with (step, scalars) for every row of the log, beside
    log.jsonl and TensorBoard. Raises ValueError before training if something does not fit or another process is at work in
    `out`, and `Interrupted` after Ctrl-C or SIGTERM, with everything saved. A run that stopped itself (`stop_on`) ends normally, with the
    student it went back to; the same call does not train on.
    """
    out, options = Path(out), options or RunOptions()
    scored = as_reward(reward) if reward is not None else None
    if real is None and pairs is not None and recipe.needs & {"real", "preferred"}:
        real = pairs.preferred
    check_inputs(recipe, family, scored, real, prompts, pairs)
    with held(out):
        claim(out, recipe, family, options, prompts, start_from, command, reward=scored, real=real, pairs=pairs)
        state = make_state(
            recipe, family, options.seed, scorer(family, scored), slope(family, scored), checkpointing=options.checkpointing, weights=weights_of(scored)
        )
        stored = None
        if "stored" in recipe.needs or ("real" in recipe.needs and real is None):
            stored = teacher_samples(
                out, family, state.roles["teacher"], prompts, n=options.teacher_samples, steps=TEACHER_STEPS, guidance=recipe.guidance,
                shift=family.shift, seed=options.seed,
            )  # fmt: skip
            if real is None and "real" in recipe.needs:
                real = RealSamples(stored.prompts, stored.latents)
                print(f"no real samples were given: {len(stored.prompts)} samples of the teacher serve as real, so what it gets wrong passes for real")
        elif real is not None and recipe.needs & {"real", "preferred"}:
            print(f"stages with real samples take the prompts of these ({len(real.prompts)}); the other stages and the probe those given ({len(prompts)})")
        source = Source(family, prompts, real, options.seed, stored, pairs)
        probe = Probe(family, few_of(prompts, 12), reward=None if scored is None or relative(scored) else scored, monitor=monitor)
        loop = Loop(recipe, family, out, options, state, source, probe, tracker)
        loop.restore(start_from)
        loop.run()
        if recipe.roles["student"].reads not in (None, family.parameterisation):
            print(f"not exported: the student predicts {recipe.roles['student'].reads}, which no stock pipeline of {family.name} samples; it stays in {out}")
            return Run(out, recipe, family, state, None, loop.stopped)
        with averaged(state.trained["student"]):
            export_role(
                state.roles["student"], family, recipe.sampling_at(state.step), out / "student", recipe=recipe.name, seed=options.seed,
                prompts=len(set(prompts)), example=prompts[0], command=command,
            )  # fmt: skip
        return Run(out, recipe, family, state, out / "student", loop.stopped)


def export_role(
    student: Role,
    family: Family,
    sampling: Sampling,
    to: Path,
    *,
    recipe: str,
    seed: int,
    prompts: int,
    example: str,
    command: str,
    dtype: torch.dtype | None = None,
) -> ExportReport:
    """A student role as a stock pipeline folder (or its parts, where there is no stock pipeline), checked there against the sampler that trained it;
    a many-step student keeps its model's scheduler."""
    if student.reads != family.parameterisation:
        raise ValueError(f"student: it predicts {student.reads}, and a stock pipeline of {family.name} reads {family.parameterisation}; it cannot be exported")
    from instep.export import ExportInfo, export_many_step, export_parts, export_student, merge_lora  # diffusers' exporters are slow to import
    from instep.export.verify import sample_as_stock
    from instep.models.stock import stock

    info = ExportInfo(
        recipe=recipe, base_model=family.name, seed=seed, command=command, instep_version=__version__, training_prompts=prompts,
        size=family.size, example_prompt=example,
    )  # fmt: skip
    module = student.backbone.module
    if sampling.kind == "ode":
        if sampling.strengths is not None:
            return export_many_step(folded(student, sampling.strengths), sampling, to, info, dtype=dtype)
        lora = None if student.adapter is None else module
        pipe = family.pipe if lora is not None else family.pipeline(module)
        return export_many_step(pipe, sampling, to, info, lora=lora, adapter=student.adapter or "", dtype=dtype)

    axes = tuple(range(1 + len(family.latent_shape))) if family.pipe is None else stock(family.pipe).axes

    def ours(names: Sequence[str], rng: torch.Generator) -> Tensor:
        return sample_as_stock(student, family.encode(names), family.latent_shape, sampling.levels, family.path, rng, axes)

    if family.pipe is None:
        plain = module if student.adapter is None else merge_lora(module, student.adapter)
        return export_parts(family, plain, sampling.levels, to, info, dtype=dtype, ours=ours)
    if student.adapter is None:
        return export_student(family.pipeline(module), sampling.levels, to, info, dtype=dtype, ours=ours)
    return export_student(family.pipe, sampling.levels, to, info, lora=module, adapter=student.adapter, dtype=dtype, ours=ours)


def folded(student: Role, strengths: Strengths) -> Any:
    """A pipeline around a copy of a told student's network that says untold what the student says when told `strengths`; an adapter is merged.

    An adapter's own file could not hold a bias of the time embedding, so there is none of such a student.
    """
    from instep.export import merge_lora

    assert student.told is not None, "only a student that is told strengths has some to fold"
    family, module = student.backbone.family, student.backbone.module
    pipe = family.pipeline(module if student.adapter is None else merge_lora(module, student.adapter))
    fold(family.time_embedders(pipe.transformer), student.told, strengths)
    return pipe


class Loop:
    """The steps of one run, from wherever it stands to its end."""

    def __init__(
        self, recipe: Recipe, family: Family, out: Path, options: RunOptions, state: TrainState, source: Source, probe: Probe,
        tracker: Tracker | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.family, self.out, self.options = recipe, family, out, options
        self.state, self.source, self.probe, self.tracker = state, source, probe, tracker
        self.stop: str | None = None
        self.reference: dict[str, float] = {}
        self.found: Finding | None = None  # what the run stops at
        self.probed: list[stop.Probed] = []
        self.stopped: stop.Stopped | None = None

    def run(self) -> None:
        """Trains to the end or to a finding in `stop_on`; on SIGINT or SIGTERM finishes the iteration, saves and raises `Interrupted`."""
        state, total = self.state, self.recipe.steps
        if self._has_stopped() or state.step >= total:
            return
        before = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)} if _in_main_thread() else {}
        log = RunLog(self.out, resume_step=state.step, tracker=self.tracker)
        health = HealthMonitor(self.out, resume_step=state.step, recipe=self.recipe)
        self.probed, self.found = stop.probed(self.out), stop.open_finding(self.out, self.options.stop_on)
        try:
            with log.progress(total, initial=state.step):
                if state.step == 0:
                    self._probe(log, health, {"stage": "start"})
                    self._save_if_due()
                while state.step < total and self.stop is None and self.found is None:
                    self._one(log, health)
            if self.found is not None:
                self._go_back(stop.decide(self.out, self.found, self.probed, self.options.stop_on))
            elif self.stop is not None:
                self.save()
                raise Interrupted(f"{self.stop}: saved at step {state.step} of {total} in {self.out}; the same command goes on from there")
        finally:
            log.close()
            for s, handler in before.items():
                signal.signal(s, handler)

    def _one(self, log: RunLog, health: HealthMonitor) -> None:
        stage, progress = self.recipe.at(self.state.step)
        cpu, wall = time.process_time(), time.perf_counter()
        row: dict[str, Any] = {"stage": stage.name, **iteration(self.state, stage, self.source.next(stage), progress)}
        row |= {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        step = self.state.step
        if step % self.options.probe_every == 0 or step in self.recipe.stage_ends():
            self._probe(log, health, row)
        else:
            self._note(log, health, row)
        self._save_if_due()

    def _save_if_due(self) -> None:
        """A checkpoint now and then; where the run may stop itself, at every probe that is the best so far; none of what it stops at."""
        step = self.state.step
        best = bool(self.options.stop_on) and stop.best(self.probed) == step
        if self.found is None and (best or (step > 0 and (step % self.options.save_every == 0 or step in self.recipe.stage_ends()))):
            self.save()

    def _has_stopped(self) -> bool:
        """Whether the run stopped itself before and is to stay so; it has gone back then. Without that flag in `stop_on` it is free to go on."""
        stopped = stop.read(self.out)
        if stopped is None:
            return False
        if stop.kind(stopped.flag) not in self.options.stop_on:
            (self.out / stop.NAME).unlink()
            return False
        self._go_back(stopped)
        return True

    def _go_back(self, stopped: stop.Stopped) -> None:
        """The kept checkpoint is the run's newest from here on."""
        path = checkpoint.at(self.out / "checkpoints", stopped.kept)
        if path is None:
            raise ValueError(f"out: {self.out} stopped itself and the checkpoint of step {stopped.kept} that it kept is gone or damaged; train anew")
        self._load(checkpoint.load(path))
        checkpoint.drop_after(self.out / "checkpoints", stopped.kept)
        self.stopped = stopped
        print(stopped)

    def _probe(self, log: RunLog, health: HealthMonitor, row: dict[str, Any]) -> None:
        if not self.reference:
            self.reference = self._teacher_figures()
        stage, _ = self.recipe.at(min(self.state.step, self.recipe.steps) - 1 if self.state.step else 0)
        with averaged(self.state.trained["student"]):
            figures, _ = self.probe.student(self.state.roles["student"], self.recipe.sampling_at(self.state.step))
            if self.state.step in (0, *self.recipe.stage_ends()):
                prompts = few_of(self.probe.prompts, 6)
                views = matching_views(self.state, stage, self.recipe, self.family, prompts, self.probe.seed)
                save_views(self.out / "views", self.state.step, views, prompts)
        teacher = {f"probe/{key}_teacher": value for key, value in self.reference.items()}
        row |= {f"probe/{key}": value for key, value in figures.items()} | teacher
        # saved: as soon as nothing is found in it
        self.probed.append(stop.Probed(self.state.step, figures.get("monitor_both"), True, figures["diversity"]))
        self._note(log, health, row)

    def _note(self, log: RunLog, health: HealthMonitor, row: dict[str, Any]) -> None:
        """A row into the log; what it shows to be wrong, said aloud."""
        log.row(self.state.step, row)
        for finding in health.row(self.state.step, row):
            log.say(finding)
            if self.found is None and stop.asks(finding, self.options.stop_on):
                self.found = finding

    def _teacher_figures(self) -> dict[str, float]:
        """The teacher's own figures on the probe's prompts: taken once and kept with the run."""
        file = self.out / "teacher_probe.json"
        if not file.is_file():
            figures, _ = self.probe.teacher(self.state.roles["teacher"], self.recipe.guidance)
            write_json(file, figures)
        return json.loads(file.read_text(encoding="utf-8"))

    def save(self) -> None:
        state = self.state
        checkpoint.save(
            self.out / "checkpoints",
            state.step,
            {
                "roles": {name: state.owner(name).state() for name in state.trained},
                "optim": {name: checkpoint.optimizer_state(trained.optimizer) for name, trained in state.trained.items()},
                "ema": {name: trained.ema for name, trained in state.trained.items() if trained.ema is not None},
                "steps": {name: trained.steps for name, trained in state.trained.items()},
                "rng": checkpoint.rng_state(state.rng),
                "source": self.source.state(),
                "step": state.step,
                "reward_variance": state.reward_variance,
                "reference": {str(i): p.detach() for i, p in enumerate(state.reference)},
                "anchored": state.anchored,
            },
            keep=self.options.keep,
            protect=(*self.recipe.stage_ends(), *(stop.protected(self.probed) if self.options.stop_on else ())),
        )

    def restore(self, start_from: Path | str | None) -> None:
        """The newest whole checkpoint of this run; if it has none at all, the roles of `start_from`. ValueError if all it has are damaged."""
        own = checkpoint.latest(self.out / "checkpoints")
        if own is not None:
            self._load(checkpoint.load(own))
        elif start_from is not None:
            other = checkpoint.latest(Path(start_from) / "checkpoints")
            if other is None:
                raise ValueError(f"start_from: {start_from} holds no checkpoint; give the folder of a run that has at least one")
            saved, record = checkpoint.load(other), json.loads((Path(start_from) / "recipe.json").read_text(encoding="utf-8"))
            theirs, ours = record["config"]["roles"]["student"].get("reads"), self.recipe.roles["student"].reads
            if theirs != ours:
                raise ValueError(
                    f"start_from: that run's student predicts {theirs or 'what its model does'}, this recipe's {ours or 'what its model does'}; start from one "
                    "that predicts the same"
                )
            self._told(saved, record["config"]["roles"]["student"].get("told"))
            reward = self.probe.reward and self.probe.reward.name
            if "scorer" in saved["roles"] and record["reward"] != reward:
                del saved["roles"]["scorer"]
                if self.state.scorer is not None:
                    print(f"the latent reward model of {start_from} was fitted to {record['reward']!r}, not to {reward!r}: a new one begins")
            self._load_roles(saved)

    def _told(self, saved: dict[str, Any], theirs: dict[str, Any] | None) -> None:
        """What a student of another run was told goes with the ranges it was told in; one that was told nothing begins with an embedding that says nothing."""
        ours = self.recipe.roles["student"].told
        if theirs is not None and (told := Ranges.of_json(theirs)) != ours:
            raise ValueError(
                f"start_from: that run's student is told {told}, this recipe's {ours or 'nothing'}; give the same draw and draw_skip, or start from its export "
                "(--model DIR/student), whose strength is in its weights"
            )
        if theirs is None and ours is not None:
            new = {key: p for key, p in self.state.owner("student").state().items() if key.startswith("told.")}
            for part in (saved["roles"], saved["ema"]):
                if "student" in part:
                    part["student"] = {**part["student"], **new}

    def _load(self, saved: dict[str, Any]) -> None:
        self._load_roles(saved)
        checkpoint.restore_rng(self.state.rng, saved["rng"])
        self.source.load_state(saved["source"])
        self.state.step = int(saved["step"])
        self.state.reward_variance = saved["reward_variance"]
        self.state.anchored = saved["anchored"]
        with torch.no_grad():
            for i, p in enumerate(self.state.reference):
                p.copy_(saved["reference"][str(i)])

    def _load_roles(self, saved: dict[str, Any]) -> None:
        # a run that goes on from one without a latent reward model begins with a new one
        new = {"scorer"} - saved["roles"].keys()
        missing = [name for name in self.state.trained if name not in saved["roles"] and name not in new]
        if missing:
            raise ValueError(f"start_from: that run has no role {missing[0]!r}, which this recipe trains; start from a run of a recipe that does, or from none")
        for name, trained in self.state.trained.items():
            if name in new:
                continue
            self.state.owner(name).load_state(saved["roles"][name])
            checkpoint.load_optimizer_state(trained.optimizer, saved["optim"][name])
            trained.steps = int(saved["steps"][name])
            if trained.ema is not None:
                # a run without an average: it begins at the weights
                averages = saved["ema"].get(name, saved["roles"][name])
                trained.ema = {key: averages[key].clone() for key in trained.ema}

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop is not None:
            raise KeyboardInterrupt
        self.stop = signal.Signals(number).name


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def final_samples(run: Run, prompts: Sequence[str], seed: int = 4321) -> None:
    """Samples of teacher, naive teacher and student on the same prompts and noise, for the report."""
    with averaged(run.state.trained["student"]):
        save_samples(run.out, samples(run.state, run.recipe, run.family, prompts, seed), prompts, seed)
