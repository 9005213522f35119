"""Line and dot charts as inline SVG; values under the pointer come from JSON beside each chart."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 216
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
POINTS = 240  # a longer series is averaged to this many points
COLOURS = 6


@dataclass(frozen=True)
class Series:
    """A line: points (x, y), a colour index, a dash index; `reference` draws it thin and grey; `raw` is the unsmoothed line behind it.

    `band`: the line is a bound, and the side that is allowed is shaded: 1 above it, -1 below it.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int = 0
    dash: int = 0
    reference: bool = False
    raw: tuple[tuple[float, float], ...] = ()
    band: int = 0


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from data to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high = self._t(self.low), self._t(self.high)
        return self.start + (self._t(value) - low) / ((high - low) or 1.0) * (self.end - self.start)

    def _t(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.log else value

    def ticks(self, n: int = 4) -> list[float]:
        if self.log:
            return _log_ticks(self.low, self.high)
        return _ticks(self.low, self.high, n)


def _ticks(low: float, high: float, n: int) -> list[float]:
    """About n round numbers inside [low, high]."""
    span = high - low
    if span <= 0:
        return [low]
    base = 10 ** math.floor(math.log10(span / n))
    step = next(base * k for k in (1, 2, 2.5, 5, 10) if span / (base * k) <= n + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1,), (1, 3), (1, 2, 5)):
        ticks = [10.0**d * k for d in decades for k in parts if low <= 10.0**d * k <= high]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // 5)]
    return ticks or [low, high]


