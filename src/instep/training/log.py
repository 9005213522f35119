"""A run's log: JSON lines always, TensorBoard where it is installed, and a progress display with the remaining time."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from instep.core.files import append_text, write_error
from instep.core.json_lines import trim
from instep.training.health import Finding

ROLLING = 10  # iterations that the shown metrics are averaged over
QUIET_SECONDS = 20  # without a terminal: a line at most this often
Tracker = Callable[[int, Mapping[str, float]], object]
SHOWN = {"reward/train": "reward", "critic/fake": "fake", "probe/monitor_both": "monitor", "hold/multiplier": "multiplier"}


class RunLog:
    """Rows of scalars by step. Values that are not finite are written as null.

    `tracker` is called with (step, scalars) for every row. If it raises, the error is reported once and the tracker is not called again: a failing
    tracking server must not end a run.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0, tracker: Tracker | None = None) -> None:
        self.console = Console(stderr=True)
        trim(folder / "log.jsonl", resume_step if resume_step else -1)
        self._file, self._events = folder / "log.jsonl", folder / "tensorboard"
        with _written(self._events):
            self._board = _tensorboard(self._events, resume_step)
        self._hook, threading.excepthook = threading.excepthook, self._in_thread
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=ROLLING)
        self._last: dict[str, float] = {}
        self._progress: Progress | None = None
        self._tracker = tracker
        self._spoken = -math.inf
        self._total, self._initial, self._started = 0, resume_step, time.monotonic()

    @contextmanager
    def progress(self, total: int, *, initial: int) -> Iterator[None]:
        """A bar with ETA around the loop; plain lines where there is no terminal."""
        self._total, self._initial, self._started = total, initial, time.monotonic()
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
        )
        with Progress(*columns, console=self.console) as self._progress:
            self._task = self._progress.add_task("", total=total, completed=initial, metrics="")
            yield
        self._progress = None

    def row(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Appends one row and displays it. Raises OSError, with a one-line message, if it cannot be written (full disk); checkpoints are not touched."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in scalars.items()}
        append_text(self._file, json.dumps({"step": step, **clean}) + "\n")
        if self._board is not None:
            with _written(self._events):
                for key, value in clean.items():
                    if isinstance(value, int | float):
                        self._board.add_scalar(key, value, step)
                self._board.flush()  # a killed run leaves the same scalars in both places
        self._track(step, clean)
        self._recent.append(clean)
        self._last |= {k: v for k, v in clean.items() if isinstance(v, int | float)}
        self._show(step, str(scalars.get("stage", "")))

    def _track(self, step: int, scalars: Mapping[str, Any]) -> None:
        if self._tracker is None:
            return
        try:
            self._tracker(step, {k: v for k, v in scalars.items() if isinstance(v, int | float)})
        except Exception as error:
            self.console.print(f"[yellow]warn[/] the tracker raised {type(error).__name__}: {escape(str(error))}; it is not called again, log.jsonl goes on")
            self._tracker = None

    def metrics(self) -> str:
        """Rolling metrics: seconds an iteration, rewards, losses; figures that are held, relative to their start, with their bounds."""
        parts = []
        for key, name in {"wall_s": "s/it", **SHOWN}.items():
            values = [row[key] for row in self._recent if isinstance(row.get(key), int | float)]
            if not values and key in self._last:
                values = [self._last[key]]
            if values:
                parts.append(f"{name} {sum(values) / len(values):.3g}")
        cosines = {k: v for k, v in self._last.items() if k.startswith("force/cosine/")}
        parts += [f"cos({k.removeprefix('force/cosine/')}) {v:+.2f}" for k, v in cosines.items()]
        held = {k.removesuffix("/bound"): v for k, v in self._last.items() if k.startswith("hold/") and k.endswith("/bound")}
        parts += [f"{k.removeprefix('hold/')} {self._last[k]:.3f} ({'≥' if v < 1 else '≤'} {v:g})" for k, v in held.items() if k in self._last]
        return "  ".join(parts)

    def _show(self, step: int, stage: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=stage, metrics=self.metrics())
        elif time.monotonic() - self._spoken > QUIET_SECONDS or step == self._total:
            self._spoken = time.monotonic()
            print(f"{stage:<8} {step}/{self._total}  eta {self._left(step)}  {self.metrics()}", file=sys.stderr, flush=True)

    def _left(self, step: int) -> str:
        """Minutes and seconds to the end; unknown before the first iteration."""
        done = step - self._initial
        if done < 1:
            return "?"
        left = int((time.monotonic() - self._started) / done * (self._total - step))
        return f"{left // 60}:{left % 60:02d}"

    def say(self, finding: Finding) -> None:
        """Prints a health finding above the progress bar."""
        colour = {"alarm": "red", "warn": "yellow", "ok": "green"}[finding.level]
        self.console.print(f"[{colour}]{finding.level}[/] {escape(finding.text)}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Closes the log. Every row is flushed by now, so an error here was already reported before."""
        if self._board is not None:
            with suppress(OSError):
                self._board.close()
        threading.excepthook = self._hook

    def _in_thread(self, failed: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread hands its error to `flush`, where it becomes one line; its traceback would be a second report of it."""
        if not type(failed.thread).__module__.startswith("tensorboard."):
            self._hook(failed)


@contextmanager
def _written(events: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(error, f"TensorBoard's copy of the log in {events}", "the checkpoints are intact") from error


def _tensorboard(events: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # without a checkpoint to go on from, step 0 is repeated too
    return SummaryWriter(str(events), purge_step=resume_step + 1 if resume_step else 0)
