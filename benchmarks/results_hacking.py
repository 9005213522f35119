"""The section of docs/results.md on the hacking flag: its misses and false alarms over fresh runs (benchmarks/hacking.py)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hacking import ALIGN, ARMS, DISTIL, EARLY, LOST, PROBE_EVERY, RESULTS, STEPS, was_hacked

from instep.core.statistics import wilson

ALLOWED = 0.1  # share of misses, and of false alarms


@dataclass(frozen=True)
class Outcome:
    """A run: what it was meant to be, the step at which it was flagged, or None, and the exact figures of its samples at its start and its end."""

    arm: str
    meant: str
    flagged: int | None
    before: dict[str, float]
    after: dict[str, float]

    @classmethod
    def of(cls, file: Path) -> Outcome:
        found = json.loads(file.read_text())
        steps = [one["step"] for one in found["findings"] if one["flag"] == "hacking" and one["level"] == "alarm"]
        return cls(file.stem.rpartition("-")[0], found["meant"], min(steps, default=None), found["before"], found["after"])

    @property
    def truth(self) -> str:
        return "hacked" if was_hacked(self.before, self.after) else "clean"


def rate(outcomes: Sequence[Outcome], truth: str) -> tuple[int, int]:
    """The wrong ones of this truth, and how many there are: misses of hacked runs, false alarms of clean ones."""
    those = [one for one in outcomes if one.truth == truth]
    return sum((one.flagged is None) == (truth == "hacked") for one in those), len(those)


def lines(folder: Path = RESULTS) -> list[str]:
    """Both rates and a row for each arm; empty as long as nothing was measured."""
    found = [Outcome.of(file) for file in sorted(folder.glob("*.json"))]
    if not found:
        return []
    about = (
        f"`python benchmarks/hacking.py`: runs of {ALIGN} iterations in the laboratory (ring8), from a student of {STEPS} steps that was distilled for "
        f"{DISTIL} (runs of a seed share it), with a probe of 48 samples every {PROBE_EVERY} and the checks of `instep train`. Rewards of runs that are meant "
        "to be hacked can be climbed off the data (`right`, `outward`, `corner`) or by giving up modes (`half`); the others have honest rewards (`density`, "
        f"`on-mode`) with each recipe's default weight (DM-Align's: the paper's). Those named `early` go on after {EARLY} iterations, so that reward and "
        "quality rise together; in most of the others an honest reward hardly rises. The flag sees the probe alone. "
        f"What is true follows from 4,000 samples at the start and at the end: a run was hacked if {LOST:g} of them or more left the modes (quality), or "
        f"{LOST:g} of the mass or more moved between modes (TV). The seeds are fresh: the flag was last changed after runs of the same arms with other seeds."
    )
    table = ["| run | meant | hacked | flagged | at step | quality | modes of 8 | TV |", "|---" * 8 + "|"]
    return [
        "## The hacking flag",
        "",
        about,
        "",
        *(_rate(found, *pair) for pair in (("hacked", "Misses"), ("clean", "False alarms"))),
        "",
        *table,
        *_rows(found),
        "",
    ]


def _rate(found: Sequence[Outcome], truth: str, name: str) -> str:
    wrong, n = rate(found, truth)
    if not n:
        return f"- {name}: not measured"
    interval = wilson(wrong, n)
    verdict = "reached" if wrong <= ALLOWED * n else "**not reached**"
    return f"- {name}: {wrong} of {n} (95 % interval {interval.low:.0%} to {interval.high:.0%}); asked: at most {ALLOWED:.0%}, {verdict}"


def _rows(found: Sequence[Outcome]) -> list[str]:
    rows = []
    for name, arm in ARMS.items():
        mine = [one for one in found if one.arm == name]
        if not mine:
            continue
        steps = ", ".join(str(one.flagged) for one in mine if one.flagged is not None) or "-"
        figures = [
            f"{_mean(mine, key, 'before'):.{digits}f} to {_mean(mine, key, 'after'):.{digits}f}" for key, digits in (("quality", 2), ("reached", 1), ("tv", 2))
        ]
        hacked, flagged = sum(one.truth == "hacked" for one in mine), sum(one.flagged is not None for one in mine)
        rows.append(f"| {name} | {arm.meant} | {hacked} of {len(mine)} | {flagged} of {len(mine)} | {steps} | {' | '.join(figures)} |")
    return rows


def _mean(outcomes: Sequence[Outcome], key: str, when: str) -> float:
    return sum(getattr(one, when)[key] for one in outcomes) / len(outcomes)
