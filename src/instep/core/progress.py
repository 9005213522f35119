"""One line of progress with time left for every stage, also readable in a log file."""

from __future__ import annotations

import sys
import time
from typing import Self


class Progress:
    """`with Progress("vae", 100) as p: p.step(loss=.3)`: a rich bar on a terminal, a line every 30 seconds elsewhere."""

    def __init__(self, name: str, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.name, self.total, self.done = name, total, 0
        self.start = self.reported = time.monotonic()
        self.terminal = sys.stderr.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, disable=not self.terminal)
        self.task = self.bar.add_task(name, total=total)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        print(f"{self.name}: {self.done}/{self.total} in {time.monotonic() - self.start:.0f} s", file=sys.stderr, flush=True)

    def step(self, **values: float) -> None:
        """One step done; `values` stand beside the bar."""
        self.done += 1
        text = " ".join([self.name, *(f"{k} {v:.4g}" for k, v in values.items())])
        self.bar.update(self.task, completed=self.done, description=text)
        now = time.monotonic()
        if not self.terminal and now - self.reported > 30:
            self.reported = now
            left = (now - self.start) / self.done * (self.total - self.done)
            print(f"{text}: {self.done}/{self.total}, {left / 60:.1f} min left", file=sys.stderr, flush=True)
