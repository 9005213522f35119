"""Did it help? One sentence and one table, never more certain than the standard errors allow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape, unescape

from instep.metrics.columns import Column
from instep.metrics.compare import Row, better, difference, direction
from instep.report.columns import columns_of, with_error
from instep.report.read import RunRecord
from instep.report.rows import by_protocol, real_vs_real_of, rows_of, students

SIGNS = {"better": "▲", "worse": "▼", "even": "=", "differs": "≠"}
SPOKEN = {"better": "better", "worse": "worse", "even": "no difference", "differs": "differs"}


@dataclass(frozen=True)
class Opponent:
    """A row that a student is compared with, and what it is to the student."""

    row: Row
    role: str


@dataclass(frozen=True)
class Answer:
    """Whether a run helped: `better`, `worse`, `even` or `unknown`, the sentence (HTML) that says so, and what could not be compared."""

    outcome: str
    sentence: str
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The sentence without markup."""
        return unescape(re.sub(r"<[^>]+>", "", self.sentence))


Columns = Sequence[Column]


def headline(rows: Sequence[Row], columns: Columns) -> Column | None:
    """The first metric with a good end that all the rows have."""
    return next((c for c in columns if c.verdict and direction(c.key) and all(c.key in row.values for row in rows)), None)


def naive_of(student: Row, rows: Sequence[Row], columns: Columns) -> list[Row]:
    """Naive sampling at the student's NFE, and at more up to twice that: of each the row that is best in the headline metric."""
    found_headline = headline([student], columns)
    key = found_headline and found_headline.key
    near = [row for row in rows if row.kind == "naive" and student.nfe <= row.nfe <= 2 * student.nfe]
    found = []
    for group in ([row for row in near if row.nfe == student.nfe], [row for row in near if row.nfe > student.nfe]):
        measured = [row for row in group if key is None or key in row.values]
        if measured:
            found.append(max(measured, key=lambda row: direction(key) * row.values[key].value if key else row.steps))
    return found


def teacher_of(rows: Sequence[Row]) -> Row | None:
    """The teacher at its most network evaluations."""
    return max((row for row in rows if row.kind == "teacher"), key=lambda row: row.nfe, default=None)


def opponents(student: Row, rows: Sequence[Row], columns: Columns) -> list[Opponent]:
    """The controls, naive sampling at the student's cost and at up to twice that, and the teacher."""
    found = [Opponent(row, "control") for row in rows if row.kind == "control"]
    found += [Opponent(row, "naive sampling") for row in naive_of(student, rows, columns)]
    teacher = teacher_of(rows)
    return found + ([Opponent(teacher, "teacher")] if teacher else [])


def outcome(student: Row, other: Row, key: str, real_vs_real: Row | None) -> str:
    """`better`, `worse` or `even` (within two standard errors); for metrics without a good end, closer to real samples is better."""
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


def answer(runs: Sequence[RunRecord]) -> Answer:
    """The first run against the first control among the others, or the one that its metrics name, or without any against naive sampling at the same NFE."""
    groups = [same for _, same in by_protocol(runs) if any(run is runs[0] for run in same)]
    if not groups or not students(groups[0]):
        return Answer("unknown", f"<b>Unknown:</b> metrics of {escape(runs[0].label)} are not recorded.")
    (same,) = groups
    student, *controls = students(same)
    notes = tuple(f"{run.label} is not compared: {why_apart(run)}." for run in runs if not any(run is other for other in same))
    rows, columns = rows_of(same), columns_of(same)
    own = [row for row in rows if row.kind == "control" and same[0].metrics and row.name == same[0].metrics.control]
    naive = [row for row in naive_of(student, rows, columns) if row.nfe == student.nfe]
    return against(student, next(iter([*controls, *own, *naive]), None), teacher_of(rows), real_vs_real_of(same), columns, notes)


def why_apart(run: RunRecord) -> str:
    return f"it was measured by another protocol ({run.metrics.protocol or 'not recorded'})" if run.metrics and run.metrics.rows else "it has no metrics"


def against(student: Row, other: Row | None, teacher: Row | None, real_vs_real: Row | None, columns: Columns, notes: tuple[str, ...] = ()) -> Answer:
    """The student against one other row (HTML), the teacher beside it."""
    column = headline([student, other], columns) if other else None
    if other is None or column is None:
        return Answer("unknown", "<b>Unknown:</b> metrics of a control, or of naive sampling at the same cost, are not recorded.", notes)
    key = column.key
    delta, how = difference(student, other, key), outcome(student, other, key, real_vs_real)
    size, error = column.text(abs(delta.value)), column.text(2 * delta.se)
    theirs, ours = column.text(other.values[key].value), column.text(student.values[key].value)
    than = named(student, other)
    if how == "even":
        by = f"{column.text(delta.value)} ± {error}"
        said = f"<b>No difference</b> beyond two standard errors: {escape(column.head)} differs by {by} from {than} ({ours} against {theirs})"
    else:
        begin = "<b>Yes:</b>" if how == "better" else "<b>No, it is worse:</b>"
        side = "above" if delta.value > 0 else "below"
        said = f"{begin} {escape(column.head)} is {ours}, which is <b>{size} ± {error}</b> {side} {than} ({theirs})"
    said += others(student, other, key, how, real_vs_real, columns)
    if teacher and key in teacher.values:
        said += f"; the {teacher.steps}-step teacher has {column.text(teacher.values[key].value)}"
    return Answer(how, said + ".", notes)


