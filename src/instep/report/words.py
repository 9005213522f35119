"""The report in words: what was done, and whether it helped, never more certain than the standard errors allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from instep.metrics.compare import Row, better, difference, direction
from instep.report.columns import EVERY, VERDICT
from instep.report.read import RunRecord

MARKS = {"better": "▲ better", "worse": "▼ worse", "even": "no difference", "differs": "differs"}
NEARER = {"better": "▲ nearer to real", "worse": "▼ farther from real", "even": "no difference", "differs": "differs"}


@dataclass(frozen=True)
class Opponent:
    """A row that a student is compared with, and why."""

    row: Row
    role: str


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}\u00a0s"
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60}\u00a0s"
    return f"{whole // 3600}\u00a0h {whole % 3600 // 60}\u00a0min"


def plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def what_was_done(run: RunRecord) -> str:
    """One paragraph (HTML) of what the run trained, from what, how, and how long it took."""
    if run.recipe is None:
        return f"<p>The recipe of <b>{escape(run.folder.name)}</b> is not recorded (recipe.json is missing).</p>"
    recipe, levels = run.recipe, run.recipe.get("levels") or []
    config = recipe.get("config") or {}
    stages = [f"{s.get('name')} ({plural(int(s.get('steps', 0)), 'iteration')})" for s in config.get("stages") or []]
    many = config.get("sampler") == "ode"
    guided = config.get("guidance") != 1 and all(stage.get("guided", True) for stage in config.get("stages") or [])
    evaluations = len(levels) * (2 if many and guided else 1)
    sentences = [
        f"<b>{escape(str(recipe.get('recipe')))}</b> "
        + (
            f"aligned <b>{escape(str(recipe.get('model')))}</b>, which stays a many-step model and here takes "
            if many
            else f"turned <b>{escape(str(recipe.get('model')))}</b> into a student that needs "
        )
        + f"<b>{plural(evaluations, 'network evaluation')}</b> for a sample"
        + (f" (noise levels {escape(', '.join(f'{level:g}' for level in levels))})." if levels else ".")
    ]
    if stages:
        sentences.append(f"{'Stages' if len(stages) > 1 else 'Stage'}: {escape(', then '.join(stages))}; seed {escape(str(recipe.get('seed')))}.")
    cpu, wall = run.total("cpu_s"), run.total("wall_s")
    if wall is not None and run.iterations:
        processor = f" ({duration(cpu)} of processor time)" if cpu is not None else ""
        sentences.append(f"Its {plural(run.iterations, 'logged iteration')} took {duration(wall)}{processor}.")
    if recipe.get("start_from"):
        sentences.append(f"It began with the student of {escape(str(recipe['start_from']).rsplit('/', 1)[-1])}.")
    return "<p>" + " ".join(sentences) + "</p>"


def opponents(student: Row, rows: Sequence[Row]) -> list[Opponent]:
    """Naive sampling at the student's cost and at up to twice that, its controls, other students of its cost, and the teacher at its most steps."""
    near = [row for row in rows if row.kind == "naive" and student.nfe <= row.nfe <= 2 * student.nfe]
    naive = sorted(near, key=lambda row: (row.nfe, -row.steps))
    found = [Opponent(row, "same cost" if row.nfe == student.nfe else f"{row.nfe / student.nfe:g}× the cost") for row in naive]
    found += [Opponent(row, "control") for row in rows if row.kind == "control"]
    found += [Opponent(row, "another run, same cost") for row in rows if row.kind == "student" and row.nfe == student.nfe and row != student]
    teachers = [row for row in rows if row.kind == "teacher"]
    if teachers:
        best = max(teachers, key=lambda row: row.nfe)
        found.append(Opponent(best, f"{best.nfe / max(student.nfe, 1):g}× the cost"))
    return found


