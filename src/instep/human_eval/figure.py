"""The page of results: intervals as a forest plot in inline SVG, and the numbers behind it as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Literal

from instep.core.statistics import Interval
from instep.human_eval.results import Distortion, QuestionScore, Results

WIDTH, LEFT, RIGHT, TOP = 520, 8, 64, 6  # narrow: the letters stay legible on a phone
FEW = 20


def results_page(results: Results) -> str:
    """One HTML document without scripts."""
    a, b = (escape(name) for name in results.runs)
    done = "".join(f"<tr><th>{escape(name)}</th><td>{n} of {total}</td></tr>" for name, n, total in results.progress)
    body = _pairs(results) if results.mode == "pairs" else _scores(results)
    few = f'<p class="note">{results.prompts} prompts are few: below about {FEW} the bootstrap\'s intervals are too narrow.</p>'
    nobody = "<p>Nobody has answered anything yet.</p>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>Results of the human evaluation</title>'
        '<link rel="stylesheet" href="/style.css"></head><body><main class="wide"><h1>Results of the human evaluation</h1>'
        f'<ul class="runs"><li><i class="key a"></i>A: {a}</li><li><i class="key b"></i>B: {b}</li></ul>'
        f"{body or nobody}{few if body and results.prompts < FEW else ''}<h2>Annotators</h2>"
        f'<div class="scroll"><table><thead><tr><th>annotator</th><th>items answered</th></tr></thead><tbody>{done}</tbody></table></div>'
        '<p class="note">Annotators must not see this page before they are done: it names the runs. Reload it for newer answers.</p></main></body></html>'
    )


def _pairs(results: Results) -> str:
    if not results.preferences:
        return ""
    rows = [(results.label(p.question), [(p.win_rate, "a")]) for p in results.preferences]
    figure = forest(rows, (0.0, 1.0), _percent, even=0.5, ends=("B is better", "A is better"))
    cells, items = [], []
    for p in results.preferences:
        left = _rate(p.left) if p.left else "-"
        cells.append([results.label(p.question), *map(_rate, (p.win, p.tie, p.loss)), _of(p.win_rate, _percent), str(p.win.n), kappa_text(p.kappa), left])
        counts = [f"{round(x.value * x.n)}<small>{_words(x, _percent)}</small>" for x in (p.good, p.same, p.bad)]
        items.append([results.label(p.question), *counts, _of(p.net, _signed)])
    return (
        f"<h2>How often A wins (ties as half), 95% interval</h2>{figure}"
        '<p class="note">The bar is the percentile interval of a bootstrap that draws whole prompts. Where it crosses the dashed line, these '
        "answers do not tell A from B.</p><h2>Answers</h2>"
        + _table(["question", "A wins", "tie", "A loses", "win rate", "answers", "agreement (kappa)", "left side chosen"], cells)
        + "<h2>Items by majority: good, same, bad</h2>"
        + _table(["question", "A better", "same", "B better", "net of all answers"], items)
        + '<p class="note">Rates carry Wilson intervals. Answers of several people to one item are not independent of each other: trust the bootstrap and the '
        "items where they differ.</p>"
    )


def _scores(results: Results) -> str:
    if not results.scores and not results.distortion:
        return ""
    out = ""
    if results.scores:
        rows = [(results.label(s.question), [(x, side) for x, side in ((s.a, "a"), (s.b, "b")) if x]) for s in results.scores]
        out += f"<h2>Mean opinion scores, 0 to 2, 95% interval</h2>{forest(rows, (0.0, 2.0), _plain, ends=('poor', 'good'))}"
        scores: list[QuestionScore] = [*results.scores, *([results.overall] if results.overall else [])]
        names = [results.label(s.question) for s in results.scores] + ["Overall (sum)"]
        cells = [
            [name, *(_of(x, _plain) if x else "-" for x in (s.a, s.b)), _of(s.difference, _difference) if s.difference else "-", kappa_text(s.kappa)]
            for name, s in zip(names, scores, strict=False)
        ]
        out += "<h2>Scores</h2>" + _table(["question", "A", "B", "A - B", "agreement (kappa)"], cells)
    if results.distortion:
        d: Distortion = results.distortion
        shown = [(x, side) for x, side in ((d.a, "a"), (d.b, "b")) if x]
        out += f"<h2>Distortion rate, 95% interval (Wilson): less is better</h2>{forest([('Distorted', shown)], (0.0, 1.0), _percent)}"
        out += _table(["", "A", "B", "agreement (kappa)"], [["Distorted", *(_rate(x) if x else "-" for x in (d.a, d.b)), kappa_text(d.kappa)]])
    return out


def forest(
    rows: Sequence[tuple[str, Sequence[tuple[Interval, str]]]],
    bounds: tuple[float, float],
    shown: Callable[[float], str],
    even: float | None = None,
    ends: tuple[str, str] | None = None,
) -> str:
    """Rows of intervals (side "a" a dot, "b" a square) on one axis from bounds[0] to bounds[1]; `even` is a dashed line, `ends` labels its two ends."""
    low, high = bounds

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    tall = 62 if any(len(marks) > 1 for _, marks in rows) else 52
    bottom = TOP + tall * len(rows)
    parts = []
    for i in range(5):
        value = low + (high - low) * i / 4
        kind = "even" if value == even else "grid"
        parts.append(f'<line class="{kind}" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP + 24}" y2="{bottom}"/>')
        anchor = "start" if i == 0 else "middle"
        parts.append(f'<text class="tick" x="{x(value):.1f}" y="{bottom + 18}" text-anchor="{anchor}">{shown(value)}</text>')
    for i, (name, marks) in enumerate(rows):
        middle = TOP + tall * i + (38 if tall > 52 else 33)
        parts.append(f'<text class="name" x="{LEFT}" y="{TOP + tall * i + 16}">{escape(name)}</text>')
        for j, (interval, side) in enumerate(marks):
            y = middle + (j - (len(marks) - 1) / 2) * 14
            at = x(interval.value)
            if interval.low is not None and interval.high is not None:
                parts.append(f'<line class="{side}" x1="{x(interval.low):.1f}" x2="{x(interval.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            square = f'<rect class="b" x="{at - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>'
            parts.append(f'<circle class="a" cx="{at:.1f}" cy="{y:.1f}" r="5.5"/>' if side == "a" else square)
            parts.append(f'<text class="tick" x="{WIDTH}" y="{y + 4:.1f}" text-anchor="end">{shown(interval.value)}</text>')
    if ends:
        parts.append(f'<text class="end" x="{x(low):.1f}" y="{bottom + 36}">← {escape(ends[0])}</text>')
        parts.append(f'<text class="end" x="{x(high):.1f}" y="{bottom + 36}" text-anchor="end">{escape(ends[1])} →</text>')
    height = bottom + (46 if ends else 28)
    description = "; ".join(f"{name}: {', '.join(_words(interval, shown) for interval, _ in marks)}" for name, marks in rows)
    return f'<div class="forest"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(description, quote=True)}">{"".join(parts)}</svg></div>'


def interval_text(interval: Interval | None, kind: Literal["percent", "plain", "signed"]) -> str:
    """A number with its interval in one line of plain text."""
    shown = {"percent": _percent, "plain": _plain, "signed": _difference}[kind]
    return "-" if interval is None else _words(interval, shown)


def kappa_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML but for the first of a row, which is a question's words."""
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join(f"<tr><th>{escape(first)}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>" for first, *rest in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _words(interval: Interval, shown: Callable[[float], str]) -> str:
    if interval.low is None or interval.high is None:
        return shown(interval.value)
    return f"{shown(interval.value)} ({shown(interval.low)} to {shown(interval.high)})"


def _of(interval: Interval, shown: Callable[[float], str]) -> str:
    if interval.low is None or interval.high is None:
        return shown(interval.value)
    return f"{shown(interval.value)}<small>{shown(interval.low)} to {shown(interval.high)}</small>"


def _rate(interval: Interval) -> str:
    return _of(interval, _percent)


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _plain(value: float) -> str:
    return f"{value:.2f}"


def _difference(value: float) -> str:
    return f"{value:+.2f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.0f}%"
