"""The section of docs/results.md on held figures: the controller beside fixed weights (benchmarks/hold.py)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from instep.training.hold import TOLERANCE

RESULTS = Path(__file__).parent / "results" / "hold"
LONG = RESULTS.parent / "hold_long"
TUNED_ON = 0  # the seed that the steps of the controller were tuned on
SEEN = (1, 2, 3)  # those that its largest weight was chosen on
LAST = 5  # probes at the end of a run whose mean is its result
WORTH = 0.05  # a smaller gain is not told from none
ASKED = 0.9  # part of the best fixed weight's gain


@dataclass(frozen=True)
class Outcome:
    """A run: the rise of the reward from its start to its last probes, the smallest diversity, and whether that is inside the band within the tolerance."""

    branch: str
    seed: int
    held: bool
    weight: float
    gain: float
    diversity: float
    least: float
    inside: bool

    @classmethod
    def of(cls, file: Path, steps: float = math.inf) -> Outcome:
        """A stored run, or its first iterations, so many `steps`."""
        found = json.loads(file.read_text())
        rows, bound = [row for row in found["rows"] if row["step"] <= steps], found["bound"]
        mean = lambda key: sum(row[key] for row in rows[-LAST:]) / LAST  # noqa: E731
        least = min(row["diversity"] for row in rows)
        inside = least >= bound - TOLERANCE * (1 - bound)
        seed = int(file.stem.rpartition("-")[2])
        return cls(found["branch"], seed, found["held"], found["weight"], mean("reward") - rows[0]["reward"], mean("diversity"), least, inside)

    @property
    def name(self) -> str:
        return f"held, {self.weight:g} times a multiplier" if self.held else f"{self.weight:g}"


@dataclass(frozen=True)
class Compared:
    """The controller of one seed beside the fixed weight inside the band that gains most (None: none is inside)."""

    held: Outcome
    best: Outcome | None
    weights: int

    @property
    def share(self) -> float | None:
        """The controller's part of the best fixed gain; None where no fixed weight gains."""
        return self.held.gain / self.best.gain if self.best is not None and self.best.gain > 0 else None


def lines() -> list[str]:
    """Of each branch: every seed's controller beside its best fixed weight, and the fixed weights of the seed it was tuned on."""
    found = sorted((Outcome.of(file) for file in RESULTS.glob("*.json")), key=lambda one: (one.branch, one.seed, one.held, one.weight))
    if not found:
        return []
    bound = json.loads(next(RESULTS.glob("*.json")).read_text())["bound"]
    fresh = sorted({one.seed for one in found} - {TUNED_ON, *SEEN})
    out = [
        "## Held figures",
        "",
        "`python benchmarks/hold.py`: matching and a reward branch from one distilled student of 2 steps in the laboratory (ring8, reward `half`), "
        f"with fixed weights (shares of matching's gradient) and with the controller that holds the diversity above {bound:g} of its start. Inside: never more "
        f"than {TOLERANCE:g} of the band below the bound, in any probe. The gain is the rise of the mean reward over the last {LAST} probes. "
        f"The controller's steps were tuned on seed {TUNED_ON}. On seeds {', '.join(map(str, SEEN))} it was then found that its multiplier, which could rise "
        "to 4, is better bounded by 1 (GRPO left the band in two of two fresh seeds; nothing else was changed)"
        + (f"; seed{'s' * (len(fresh) > 1)} {', '.join(map(str, fresh))} it had not seen." if fresh else "."),
        "",
    ]
    for branch in sorted({one.branch for one in found}):
        out += _branch([one for one in found if one.branch == branch])
    return out + _long()


