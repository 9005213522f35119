"""The loop over a run's iterations: its files, its checkpoints, and what happens when it is interrupted or ends by itself."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from instep.core.files import write_json
from instep.core.json_files import read_object
from instep.core.json_lines import read_rows
from instep.core.unusable import Unusable
from instep.diffusion.guidance import by_level
from instep.methods.recipe import Recipe, Stage
from instep.models.family import Family
from instep.rewards.base import RewardError
from instep.training import checkpoint, saved, stop
from instep.training.align_views import align_stage, align_views
from instep.training.batches import BatchSource
from instep.training.build import averaged
from instep.training.finite import BROKEN, SkippedSteps, WatchedDenoiser, check_state, ended
from instep.training.health import Finding, HealthMonitor
from instep.training.hold import Controller, Held
from instep.training.log import RunLog, Tracker
from instep.training.options import RunOptions
from instep.training.probe import KnownTeacher, Probe, few_of
from instep.training.reward_failure import before, failed, undo
from instep.training.saving import CheckpointWriter, in_background
from instep.training.state import TrainState
from instep.training.step import iteration
from instep.training.term_gradients import at_interval
from instep.training.views import matching_views, save_views

# of a user (Ctrl-C), of torchrun and schedulers, and of SLURM's --signal=USR1; Windows has no such one
SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupted(Exception):
    """The run was interrupted by a signal; it is saved, and the same command resumes it."""


class Loop:
    """The loop over one run's iterations, from its current step to the end."""

    def __init__(
        self,
        recipe: Recipe,
        family: Family,
        out: Path,
        options: RunOptions,
        state: TrainState,
        source: BatchSource,
        probe: Probe,
        tracker: Tracker | None = None,
        known_teacher: KnownTeacher | None = None,
    ) -> None:
        self.recipe, self.family, self.out, self.options = recipe, family, out, options
        self.state, self.source, self.probe, self.tracker, self.known_teacher = state, source, probe, tracker, known_teacher
        self.asked = 0  # the signal that this process got
        self.stop: str | None = None
        self.fresh = False  # whether the present step is new: neither loaded nor saved
        self.reference: dict[str, float] = {}
        self.found: Finding | None = None  # the finding that stops the run
        self.skipped = SkippedSteps()
        self.controller = Controller(options.hold) if options.hold else None
        self.probed: list[stop.Probed] = []
        self.stopped: stop.Stopped | None = None
        self.ranks = state.ranks
        self.writer = CheckpointWriter(out / "checkpoints", options.keep, background=in_background(state.device, options.execution), ranks=state.ranks)

    def run(self) -> None:
        """Trains to the end or to a finding in `stop_on`; on one of `SIGNALS` finishes the iteration, saves and raises `Interrupted`.

        Of several ranks the first one writes, probes and judges, and the others follow its decisions.
        """
        state, total = self.state, self.recipe.steps
        if self._has_stopped() or state.step >= total:
            return
        before = {s: signal.signal(s, self._ask_to_stop) for s in SIGNALS} if _in_main_thread() else {}
        try:
            if self.ranks.first:
                self._lead(total)
            else:
                self.ranks.follow()
                while self._goes_on(total):
                    self._train()
                    self.ranks.follow()
            if self.found is not None:
                found = self.found
                decided = self.ranks.of_first(lambda: asdict(stop.decide(self.out, found, self.probed, self.options.stop_on)))
                self._go_back(stop.Stopped(**decided))
            elif self.stop is not None:
                self.save()
                self.ranks.of_first(self.writer.wait)
                raise Interrupted(f"{self.stop}: saved at step {state.step} of {total} in {self.out}; the same command goes on from there")
        finally:
            self.writer.join()
            for s, handler in before.items():
                signal.signal(s, handler)

    def _lead(self, total: int) -> None:
        """The loop of the rank that writes."""
        state = self.state
        log = RunLog(self.out, resume_step=state.step, tracker=self.tracker)
        try:
            health = HealthMonitor(self.out, resume_step=state.step, recipe=self.recipe)
            self.skipped = SkippedSteps(read_rows(self.out / "log.jsonl") if state.step else ())
            self.probed, self.found = stop.probed(self.out), stop.open_finding(self.out, self.options.stop_on)
            with log.progress(total, initial=state.step):
                with self.ranks.leading():
                    if state.step == 0:
                        self._probe(log, health, {"stage": "start"})
                        self.fresh = True
                while self._goes_on(total):
                    self.writer.check()
                    self._one(log, health)
                self.writer.wait()
        except OSError:
            self._check_there()  # what cannot be written then has this one reason
            raise
        finally:
            self.writer.join()
            log.close()

    def _goes_on(self, total: int) -> bool:
        """Whether there is another iteration, after a checkpoint that is due. All ranks decide alike: a signal to one of them stops all, and what rank 0
        found is found."""
        number = self.ranks.most(self.asked)
        self.stop = signal.Signals(number).name if number else None
        led: dict[str, Any] = self.ranks.of_first(self._decided)
        if not self.ranks.first:
            self.found = Finding(**led["found"]) if led["found"] else None
            self.state.hold = Held.of_json(led["hold"])
        if led["saves"]:
            self.save()
        return self.state.step < total and self.stop is None and self.found is None

    def _decided(self) -> dict[str, Any]:
        """What rank 0 decides between two iterations."""
        self._check_there()
        return {"found": asdict(self.found) if self.found else None, "hold": asdict(self.state.hold), "saves": self._is_due()}

    def _train(self) -> dict[str, Any]:
        """One iteration; its row of the log."""
        stage, progress = self.recipe.at(self.state.step)
        cpu, wall, began = time.process_time(), time.perf_counter(), before(self.state, self.source)
        try:
            measure = at_interval(self.state.step, self.options.terms_every)
            row: dict[str, Any] = {"stage": stage.name, **iteration(self.state, stage, self.source.next(stage), progress, None, measure)}
        except Unusable as error:
            self._give_up(str(error))
        except RewardError as error:
            if undo(self.state, self.source, began):
                self._save_alone()
            self._reward_failed(error)
        return row | {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}

    def _one(self, log: RunLog, health: HealthMonitor) -> None:
        stage, _ = self.recipe.at(self.state.step)
        row = self._train()
        with self.ranks.leading():
            self._after(stage, row, log, health)

    def _after(self, stage: Stage, row: dict[str, Any], log: RunLog, health: HealthMonitor) -> None:
        """What rank 0 does alone after each iteration."""
        self._check_there()
        step = self.state.step
        if self.controller is not None:
            self.state.hold = self.controller.trained(self.state.hold, stage, row)
        self.skipped.row(step, row)
        if step % self.options.probe_interval == 0 or step in self.recipe.stage_ends():
            try:
                self._probe(log, health, row)
            except RewardError as error:
                self._note(log, health, row)  # the iteration is whole; its probe is missing
                self._save_alone()
                self._reward_failed(error)
        else:
            self._note(log, health, row)
        if self.found is None and (what := self.skipped.too_many()):
            self._give_up(what)
        self.fresh = True

    def _check_there(self) -> None:
        """Raises ValueError where the run's folder is gone: what is written now would make another one, without its record and its checkpoints."""
        if not self.out.is_dir():
            raise ValueError(
                f"out: {self.out} was removed or moved while the run was writing to it, and the run ends at step {self.state.step}; if it was moved, the same "
                "command goes on with --out NEW PLACE, else begin anew"
            )

    def _save_alone(self) -> None:
        """Saves now, if no other process takes part in a checkpoint."""
        if self.ranks.count == 1:
            self.save()
            self.writer.wait()

    def _reward_failed(self, error: RewardError) -> NoReturn:
        """Raises the error of a reward with what is kept."""
        self.writer.join()
        raise failed(error, self.out, self.state.step, self.recipe.steps) from error

    def _give_up(self, what: str) -> NoReturn:
        """Raises Unusable; the newest good checkpoint is kept."""
        if not self.ranks.first:
            raise Unusable(f"run: {what} at step {self.state.step}, and the run ends; nothing was exported")
        self.writer.join()
        raise ended(what, self.out, self.state.step, self.skipped)

    def _is_due(self) -> bool:
        """Whether a checkpoint is: at intervals and, with `stop_on`, at every probe that is the best so far; never at the finding that stops the run."""
        step = self.state.step
        best = bool(self.options.stop_on) and stop.best(self.probed) == step
        regular = step > 0 and (step % self.options.save_every == 0 or step in self.recipe.stage_ends())
        return self.fresh and self.found is None and (best or regular)

    def _has_stopped(self) -> bool:
        """Whether the run stopped itself before and stays stopped; it then goes back to the kept checkpoint. Without that flag in `stop_on` it resumes."""
        stopped = self.ranks.of_first(self._stopped_before)
        if stopped is None:
            return False
        self._go_back(stop.Stopped(**stopped))
        return True

    def _stopped_before(self) -> dict[str, Any] | None:
        """The record of a run that stays stopped; of another one it is removed."""
        stopped = stop.read(self.out)
        if stopped is not None and stop.kind(stopped.flag) not in self.options.stop_on:
            (self.out / stop.NAME).unlink()
            return None
        return asdict(stopped) if stopped else None

    def _go_back(self, stopped: stop.Stopped) -> None:
        """Loads the kept checkpoint and removes all later ones."""
        path = self.ranks.of_first(lambda: _text(checkpoint.at(self.out / "checkpoints", stopped.kept)))
        if path is None:
            raise ValueError(f"out: {self.out} stopped itself and the checkpoint of step {stopped.kept} that it kept is gone or damaged; train anew")
        self._load(path)
        if self.ranks.first:
            checkpoint.drop_after(self.out / "checkpoints", stopped.kept)
        self.stopped = stopped
        print(stopped)

    def _probe(self, log: RunLog, health: HealthMonitor, row: dict[str, Any]) -> None:
        if not self.reference:
            self.reference = self._teacher_metrics()
        stage, _ = self.recipe.at(min(self.state.step, self.recipe.steps) - 1 if self.state.step else 0)
        watched = WatchedDenoiser(self.state.roles["student"])
        with averaged(self.state.trained["student"]):
            try:
                metrics = self.probe.student(watched, self.recipe.sampling_at(self.state.step))
            except ValueError as error:  # a reward of samples that are not finite
                if watched.finite:
                    raise
                self._give_up(f"{BROKEN} ({error})")
            if self.state.step in (0, *self.recipe.stage_ends()):
                self._show(stage)
        teacher = {f"probe/{key}_teacher": value for key, value in self.reference.items()}
        row |= {f"probe/{key}": value for key, value in metrics.items()} | teacher
        if self.controller is not None:
            following, _ = self.recipe.at(min(self.state.step, self.recipe.steps - 1))
            self.state.hold, scalars = self.controller.probed(self.state.hold, following, metrics)
            row |= scalars
        # counted as saved: `_is_due` has it saved unless it stops the run
        self.probed.append(stop.Probed(self.state.step, metrics.get("monitor_both"), True, metrics["diversity"]))
        self._note(log, health, row)
        if self.found is None and not (watched.finite and math.isfinite(metrics["mean_brightness"])):
            self._give_up(BROKEN)

    def _show(self, stage: Stage) -> None:
        """Writes views of the stage's matching force, and of an alignment force beside it."""
        step, folder, prompts = self.state.step, self.out / "views", few_of(self.probe.prompts, 6)
        save_views(folder, step, matching_views(self.state, stage, self.recipe, self.family, prompts, self.probe.seed), prompts)
        aligned = align_stage(self.recipe, step)
        shown = align_views(self.state, aligned, self.family, self.source, self.probe.seed) if aligned else None
        if shown is not None:
            save_views(folder, step, shown.tensors, shown.prompts, "align")

    def _note(self, log: RunLog, health: HealthMonitor, row: dict[str, Any]) -> None:
        """Logs a row and prints new health findings."""
        log.row(self.state.step, row)
        for finding in health.row(self.state.step, row):
            log.say(finding)
            if self.found is None and stop.asks(finding, self.options.stop_on):
                self.found = finding

    def _teacher_metrics(self) -> dict[str, float]:
        """Returns the teacher's metrics on the probe's prompts, which are computed once and kept with the run."""
        file = self.out / "teacher_probe.json"
        try:
            return read_object(file, "out", "it is made anew")
        except (FileNotFoundError, ValueError):
            guidance = by_level(self.recipe.guidance, self.recipe.guidance_2, self.family.boundary)
            metrics = self.known_teacher(self.probe, guidance) if self.known_teacher else None
            write_json(file, metrics or self.probe.teacher(self.state.roles["teacher"], guidance))
            return read_object(file, "out", "repeat the same command")

    def save(self) -> None:
        """Saves a checkpoint of the present step, which all ranks do together. In the background (`CheckpointWriter`) its file is there once `writer.wait`
        returns."""
        self.writer.wait()  # `good` looks at what is there
        self.fresh = False
        kept = (*self.recipe.stage_ends(), *(stop.protected(self.probed) if self.options.stop_on else ()), *self.skipped.good(self.out))
        contents, what = saved.contents(self.state, self.source), ""
        try:
            check_state(contents)
        except Unusable as error:
            what = str(error)
        if self.ranks.most(len(what)):
            self._give_up(what or "weights that another process holds are not finite")
        self.writer.save(self.state.step, contents, kept)

    def _load(self, path: str | Path) -> None:
        saved.load(self.state, self.source, checkpoint.load(Path(path)))

    def restore(self, start_from: Path | str | None) -> None:
        """Loads this run's newest intact checkpoint or, without any checkpoint, the roles of `start_from`. Raises ValueError if all are damaged."""
        own = self.ranks.of_first(self._newest)
        if own is not None:
            self._load(own)
        elif start_from is not None:
            with self.ranks.one_by_one():
                saved.begin_from(self.state, self.recipe, Path(start_from), reward=None if self.probe.reward is None else self.probe.reward.name)
        check_state(saved.contents(self.state, self.source))

    def _newest(self) -> str | None:
        """This run's newest intact checkpoint, after what was left of others is gone: a run that is done writes no more."""
        checkpoint.clear(self.out / "checkpoints")
        return _text(checkpoint.latest(self.out / "checkpoints"))

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT and self.ranks.count == 1:
            raise KeyboardInterrupt  # of an impatient user; torchrun repeats what it is sent, and schedulers send one signal after another
        self.asked = number


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()
