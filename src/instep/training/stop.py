"""A run that stops itself: at which findings, which checkpoint it goes back to, and the record that makes it stay stopped.

The checkpoint it goes back to is on disk and protected long before anything is found. So the record is written once that is sure, then what lies
after it is removed: a run killed in between finds the record and finishes the same way, one killed before it finds the same again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from instep.core.files import write_json
from instep.core.json_lines import read_rows
from instep.training import checkpoint
from instep.training.findings import FLAGS, PERSIST
from instep.training.health import Finding, flags
from instep.training.history import number, probes

NAME = "stopped.json"


@dataclass(frozen=True)
class Stopped:
    """At which step a run stopped itself and for which flag; the step of the checkpoint it went back to, and why that one."""

    step: int
    flag: str
    text: str
    kept: int
    why: str

    def __str__(self) -> str:
        on = f"to train on from there, repeat the command without --stop-on {kind(self.flag)}"
        return f"stopped at step {self.step}, {self.flag}: {self.text}\nkept the checkpoint of step {self.kept}: {self.why}; {on}"


@dataclass(frozen=True)
class Probed:
    """A probe: its step, the monitor's share of right samples (None without a monitor), whether there is a checkpoint of it, and its diversity."""

    step: int
    share: float | None
    saved: bool
    diversity: float = 0.0


def check_flags(stop_on: Iterable[str]) -> None:
    """ValueError for what is no flag of the health checks."""
    for flag in stop_on:
        if flag not in FLAGS:
            raise ValueError(f"stop_on: {flag!r} is not allowed; allowed: {', '.join(FLAGS)}")


def kind(flag: str) -> str:
    """A flag without the name of what it is about: critic for critic:fake."""
    return flag.partition(":")[0]


def asks(finding: Finding, stop_on: Sequence[str]) -> bool:
    """Whether a run stops at this finding."""
    return finding.level != "ok" and kind(finding.flag) in stop_on


def probed(out: Path) -> list[Probed]:
    """The probes in a run's log."""
    there = {checkpoint.step_of(path) for path in checkpoint.every(out / "checkpoints")}
    rows = probes(read_rows(out / "log.jsonl"))
    return [Probed(row["step"], number(row, "probe/monitor_both"), row["step"] in there, number(row, "probe/diversity") or 0.0) for row in rows]


def best(known: Sequence[Probed]) -> int | None:
    """The step of the saved probe with the highest share of right samples, of equal ones the most diverse; without a monitor the latest."""
    saved = [p for p in known if p.saved]
    # a share of some dozens of samples is often the same twice, and what a hacked reward takes first is diversity
    order = lambda p: (-1.0, 0.0, p.step) if p.share is None else (p.share, p.diversity, p.step)  # noqa: E731
    return max(saved, key=order).step if saved else None


def protected(known: Sequence[Probed]) -> tuple[int, ...]:
    """Steps that a stop may go back to: the best probe so far, and the best of those before the newest, which may turn out to be evidence."""
    return tuple(step for k in range(PERSIST) if (step := best(known[: len(known) - k])) is not None)


def open_finding(out: Path, stop_on: Sequence[str]) -> Finding | None:
    """The first finding a run would stop at that has begun and not cleared: where stopping was asked for only later."""
    raised = [r for r in flags(out) if r.cleared is None and kind(r.flag) in stop_on]
    return Finding(raised[0].step, raised[0].level, raised[0].flag, raised[0].text) if raised else None


def decide(out: Path, finding: Finding, known: Sequence[Probed], stop_on: Sequence[str]) -> Stopped:
    """Where to go back to, written to stopped.json.

    The best probe before the finding, by the monitor, at which nothing of the kind was open. A probe finding needs `PERSIST` probes that agree, so
    the ones before it that showed the same do not count, unless there are no others.
    """
    folder = out / "checkpoints"
    raised = [r for r in flags(out) if kind(r.flag) in stop_on]
    clear = [p for p in known if p.step < finding.step and not any(r.step <= p.step and (r.cleared is None or p.step < r.cleared) for r in raised)]
    clear = [p for p in clear if p.saved and checkpoint.at(folder, p.step) is not None]
    evidence = {p.step for p in [p for p in known if p.step <= finding.step][-PERSIST:]} if any(p.step == finding.step for p in known) else set()
    unaffected = [p for p in clear if p.step not in evidence]
    kept = best(unaffected or clear)
    share = next((p.share for p in known if p.step == kept), None)
    if kept is not None:
        what = "it is the last probe" if share is None else f"the monitor's share of right samples was highest there ({share:.2f})"
        why = f"{what} among the checkpoints before the finding" + ("" if unaffected else ", all of which may show it already")
    else:
        earlier = [path for path in checkpoint.every(folder) if checkpoint.step_of(path) < finding.step]
        path = next((path for path in earlier if checkpoint.at(folder, checkpoint.step_of(path)) is not None), None) or checkpoint.latest(folder)
        if path is None:
            raise ValueError(f"stop_on: {finding.flag} was found at step {finding.step} and {folder} holds no checkpoint to go back to")
        kept = checkpoint.step_of(path)
        why = "it is the last checkpoint before the finding" if kept < finding.step else "there is no checkpoint from before the finding"
    stopped = Stopped(finding.step, finding.flag, finding.text, kept, why)
    write_json(out / NAME, asdict(stopped))
    return stopped


def read(out: Path) -> Stopped | None:
    """The record of a run that stopped itself, None of one that did not."""
    file = out / NAME
    return Stopped(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