def outcome(student: Row, other: Row, key: str, real_vs_real: Row | None) -> str:
    """`better`, `worse` or `even` (within two standard errors); for metrics without a good end, closer to real videos is better."""
    if direction(key):
        return "better" if better(student, other, key) else "worse" if better(other, student, key) else "even"
    delta = difference(student, other, key)
    if abs(delta.value) <= 2 * delta.se:
        return "even"
    if real_vs_real is None or key not in real_vs_real.values:
        return "differs"
    real = real_vs_real.values[key].value
    nearer = abs(student.values[key].value - real) < abs(other.values[key].value - real)
    return "better" if nearer else "worse"


def verdict(student: Row, rows: Sequence[Row], real_vs_real: Row | None) -> str:
    """Sentences and a table of differences (HTML) of one student against its opponents."""
    against = opponents(student, rows)
    keys = [key for key in VERDICT if key in student.values and all(key in o.row.values for o in against)]
    if not against or not keys:
        return '<p class="none">Metrics of a baseline are not recorded, so there is nothing to compare with.</p>'
    items = "".join(f"<li>{sentence(student, o, keys, real_vs_real)}</li>" for o in against)
    head = "".join(f"<th scope='col'>{escape(o.row.name)}<small>{escape(o.role)}, NFE {o.row.nfe}</small></th>" for o in against)
    body = []
    for key in keys:
        column, cells = EVERY[key], []
        for o in against:
            d, how = difference(student, o.row, key), outcome(student, o.row, key, real_vs_real)
            mark = MARKS[how] if direction(key) else NEARER[how]
            cells.append(f"<td class='{how}'>{column.text(d.value, sign=True)} <small>± {column.text(2 * d.se)}</small><em>{mark}</em></td>")
        title = escape(column.meaning, quote=True)
        body.append(f"<tr><th scope='row' title='{title}'>{escape(column.head)} {column.arrow}</th>{''.join(cells)}</tr>")
    return (
        f"<ul class='verdict'>{items}</ul><div class='scroll'><table class='verdict'><caption><span>The student minus each of the others, ± two standard "
        f"errors</span></caption><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def sentence(student: Row, other: Opponent, keys: Sequence[str], real_vs_real: Row | None) -> str:
    """One opponent in one sentence (HTML)."""
    by: dict[str, list[str]] = {"better": [], "worse": [], "even": [], "differs": []}
    for key in keys:
        by[outcome(student, other.row, key, real_vs_real)].append(EVERY[key].head)
    parts = [f"<b class='{how}'>{how}</b> in {escape(_list(by[how]))}" for how in ("better", "worse") if by[how]]
    if by["even"]:
        parts.append(f"no measurable difference in {escape(_list(by['even']))}" if parts else "no measurable difference in anything listed below")
    return f"Against <b>{escape(other.row.name)}</b> ({escape(other.role)}): {'; '.join(parts)}."


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def health(run: RunRecord) -> str:
    """Findings of a run (HTML): each flag once, from when to when."""
    if run.health is None:
        return "<p class='none'>Health is not recorded (health.jsonl is missing).</p>" if not run.log else "<p class='fine'>No finding was raised.</p>"
    flags: dict[str, dict] = {}
    for finding in run.health:
        flag, level = str(finding.get("flag", "?")), str(finding.get("level", "warn"))
        if level == "ok":
            if flag in flags:
                flags[flag]["until"] = finding.get("step")
        else:
            level = level if level in ("warn", "alarm") else "warn"
            flags[flag] = {"level": level, "text": str(finding.get("text", "")), "from": finding.get("step"), "until": None}
    if not flags:
        return "<p class='fine'>No finding was raised.</p>"
    lines = []
    for flag, f in sorted(flags.items(), key=lambda item: (item[1]["until"] is not None, item[1]["level"])):
        when = f"from step {f['from']}, still open at the end" if f["until"] is None else f"step {f['from']} to {f['until']}, then cleared"
        badge = f["level"] if f["until"] is None else "cleared"
        item = f"<b>{escape(flag)}</b> {escape(f['text'])}<small>{escape(when)}</small>"
        lines.append(f"<li class='{badge}'><span class='badge'>{badge}</span><div>{item}</div></li>")
    return f"<ul class='health'>{''.join(lines)}</ul>"
