"""The section of docs/results.md on held figures: the controller beside fixed weights (benchmarks/hold.py)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instep.training.hold import TOLERANCE

RESULTS = Path(__file__).parent / "results" / "hold"
LAST = 5  # probes at the end of a run whose mean is its result
WORTH = 0.05  # a smaller gain is not told from none, and nothing is a part of it


@dataclass(frozen=True)
class Outcome:
    """A run: the rise of the reward from its start to its last probes, the smallest diversity, and whether that is inside the band within the tolerance."""

    branch: str
    name: str
    gain: float
    diversity: float
    least: float
    inside: bool

    @classmethod
    def of(cls, found: dict[str, Any]) -> Outcome:
        rows, bound = found["rows"], found["bound"]
        mean = lambda key: sum(row[key] for row in rows[-LAST:]) / LAST  # noqa: E731
        least = min(row["diversity"] for row in rows)
        name = f"held, {found['weight']:g} times a multiplier" if found["held"] else f"{found['weight']:g}"
        inside = least >= bound - TOLERANCE * (1 - bound)
        return cls(found["branch"], name, mean("reward") - rows[0]["reward"], mean("diversity"), least, inside)


def lines() -> list[str]:
    """The table of each branch, and what the controller reached of the best fixed weight inside the band."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    if not found:
        return []
    found.sort(key=lambda one: (one["branch"], one["held"], one["weight"]))
    bound = found[0]["bound"]
    out = [
        "## Held figures",
        "",
        "`python benchmarks/hold.py`: matching and a reward branch from one distilled student of 2 steps in the laboratory (ring8, reward `half`, one seed), "
        f"with fixed weights (shares of matching's gradient) and with the controller that holds the diversity above {bound:g} of its start. Inside: never more "
        f"than {TOLERANCE:g} of the band below the bound, in any probe. The gain is the rise of the mean reward over the last {LAST} probes. "
        "The controller was tuned on this very set-up, and the grid of fixed weights is coarse: read it as a fit, not as a test on fresh runs.",
        "",
    ]
    for branch in sorted({one["branch"] for one in found}):
        out += _branch([Outcome.of(one) for one in found if one["branch"] == branch], [one["held"] for one in found if one["branch"] == branch])
    return out


def _branch(outcomes: Sequence[Outcome], held: Sequence[bool]) -> list[str]:
    table = [f"| {outcomes[0].branch}, weight | gain | diversity at the end | least | inside |", "|---|---|---|---|---|"]
    table += [f"| {o.name} | {o.gain:+.3f} | {o.diversity:.3f} | {o.least:.3f} | {'yes' if o.inside else 'no'} |" for o in outcomes]
    fixed = [o for o, is_held in zip(outcomes, held, strict=True) if not is_held and o.inside]
    own = next((o for o, is_held in zip(outcomes, held, strict=True) if is_held), None)
    if own is None or not fixed:
        return [*table, ""]
    best = max(fixed, key=lambda o: o.gain)
    share = f", {own.gain / best.gain:.0%} of it" if best.gain > WORTH else ""
    text = f"The best fixed weight inside the band ({best.name}) gains {best.gain:+.3f}, the controller {own.gain:+.3f}{share}."
    return [*table, "", text if own.inside else f"{text} It left the band.", ""]