def _long() -> list[str]:
    """GRPO for three times as many iterations: its gain after each third."""
    runs = {Outcome.of(file): file for file in LONG.glob("grpo-*.json")}
    if not runs:
        return []
    iterations = json.loads(next(iter(runs.values())).read_text())["rows"][-1]["step"]
    thirds = [iterations * n // 3 for n in (1, 2, 3)]
    out = [
        "GRPO's gains are no larger than its noise: on the one seed that was trained for three times as long they come and go with each of these weights, "
        f"so the controller's part of them says little. Its largest weight was .5 at first, as ReFL's, with 22% of the best fixed gains; 1 was chosen after "
        f"that, on these seeds. `python benchmarks/hold.py --branches grpo --seeds {next(iter(runs)).seed} --weights 0.5 0.7 1 "
        f"--iterations {iterations} --results benchmarks/results/hold_long`:",
        "",
        "| grpo, weight | " + " | ".join(f"gain after {n}" for n in thirds) + " | least diversity | inside |",
        "|---" * 6 + "|",
    ]
    for one in sorted(runs, key=lambda one: (one.held, one.weight)):
        gains = " | ".join(f"{Outcome.of(runs[one], n).gain:+.3f}" for n in thirds)
        out.append(f"| {one.name} | {gains} | {one.least:.3f} | {'yes' if one.inside else 'no'} |")
    return [*out, ""]


def _branch(outcomes: Sequence[Outcome]) -> list[str]:
    branch = outcomes[0].branch
    tuned = [one for one in outcomes if one.seed == TUNED_ON]
    weights = [f"| {branch}, weight | gain | diversity at the end | least | inside |", "|---|---|---|---|---|"]
    weights += [f"| {o.name} | {o.gain:+.3f} | {o.diversity:.3f} | {o.least:.3f} | {'yes' if o.inside else 'no'} |" for o in tuned]
    seeds = [
        f"| {branch}, seed | fixed weights | best of them inside | its gain | the controller's gain | part of it | its least diversity | inside |",
        "|---" * 8 + "|",
    ]
    all_seeds = {seed: compare([one for one in outcomes if one.seed == seed]) for seed in sorted({one.seed for one in outcomes})}
    known = {seed: compared for seed, compared in all_seeds.items() if compared is not None}
    for seed, compared in known.items():
        held, best, share = compared.held, compared.best, compared.share
        chosen = "none | - " if best is None else f"{best.weight:g} | {best.gain:+.3f} "
        part = "-" if share is None else f"{share:.0%}"
        where = f"{seed}{' (tuned on)' if seed == TUNED_ON else ' (seen)' if seed in SEEN else ''}"
        seeds.append(f"| {where} | {compared.weights} | {chosen}| {held.gain:+.3f} | {part} | {held.least:.3f} | {'yes' if held.inside else 'no'} |")
    return [*seeds, "", *_asked(branch, list(known.values())), "", f"Seed {TUNED_ON} in full:", "", *weights, ""]


def _asked(branch: str, compared: Sequence[Compared]) -> list[str]:
    """What was asked of the controller, and on how many seeds it was reached."""
    inside, shares = sum(one.held.inside for one in compared), [one.share for one in compared]
    reached, n = sum(share is not None and share >= ASKED for share in shares), len(compared)
    total = sum(one.held.gain for one in compared) / sum(one.best.gain for one in compared if one.best is not None)
    small = sum(one.best is None or one.best.gain < WORTH for one in compared)
    lines = [
        f"- {branch} inside the band: {inside} of {n}, asked: all, {'reached' if inside == n else '**not reached**'}",
        f"- {branch}, gain over all seeds together: {total:.0%} of that of the best fixed weights, asked: at least {ASKED:.0%}, "
        f"{'reached' if total >= ASKED else '**not reached**'}; so it is on {reached} of {n} seeds alone",
    ]
    return lines + ([f"- {small} of {n} best fixed gains are below {WORTH:g}, which is not told from none"] if small else [])


def compare(outcomes: Sequence[Outcome]) -> Compared | None:
    """The controller of one seed beside its fixed weights; None without a controller or without a fixed weight."""
    fixed, held = [one for one in outcomes if not one.held], [one for one in outcomes if one.held]
    if not fixed or not held:
        return None
    return Compared(held[0], max((one for one in fixed if one.inside), key=lambda one: one.gain, default=None), len(fixed))
