"""Tables of metrics, and the charts of quality against cost."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from instep.metrics.columns import Column
from instep.metrics.compare import Row, better, direction
from instep.report.charts import Dot, dot_chart
from instep.report.columns import columns_of, with_error
from instep.report.read import RunRecord
from instep.report.rows import by_protocol, real_rows, real_vs_real_of, rows_of, students

KINDS = {"student": "student", "control": "control", "teacher": "teacher", "naive": "naive sampling", "real": "real videos"}

REAL_VS_REAL = (
    "<p class='note'><b>Real-vs-real</b> is another draw of real samples, measured as if a model had made them: no model can be expected to do better. "
    "It is the band of the charts and the last row of the table, and in no competition with the models.</p>"
)
UNMEASURED = "<p class='none'>Metrics are not recorded (no metrics.json); <code>instep eval</code> makes them for the models that it can judge.</p>"


def best(rows: Sequence[Row], key: str) -> Row | None:
    """The row that is better than every other by more than two standard errors of the difference; mostly there is none."""
    rows = [row for row in rows if key in row.values]
    if direction(key) == 0 or len(rows) < 2:
        return None
    leader = max(rows, key=lambda row: direction(key) * row.values[key].value)
    return leader if all(better(leader, row, key) for row in rows if row is not leader) else None


def known(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """The columns that some row has a metric of."""
    return [column for column in columns if any(column.key in row.values for row in rows)]


def table(rows: Sequence[Row], reals: Sequence[Row], columns: Sequence[Column]) -> str:
    """Models by rows, metrics by columns (HTML), real videos below; only columns that some model has."""
    columns = known(columns, rows)
    leaders = {column.key: best(rows, column.key) for column in columns}
    equal = len({row.n for row in rows}) == 1
    caption = f"<caption>{rows[0].n} videos a row</caption>" if equal else ""
    head = "".join(f"<th scope='col'>{escape(c.head)}&nbsp;{c.arrow}</th>" for c in columns)
    body = []
    for row in [*rows, *reals]:
        cells = []
        for column in columns:
            value = row.values.get(column.key)
            leads = leaders[column.key] is row
            timed = value is not None and not (row.kind == "real" and column.key.startswith("seconds"))
            of = f"<span class='of'>{escape(column.head)} {column.arrow}</span>"
            cells.append(f"<td{' class=best' if leads else ''}>{of}{with_error(column, value) if value is not None and timed else '–'}</td>")
        cost = "–" if row.kind == "real" else str(row.nfe)
        note = (
            f"<small>{escape(row.note)}</small>" if row.note else f"<small>{KINDS.get(row.kind, escape(row.kind))}{'' if equal else f', n = {row.n}'}</small>"
        )
        body.append(
            f"<tr class='{escape(row.kind, quote=True)}'><th scope='row'>{escape(row.name)}{note}</th>"
            f"<td><span class='of'>NFE</span>{cost}</td>{''.join(cells)}</tr>"
        )
    top = f"<thead><tr><th scope='col'>model</th><th scope='col'>NFE</th>{head}</tr></thead>"
    return f"<div class='scroll'><table class='metrics'>{caption}{top}<tbody>{''.join(body)}</tbody></table></div>"


def glossary(columns: Sequence[Column]) -> str:
    """What the columns mean (HTML)."""
    if not columns:
        return ""
    return (
        "<dl class='glossary'>"
        + "".join(f"<div><dt>{escape(c.head)} {c.arrow}</dt><dd>{escape(c.meaning[0].upper() + c.meaning[1:])}.</dd></div>" for c in columns)
        + "</dl>"
    )


def cost_charts(rows: Sequence[Row], real_vs_real: Row | None, columns: Sequence[Column]) -> str:
    """Quality against NFE for the metrics that tell most."""
    charts = []
    for column in columns:
        if not column.caption:
            continue
        have = [row for row in rows if column.key in row.values]
        real = real_vs_real.values.get(column.key) if real_vs_real else None
        dots = [Dot(row.nfe, row.values[column.key].value, row.values[column.key].se, row.kind, row.name) for row in have]
        title = f"{column.head[0].upper()}{column.head[1:]} by NFE"
        charts.append(dot_chart(title, column.caption, dots, (real.value, real.se) if real else None, column.largest))
    if not any(charts):
        return ""
    names = {"student": "student", "naive": "naive sampling", "teacher": "teacher", "control": "control"}
    shapes = {"student": "●", "naive": "▲", "teacher": "■", "control": "◆"}
    legend = "".join(f"<li class='{kind}'><b>{shapes[kind]}</b> {name}</li>" for kind, name in names.items() if any(row.kind == kind for row in rows))
    return f"<ul class='legend kinds'>{legend}<li><i class='band'></i> real samples, ± 2 standard errors</li></ul><div class='charts'>{''.join(charts)}</div>"


def all_tables(runs: Sequence[RunRecord]) -> str:
    """Charts, the table of main metrics and, folded, all others with what they mean; runs of other protocols apart."""
    groups = by_protocol(runs)
    if not groups:
        return UNMEASURED
    parts = []
    for protocol, same in groups:
        if len(groups) > 1:
            names = ", ".join(run.label for run in same)
            parts.append(f"<h3>Protocol {escape(protocol or 'not recorded')}: {escape(names)}</h3>")
        parts.append(_tables(same))
    return "".join(parts)


def _tables(runs: Sequence[RunRecord]) -> str:
    rows, real_vs_real, reals, columns = rows_of(runs), real_vs_real_of(runs), real_rows(runs), columns_of(runs)
    main, more = ([column for column in columns if column.place == place] for place in ("main", "more"))
    classifiers = "".join(
        f"<li>{escape(name)}: {escape(', '.join(f'{part} {value:.3f}' for part, value in accuracy.items() if isinstance(value, int | float)))}</li>"
        for name, accuracy in next((run.metrics.classifiers for run in runs if run.metrics), {}).items()
        if isinstance(accuracy, dict)
    )
    accuracy = f"<h3>The classifiers' own accuracy on real videos</h3><ul>{classifiers}</ul>" if classifiers else ""
    unexplained = [column for column in known(main, rows) if not column.verdict or not students(runs)]
    return (
        f"{REAL_VS_REAL if real_vs_real else ''}{cost_charts(rows, real_vs_real, columns)}{glossary(unexplained)}{table(rows, reals, main)}"
        "<p class='note'>± is two standard errors, of what another seed would change on these prompts. A metric is set <span class='best'>apart</span> only "
        "if it is better than every other row's by more than two standard errors of the difference; even so, about one comparison in twenty passes by "
        "chance. Rows share prompts and starting noise; differences are counted as if they did not, which errs towards “no difference”.</p>"
        f"<details><summary>All other metrics, and what they mean</summary>{glossary(known(more, rows))}{table(rows, reals, more)}{accuracy}</details>"
    )
