"""Early stopping: the findings at which a run stops, the checkpoint it goes back to, and the record that keeps it stopped.

That checkpoint is on disk and protected long before a finding. So the record is written first, and later checkpoints are removed after it: a run
killed in between reads the record and finishes the same way, and one killed before it comes to the same finding again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from instep.core.files import write_json
from instep.core.json_files import read_object
from instep.core.json_lines import read_rows
from instep.training import checkpoint
from instep.training.findings import FLAGS
from instep.training.health import Finding, flags
from instep.training.history import PERSIST, number, probes

NAME = "stopped.json"


@dataclass(frozen=True)
class Stopped:
    """The record of an early stop: its step and flag, the step of the checkpoint that the run went back to, and the reason for that choice."""

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
    """A probe: its step, the monitor's share of right samples (None without a monitor), whether it has a checkpoint, and its diversity."""

    step: int
    share: float | None
    saved: bool
    diversity: float = 0.0


def check_flags(stop_on: Iterable[str]) -> None:
    """Raises ValueError for anything but a flag of the health checks."""
    for flag in stop_on:
        if flag not in FLAGS:
            raise ValueError(f"stop_on: {flag!r} is not allowed; allowed: {', '.join(FLAGS)}")


def kind(flag: str) -> str:
    """Returns a flag without the name after its colon: critic for critic:fake."""
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
    """Returns the step of the saved probe with the highest share of right samples (the most diverse of equal ones); without a monitor, the latest."""
    saved = [p for p in known if p.saved]
    # shares of a few dozen samples often tie, and reward hacking costs diversity first
    order = lambda p: (-1.0, 0.0, p.step) if p.share is None else (p.share, p.diversity, p.step)  # noqa: E731
    return max(saved, key=order).step if saved else None


def protected(known: Sequence[Probed]) -> tuple[int, ...]:
    """Steps that a stop may go back to: the best probe so far, and the best of those before the newest, since the newest may turn out to show the finding."""
    return tuple(step for k in range(PERSIST) if (step := best(known[: len(known) - k])) is not None)


def open_finding(out: Path, stop_on: Sequence[str]) -> Finding | None:
    """Returns the first open finding at which the run stops, for a run that got `stop_on` only when it was resumed."""
    raised = [r for r in flags(out) if r.cleared is None and kind(r.flag) in stop_on]
    return Finding(raised[0].step, raised[0].level, raised[0].flag, raised[0].text) if raised else None


def decide(out: Path, finding: Finding, known: Sequence[Probed], stop_on: Sequence[str]) -> Stopped:
    """Chooses the checkpoint to go back to and writes the decision to stopped.json.

    It is the best probe before the finding, by the monitor, at which no such flag was open. A probe finding needs `PERSIST` probes that agree, so
    the earlier ones among these do not count, unless there are no others.
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
    """Returns the record of a run that stopped itself, or None."""
    file = out / NAME
    if not file.is_file():
        return None
    fix = "delete it to train on, or restore it from a copy of the run"
    found = read_object(file, "out", fix)
    kinds = {"step": int, "flag": str, "text": str, "kept": int, "why": str}
    if found.keys() != kinds.keys() or not all(isinstance(found[name], kind) for name, kind in kinds.items()):
        raise ValueError(f"out: {file} is no record of a run that stopped itself; {fix}")
    return Stopped(**found)