def named(student: Row, other: Row) -> str:
    """What the student is compared with, in words (HTML); its cost where it differs."""
    if other.kind == "naive":
        return f"naive sampling at the same {student.nfe} network evaluations"
    cost = "" if other.nfe == student.nfe else f", at {other.nfe} network evaluations instead of {student.nfe}"
    return f"the control, {escape(other.name)}{cost}"


def others(student: Row, other: Row, key: str, how: str, real_vs_real: Row | None, columns: Columns) -> str:
    """What the headline leaves out (HTML): the other metrics that differ beyond two standard errors, losses after a gain first of all."""
    by: dict[str, list[str]] = {"better": [], "worse": []}
    for column in columns:
        if column.verdict and column.key != key and column.key in student.values and column.key in other.values:
            by.setdefault(outcome(student, other, column.key, real_vs_real), []).append(column.head)
    found = [f"{word} in {escape(listed(by[word]))}" for word in ("worse", "better") if by[word] and not (word == how == "better")]
    return f", {'and' if how == 'worse' and not by['better'] else 'but'} it is {' and '.join(found)}" if found else ""


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def terms(control: bool) -> str:
    """What the answer's words mean (HTML), beside the answer."""
    found = [
        ("±", "two standard errors, which is what other samples of the same models would change."),
        ("Network evaluations (NFE)", "passes through the model for one sample. A guided step needs two."),
        ("Naive sampling", "the teacher itself in as few steps, without any training."),
        ("Teacher", "the many-step model that the student was made from."),
    ]
    if control:
        found.insert(2, ("Control", "distillation alone for as many updates, another run, or an earlier stage of this one, that the student is compared with."))
    return "<dl class='terms'>" + "".join(f"<div><dt>{term}</dt><dd>{escape(meaning)}</dd></div>" for term, meaning in found) + "</dl>"


def table(student: Row, rows: Sequence[Row], real_vs_real: Row | None, columns: Columns) -> str:
    """The student and its opponents by columns, metrics by rows (HTML), with each metric's meaning below its name."""
    against = opponents(student, rows, columns)
    chosen = [column for column in columns if column.verdict and column.key in student.values]
    alone = "" if against else '<p class="none">Metrics of a baseline are not recorded, so there is nothing to compare with.</p>'
    if not chosen:
        return alone
    heads = "".join(f"<th scope='col'>{escape(o.role)}<small>{escape(under(o.row))}</small></th>" for o in (Opponent(student, "student"), *against))
    body = "".join(table_row(student, against, column, real_vs_real) for column in chosen)
    # on a phone a metric's cells stand below its name: in twos where that leaves none alone, else in threes
    count = len(against) + 1
    width = 2 if count in (2, 4) else 3
    caption = "Below each value: the student minus it. ▲ the student is better, ▼ worse, = no difference beyond two standard errors, ≠ different."
    return (
        f"{alone}<div class='scroll'><table class='verdict' style='--columns:{width}'><caption>{caption if against else ''}</caption>"
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def under(row: Row) -> str:
    """A row's name, cost and note, for the heading of a column."""
    return ", ".join(part for part in (row.name, f"NFE {row.nfe}", row.note) if part)


def table_row(student: Row, against: Sequence[Opponent], column: Column, real_vs_real: Row | None) -> str:
    key = column.key
    cells = [f"<td class='own'><span class='of'>student</span>{with_error(column, student.values[key])}</td>"]
    for o in against:
        of = f"<span class='of'>{escape(o.row.name if o.role == 'control' else f'{o.role}, NFE {o.row.nfe}')}</span>"
        if key not in o.row.values:
            cells.append(f"<td>{of}–</td>")
            continue
        d, how = difference(student, o.row, key), outcome(student, o.row, key, real_vs_real)
        delta = f"{column.text(d.value, sign=True)} <small>± {column.text(2 * d.se)}</small>"
        cells.append(f"<td class='{how}'>{of}{column.text(o.row.values[key].value)}<em><i title='{SPOKEN[how]}'>{SIGNS[how]}</i> {delta}</em></td>")
    nearest = " Nearer to real samples counts as better." if not direction(key) else ""
    meaning = f"<small>{escape(column.meaning[0].upper() + column.meaning[1:])}.{nearest}</small>"
    return f"<tr><th scope='row'>{escape(column.head)} {column.arrow}{meaning}</th>{''.join(cells)}</tr>"