def number(value: float) -> str:
    """A short number for axes and pointers."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def shorter(points: Sequence[tuple[float, float]], most: int = POINTS) -> tuple[tuple[float, float], ...]:
    """Neighbouring points averaged so that at most `most` are left."""
    k = -(-len(points) // most)
    if k <= 1:
        return tuple(points)
    bins = [points[i : i + k] for i in range(0, len(points), k)]
    return tuple((sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins)


def rolling(points: Sequence[tuple[float, float]], window: int) -> tuple[tuple[float, float], ...]:
    """Mean of each point and up to `window` - 1 before it."""
    out, total = [], 0.0
    for i, (x, y) in enumerate(points):
        total += y - (points[i - window][1] if i >= window else 0.0)
        out.append((x, total / min(i + 1, window)))
    return tuple(out)


def _path(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    return "M" + "L".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in points)


def _frame(x: Axis, y: Axis, x_ticks: Sequence[tuple[float, str]]) -> str:
    parts = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
    for value, text in x_ticks:
        parts.append(f'<text class="tick" x="{x.at(value):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(text)}</text>')
    return "".join(parts)


def _range(values: Sequence[float], log: bool, bounds: tuple[float, float] | None) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.15, high * 1.15
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - pad if low < 0 or low > pad else 0.0, high + pad
    return (min(low, bounds[0]), max(high, bounds[1])) if bounds else (low, high)


def _y_axis(values: Sequence[float], log: bool, bounds: tuple[float, float] | None) -> Axis:
    return Axis(*_range(values, log, bounds), HEIGHT - BOTTOM, TOP, log)


def line_chart(
    title: str,
    caption: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    bounds: tuple[float, float] | None = None,
    span: tuple[float, float] | None = None,
    stages: Sequence[tuple[str, int]] = (),
    legend: Sequence[tuple[str, str]] | None = None,
) -> str:
    """A figure of lines over training steps; empty if no series has a point. `stages` are (name, first step);
    `bounds` on y are always inside, `span` is the range of steps (default: that of the points); `legend` are (name, style) (default: each line)."""
    series = [s for s in series if s.points]
    log = log and all(b > 0 for s in series for _, b in s.points)
    if not series:
        return ""
    xs = [*(a for s in series for a, _ in s.points), *(span or ())]
    x = Axis(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, WIDTH - RIGHT)
    y = _y_axis([b for s in series for _, b in s.points], log, bounds)
    body = [_frame(x, y, [(value, number(value)) for value in x.ticks(5)]), _stages(stages, x)]
    if bounds and bounds[0] < 0 < bounds[1]:
        body.append(f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y.at(0):.1f}" y2="{y.at(0):.1f}"/>')
    for s in series:
        style = "ref" if s.reference else f"c{s.colour % COLOURS} d{s.dash % 3}"
        if s.band:
            edge = y.high if s.band > 0 else y.low
            body.append(f'<path class="allowed" d="{_path([(s.points[0][0], edge), *s.points, (s.points[-1][0], edge)], x, y)}Z"/>')
        if s.raw:
            held = [(a, min(max(b, y.low), y.high)) for a, b in s.raw]
            body.append(f'<path class="line raw {style}" d="{_path(held, x, y)}"/>')
        body.append(f'<path class="line {style}" d="{_path(s.points, x, y)}"/>')
        if len(s.points) == 1:
            body.append(f'<circle class="dot {style}" cx="{x.at(s.points[0][0]):.1f}" cy="{y.at(s.points[0][1]):.1f}" r="3"/>')
    data = {
        "x": [x.low, x.high],
        "y": [y._t(y.low), y._t(y.high)],
        "log": log,
        "series": [{"name": s.name, "style": _style(s), "points": [[round(a, 2), float(f"{b:.5g}")] for a, b in s.points]} for s in series],
    }
    entries = [(s.name, _style(s)) for s in series] if legend is None else legend
    keys = "".join(f'<li><i class="key {style}"></i>{escape(name)}</li>' for name, style in entries)
    last = "; ".join(f"{s.name}: {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in series)
    return _figure(title, caption, f"<ul class='legend'>{keys}</ul>", "".join(body), f"{title} over training steps. {last}", data)


def _style(s: Series) -> str:
    return "ref" if s.reference else f"c{s.colour % COLOURS} d{s.dash % 3}"


def _stages(stages: Sequence[tuple[str, int]], x: Axis) -> str:
    parts, shown = [], [s for s in stages if x.low <= s[1] <= x.high]
    for i, (name, step) in enumerate(shown if len(shown) > 1 else []):
        at = x.at(step)
        parts.append(f'<line class="stage" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>' if i else "")
        parts.append(f'<text class="stage" x="{at + 4:.1f}" y="{TOP + 9}">{escape(name[:16])}</text>')
    return "".join(parts)


def _figure(title: str, caption: str, legend: str, body: str, label: str, data: dict | None) -> str:
    script = f'<script type="application/json">{json_for_html(data)}</script>' if data else ""
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3>{legend}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{body}<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        f"{script}<figcaption>{escape(caption)}</figcaption></figure>"
    )


def json_for_html(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026").replace(">", "\\u003e")


@dataclass(frozen=True)
class Dot:
    """A model in a chart of quality against cost: NFE, value and standard error, its kind, its name."""

    x: float
    y: float
    se: float
    kind: str
    name: str


def dot_chart(title: str, caption: str, dots: Sequence[Dot], real_vs_real: tuple[float, float] | None, most: float | None = None) -> str:
    """Values with bars of two standard errors over NFE (logarithmic); a band is what real videos get. Empty without dots.

    Nothing can be above `most`: bars and band end there.
    """
    top_value = math.inf if most is None else most
    dots = [dot for dot in dots if dot.x > 0]
    if not dots:
        return ""
    nfes = sorted({dot.x for dot in dots})
    x = Axis(min(nfes) / 1.5, max(nfes) * 1.5, LEFT, WIDTH - RIGHT, log=True)
    spans = [(dot.y - 2 * dot.se, min(dot.y + 2 * dot.se, top_value)) for dot in dots]
    band = (real_vs_real[0] - 2 * real_vs_real[1], min(real_vs_real[0] + 2 * real_vs_real[1], top_value)) if real_vs_real else None
    spread = [value for span in (*spans, *([band] if band else [])) for value in span]
    low, high = min(spread), max(spread)
    pad = 0.08 * (high - low) or 0.1
    y = Axis(low - pad, high + pad, HEIGHT - BOTTOM, TOP)
    body = [_frame(x, y, [(n, f"{n:g}") for n in nfes])]
    if band:
        top, bottom = y.at(band[1]), y.at(band[0])
        body.append(f'<rect class="real-vs-real" x="{LEFT}" width="{WIDTH - LEFT - RIGHT}" y="{top:.1f}" height="{max(bottom - top, 1.5):.1f}"/>')
        text_y = top - 4 if top > TOP + 12 else bottom + 11
        free = max(zip([x.low, *nfes], [*nfes, x.high], strict=True), key=lambda gap: x.at(gap[1]) - x.at(gap[0]))  # where no mark stands
        text_x = (x.at(free[0]) + x.at(free[1])) / 2
        body.append(f'<text class="real-vs-real" x="{text_x:.1f}" y="{text_y:.1f}" text-anchor="middle">real samples</text>')
    for nfe in nfes:
        here = sorted((dot for dot in dots if dot.x == nfe), key=lambda dot: dot.kind != "student")
        for i, dot in enumerate(here):
            at = x.at(nfe) + (i - (len(here) - 1) / 2) * 11
            tip = f"{dot.name}: {number(dot.y)} ± {number(2 * dot.se)} at NFE {dot.x:g}"
            body.append(
                f'<g class="mark {escape(dot.kind)}" data-tip="{escape(tip)}" tabindex="0"><title>{escape(tip)}</title>'
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y.at(dot.y - 2 * dot.se):.1f}" y2="{y.at(min(dot.y + 2 * dot.se, top_value)):.1f}"/>'
                f'{_symbol(dot.kind, at, y.at(dot.y))}<rect class="hit" x="{at - 8:.1f}" y="{TOP}" width="16" height="{HEIGHT - TOP - BOTTOM}"/></g>'
            )
    label = f"{title} against network evaluations. " + "; ".join(f"{dot.name}: {number(dot.y)}" for dot in dots)
    return _figure(title, caption, "", "".join(body), label, None)


def _symbol(kind: str, x: float, y: float) -> str:
    """Kinds differ in shape as well as colour."""
    if kind == "teacher":
        return f'<rect class="shape" x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>'
    if kind == "naive":
        return f'<path class="shape" d="M{x:.1f} {y - 5.5:.1f}l5.5 10h-11z"/>'
    if kind == "control":
        return f'<path class="shape" d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"/>'
    return f'<circle class="shape" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>'
