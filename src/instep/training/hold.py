"""Held figures: a controller that moves the weight of the reward terms so that the reward rises as fast as the held figures allow.

The user names figures of the probe and how much of each is to be kept, relative to its value x = 1 where the stage began: `diversity=0.95` is a bound b = 0.95
from below, `matching=1.1` one from above. The **slack** of a figure is s = (x - b) / (1 - b): 1 at the start, 0 at the bound, negative outside, for both
directions. The controller sees the smallest slack after each probe and steers the multiplier m of all reward terms:

    p = s + LOOK_AHEAD min(0, s - s')            s' at the probe before: where a falling slack will be in LOOK_AHEAD probes
    e = p - MARGIN
    u <- clip(u + (RISE min(e, 1) if e > 0 else max(FALL e, -3)), ln LEAST, ln MOST)
    m = exp(u) clip(1 + s / OUTSIDE, 0, 1)

It is dual ascent on the logarithm of the weight with a derivative term. In ln m the loop has one gain whatever the unit of the weight: for a figure x = 1 - a m
the slack is 1 - exp(u - u*), u* the weight at the bound, so the step sizes alone decide how fast u comes to rest; it falls faster than it rises. The integral
is u itself, and u is clipped, so nothing winds up while a bound is active. The last factor is proportional: outside its band a figure switches the reward off,
wholly at a slack of -OUTSIDE.

The weight that the user gives is the most there is (MOST): it says how hard the reward may push at all. A policy gradient whose weight may grow as long as
nothing is seen of it pushes in bursts, and matching swings back as far: the band is left while the reward is already off.

**Tolerance.** For a first-order figure x <- x + r (1 - a m - x) with r from 0.05 to 1 a probe and a up to 10 times the width of the band, the overshoot is
below a tenth of the band (`TOLERANCE`), and x comes to rest MARGIN inside it (`test_hold.py`). A figure that never recovers (r without a restoring force) can
be slowed down, but not held.

**Noise.** The look-ahead takes a chance fall for the beginning of a real one and nothing takes back a chance rise, so the noisier a figure is, the farther
inside its band it rests: on these plants at a slack of 0.1, 0.35 and 0.56 for a standard deviation of 0, 0.05 and 0.1 of the band a probe, and what the
probes show stays within the tolerance in 98 of 100 runs (`test_hold.py`). More samples a probe give the reward more room.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from instep.methods.recipe import Recipe, Stage
from instep.metrics.compare import direction

RISE = 0.2  # step of ln m at full slack, the most that it rises in one probe: a factor of 1.22
FALL = 0.5  # its step for a unit of slack that is missing; it falls by 3 at most, a factor of 0.05
LOOK_AHEAD = 5.0  # probes
MARGIN = 0.1  # slack at which the multiplier rests
OUTSIDE = 0.5  # slack below zero at which the reward is off
START, LEAST, MOST = 0.1, 1 / 64, 1.0  # of the weight that the user gives, which is never exceeded
TOLERANCE = 0.1  # overshoot in widths of the band
# steps between the probes of a run that holds figures, unless it is given
HOLD_EVERY = 5
MATCHING = "matching"


@dataclass(frozen=True)
class Bound:
    """A held figure: at least `fraction` of its value at the start of the stage, or, where the fraction is above 1, at most that."""

    figure: str
    fraction: float

    def __post_init__(self) -> None:
        wanted = direction(self.figure)
        if not (math.isfinite(self.fraction) and self.fraction > 0 and self.fraction != 1):
            raise ValueError(f"hold: {self.figure}={self.fraction:g} is not allowed; a fraction of the start below 1 (at least) or above 1 (at most)")
        if wanted > 0 and self.fraction > 1:
            raise ValueError(f"hold: {self.figure}={self.fraction:g} is not allowed; more of it is better, so it is held above a fraction below 1, like 0.95")
        if wanted < 0 and self.fraction < 1:
            raise ValueError(f"hold: {self.figure}={self.fraction:g} is not allowed; less of it is better, so it is held below a fraction above 1, like 1.1")

    def slack(self, relative: float) -> float:
        """The room that a figure, relative to its start, has left: 1 at the start, 0 at the bound, negative outside."""
        return (relative - self.fraction) / (1 - self.fraction)


def parse(text: str) -> tuple[Bound, ...]:
    """Reads `figure=fraction,figure=fraction`. Raises ValueError for anything else, and for a figure that is given twice."""
    bounds = []
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise ValueError(f"hold: {part.strip()!r} is not figure=fraction; write for example diversity=0.95,matching=1.1")
        bounds.append(Bound(name, number))
    names = [bound.figure for bound in bounds]
    if len(set(names)) < len(names):
        raise ValueError(f"hold: {text!r} names a figure twice; give each one bound")
    return tuple(bounds)


def check(bounds: Collection[Bound], recipe: Recipe, figures: Collection[str]) -> None:
    """Raises ValueError if the recipe has no reward term to steer, or if a figure is neither one of the probe's `figures` nor matching."""
    rewarded = [stage for stage in recipe.stages if stage.steps and stage.rewarded]
    if not rewarded:
        raise ValueError(f"hold: {recipe.name} has no reward term whose weight could be moved; leave the option out, or choose a recipe like refl or dmdr")
    allowed = sorted({*figures, *([MATCHING] if all(stage.matching for stage in rewarded) else [])})
    for bound in bounds:
        if bound.figure not in allowed:
            raise ValueError(f"hold: {bound.figure!r} is not a figure of this run's probes; allowed: {', '.join(allowed)}")


