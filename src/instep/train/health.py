"""Health: what looks wrong in a run, in words. Pure checks on logged rows, and a monitor that says each finding once.

Health may look at the training reward and at the *monitor* judge; a held-out judge is for reported figures only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Row = Mapping[str, Any]
Level = Literal["ok", "warn", "alarm"]

PERSIST = 2  # probes in a row that must agree: one noisy probe of some dozens of samples says little
WINDOW = 20  # iterations of a rolling mean
OPPOSED = -0.5  # cosine of two forces below which most of each is spent on undoing the other
SILENT = 0.01  # share of the strongest force below which another one does nothing
INK_OFF = 0.25  # relative deviation of mean brightness from the teacher's that the eye sees as over- or under-saturation
CLIPPED = 0.05  # share of pixels more than .05 outside [0, 1] (real videos through the VAE: well below .01)
HALVED = 0.6  # a figure below this share of its reference has visibly collapsed
GAIN = 0.1  # a relative change of a reward that is no longer noise of a probe
CRITIC_UP = 1.5  # critic loss over its stage's early value: the fake no longer keeps up
CONSTANT = 0.8  # share of groups without any spread in reward


@dataclass(frozen=True)
class Finding:
    """One observation: how bad, a stable name, and a sentence that says what it is and what to do."""

    step: int
    level: Level
    flag: str
    text: str


def probes(rows: Sequence[Row]) -> list[Row]:
    """Rows that carry probe figures."""
    return [row for row in rows if "probe/ink" in row]


def mean(rows: Sequence[Row], key: str) -> float | None:
    """Mean of a scalar over the rows that have it."""
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    return sum(values) / len(values) if values else None


def _this_stage(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("stage") == rows[-1].get("stage")]


def _forces(rows: Sequence[Row]) -> Iterator[tuple[Level, str, str]]:
    recent = _this_stage(rows)[-WINDOW:]
    if len(recent) < WINDOW:
        return
    for key in sorted({k for row in recent for k in row if k.startswith("force/cosine/")}):
        cosine = mean(recent, key)
        if cosine is not None and cosine < OPPOSED:
            pair = key.removeprefix("force/cosine/").replace("~", " and ")
            yield "warn", f"opposed:{pair}", f"the forces {pair} oppose each other (cosine {cosine:.2f}): lower the weight of one of them"
    norms = {k.split("/")[1]: mean(recent, k) or 0.0 for k in recent[-1] if k.startswith("force/") and k.endswith("/norm")}
    for name, norm in norms.items():
        if norm < SILENT * max(norms.values()):
            yield "warn", f"silent:{name}", f"the force {name} is {norm / max(norms.values()):.1e} of the strongest one: it does nothing; raise its weight or drop it"


def _gradients(rows: Sequence[Row]) -> Iterator[tuple[Level, str, str]]:
    skipped = mean(rows[-WINDOW:], "grad/student/skipped") or 0
    if skipped > 0:
        yield "alarm", "nonfinite", f"{skipped:.0%} of the last {WINDOW} student steps had a gradient that is not finite and were skipped: lower the learning rate, or look for a reward with an infinite gradient"


def _critic(rows: Sequence[Row]) -> Iterator[tuple[Level, str, str]]:
    stage = _this_stage(rows)
    for key in sorted(k for k in rows[-1] if k.startswith("critic/")):
        early, late = mean(stage[:WINDOW], key), mean(stage[-WINDOW:], key)
        if len(stage) >= 3 * WINDOW and early and late and late > CRITIC_UP * early:
            name = key.removeprefix("critic/")
            yield "warn", f"critic:{name}", f"the loss of the critic {name} is {late / early:.1f} times its early value: it no longer follows the student; raise its updates or lower the student's learning rate"


def _reward(rows: Sequence[Row]) -> Iterator[tuple[Level, str, str]]:
    constant = mean(rows[-WINDOW:], "reward/constant_groups")
    if constant is not None and len(rows) >= WINDOW and constant > CONSTANT:
        yield "warn", "constant_reward", f"{constant:.0%} of the groups got equal rewards and hence no advantage: the reward does not tell samples of one prompt apart; use prompts that leave more open, or another reward"


def _pictures(rows: Sequence[Row]) -> Iterator[tuple[Level, str, str]]:
    seen = probes(rows)
    last = seen[-PERSIST:]
    if len(last) < PERSIST or last[0]["step"] == 0:
        return

    def always(test: Callable[[Row], bool]) -> bool:
        return all(test(row) for row in last)

    now, start = last[-1], seen[0]
    ink = [(row["probe/ink"], row.get("probe/ink_teacher")) for row in last]
    if all(teacher and a > (1 + INK_OFF) * teacher for a, teacher in ink):
        yield "warn", "oversaturation", f"samples are {ink[-1][0] / ink[-1][1] - 1:.0%} brighter than the teacher's: lower the guidance or the weight of the reward"
    if all(teacher and a < (1 - INK_OFF) * teacher for a, teacher in ink):
        yield "warn", "fading", f"samples are {1 - ink[-1][0] / ink[-1][1]:.0%} darker than the teacher's: the student fades; check the learning rates and the reward"
    if always(lambda row: row.get("probe/saturation", 0) > CLIPPED):
        yield "warn", "clipping", f"{now['probe/saturation']:.0%} of the pixels lie outside what a picture can show: over-saturation; lower the guidance"
    for key, flag, words in (("motion", "still", "motion has died down"), ("diversity", "collapse", "samples of one prompt have become alike")):
        teacher = now.get(f"probe/{key}_teacher")
        reference = max(teacher or 0.0, start[f"probe/{key}"] if start["step"] else 0.0)
        if reference and always(lambda row, k=key, r=reference: row[f"probe/{k}"] < HALVED * r):  # type: ignore[misc]
            yield "alarm", flag, f"{words}: {key} is {now[f'probe/{key}'] / reference:.0%} of the teacher's; lower the weight of the reward, or stop earlier"


def _hacking(rows: Sequence[Row]) -> Iterator[tuple[Level, str, str]]:
    """Training reward up while the monitor or the diversity goes down, since the stage began."""
    stage = [row for row in probes(rows) if row.get("stage") == rows[-1].get("stage")]
    stage = [row for row in stage if "probe/train_score" in row]
    if len(stage) <= PERSIST:
        return
    first, last = stage[0], stage[-PERSIST:]

    def change(row: Row, key: str) -> float:
        before = first.get(f"probe/{key}", 0.0)
        return (row.get(f"probe/{key}", before) - before) / max(abs(before), 1e-6)

    up = all(change(row, "train_score") > GAIN for row in last)
    if up and all(change(row, "monitor_score") < -GAIN for row in last):
        yield "alarm", "hacking", f"the training reward rose by {change(last[-1], 'train_score'):.0%} while the monitor's fell by {-change(last[-1], 'monitor_score'):.0%}: the reward is being hacked; go back to an earlier checkpoint, lower its weight"
    elif up and all(change(row, "diversity") < HALVED - 1 for row in last):
        yield "alarm", "hacking", f"the training reward rose by {change(last[-1], 'train_score'):.0%} while diversity fell by {-change(last[-1], 'diversity'):.0%}: the reward is bought with variety; lower its weight"


CHECKS = (_forces, _gradients, _critic, _reward, _pictures, _hacking)


def examine(rows: Sequence[Row]) -> list[Finding]:
    """Everything that looks wrong after the last of `rows` (oldest first)."""
    if not rows:
        return []
    return [Finding(int(rows[-1]["step"]), level, flag, text) for check in CHECKS for level, flag, text in check(rows)]


class HealthMonitor:
    """Reads a run's rows as they come; returns a finding when it begins, and says when it has cleared. Kept in health.jsonl."""

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        from instep.train.log import trim

        self._file = folder / "health.jsonl"
        trim(self._file, resume_step if resume_step else -1)
        self._rows: list[Row] = []
        self._open: dict[str, Finding] = {}
        self._replay(folder / "log.jsonl", resume_step)

    def _replay(self, log: Path, resume_step: int) -> None:
        if log.is_file() and resume_step:
            for line in log.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if row["step"] <= resume_step:
                    self._take(row)

    def _take(self, row: Row) -> list[Finding]:
        """Adds a row; returns what is new with it. A flag can clear only where probes were taken."""
        self._rows.append(row)
        now, step = {finding.flag: finding for finding in examine(self._rows)}, int(row["step"])
        news = [finding for flag, finding in now.items() if flag not in self._open]
        if "probe/ink" in row:
            news += [Finding(step, "ok", flag, f"cleared: {flag}") for flag in self._open if flag not in now]
            self._open = now
        else:
            self._open = {**now, **self._open}
        return news

    def row(self, step: int, scalars: Row) -> list[Finding]:
        """Findings that are new with this row, and flags that have cleared with it."""
        news = self._take({"step": step, **scalars})
        if news:
            with open(self._file, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(finding)) + "\n" for finding in news)
        return news