@dataclass(frozen=True)
class Law:
    """The control law and its state: u = ln m before the factor for a figure outside its band, and the last slack."""

    u: float = math.log(START)
    slack: float = 1.0

    @property
    def multiplier(self) -> float:
        return math.exp(self.u) * min(1.0, max(0.0, 1 + self.slack / OUTSIDE))

    def after(self, slack: float) -> Law:
        """The law after a probe with this smallest slack."""
        ahead = slack + LOOK_AHEAD * min(0.0, slack - self.slack)
        error = ahead - MARGIN
        step = RISE * min(error, 1.0) if error > 0 else max(FALL * error, -3.0)
        return Law(min(math.log(MOST), max(math.log(LEAST), self.u + step)), slack)


@dataclass(frozen=True)
class Held:
    """What the controller carries: the stage, each figure's value at its start, the law, and the sum of the matching force's norms since the last probe."""

    stage: str = ""
    active: bool = False
    start: Mapping[str, float] = field(default_factory=dict)
    law: Law = Law()
    total: float = 0.0
    count: int = 0

    @property
    def multiplier(self) -> float:
        """The factor on the weights of reward terms; 1 in stages without any."""
        return self.law.multiplier if self.active else 1.0

    @classmethod
    def of_json(cls, saved: Mapping[str, Any]) -> Held:
        return cls(**{**saved, "law": Law(**saved["law"])})


@dataclass(frozen=True)
class Controller:
    """Holds `bounds` in the stages that have reward terms. Its state is a `Held`, which it returns anew."""

    bounds: tuple[Bound, ...]

    def trained(self, held: Held, stage: Stage, row: Mapping[str, Any]) -> Held:
        """After an iteration: adds the norm of the matching force to its mean."""
        norm = row.get(f"force/{stage.matching.name}/norm") if stage.matching else None
        return held if not isinstance(norm, float) or not math.isfinite(norm) else replace(held, total=held.total + norm, count=held.count + 1)

    def probed(self, held: Held, following: Stage, figures: Mapping[str, float]) -> tuple[Held, dict[str, float]]:
        """After a probe with these `figures`, before an iteration of the stage `following`. Returns the new state, and scalars for the log.

        Raises ValueError for a figure that is not positive at the first start, to which nothing is relative. At a later stage's start such a figure keeps the
        start it had.
        """
        seen = {**figures, **({MATCHING: held.total / held.count} if held.count else {})}
        scalars: dict[str, float] = {}
        if held.active:
            held, scalars = self._moved(held, seen)
        if held.stage != following.name:
            held = self._begun(held, following, figures)
        return replace(held, total=0.0, count=0), {**scalars, **({"hold/multiplier": held.multiplier} if held.active else {})}

    def _moved(self, held: Held, seen: Mapping[str, float]) -> tuple[Held, dict[str, float]]:
        """One step of the law, and each figure relative to its start."""
        if MATCHING in seen and MATCHING not in held.start:  # its start is its mean before the first probe of the stage
            held = replace(held, start={**held.start, MATCHING: seen[MATCHING]})
        scalars: dict[str, float] = {}
        slacks: list[float] = []
        for bound in self.bounds:
            value, start = seen.get(bound.figure), held.start.get(bound.figure)
            if value is None or not start:
                continue
            slack = bound.slack(value / start)
            slacks.append(slack if math.isfinite(slack) else -OUTSIDE)
            scalars |= {f"hold/{bound.figure}": value / start, f"hold/{bound.figure}/bound": bound.fraction}
        return (replace(held, law=held.law.after(min(slacks))) if slacks else held), scalars

    def _begun(self, held: Held, stage: Stage, figures: Mapping[str, float]) -> Held:
        """The state at the start of a stage."""
        start = {key: value for key, value in held.start.items() if key != MATCHING}
        for bound in self.bounds:
            if bound.figure == MATCHING:
                continue
            if figures.get(bound.figure, 0.0) > 0:
                start[bound.figure] = figures[bound.figure]
            elif bound.figure not in start:
                raise ValueError(
                    f"hold: {bound.figure} is {figures.get(bound.figure)} at the start of stage {stage.name!r}, and nothing is a fraction of that; hold a "
                    "figure that is positive there"
                )
        return Held(stage.name, bool(stage.rewarded), start)
