"""The page: sections in the order in which a reader asks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from instep.core.files import write_text
from instep.core.version import __version__
from instep.metrics.compare import Row
from instep.report import curves, figures, tables, words
from instep.report.columns import EVERY, with_error
from instep.report.read import RunRecord, read_runs
from instep.report.rows import by_protocol, real_vs_real_of, rows_of, students

SECTIONS = (
    ("verdict", "Verdict", "Did it help?"),
    ("health", "Health", "Health"),
    ("samples", "Samples", "Samples"),
    ("metrics", "Metrics", "Metrics"),
    ("curves", "Curves", "Learning curves"),
    ("force", "Force", "What the matching force sees"),
    ("recipe", "Recipe", "Recipe"),
)


def write_report(run_dirs: Sequence[Path], out: Path) -> None:
    """Writes one HTML page about the runs in `run_dirs` to `out`, atomically; it needs nothing but itself, not even a network.

    Of several runs, metrics stand in one table and curves lie over each other. What a run did not record is said to be missing.
    Raises ValueError if there is no run directory or one does not exist.
    """
    if not run_dirs:
        raise ValueError("run_dirs: none given; name at least one folder of a run")
    write_text(Path(out), page(read_runs(run_dirs)))


def page(runs: Sequence[RunRecord]) -> str:
    """The whole document."""
    bodies = {
        "verdict": verdict(runs),
        "health": health(runs),
        "samples": figures.samples(runs),
        "metrics": tables.all_tables(runs),
        "curves": curves.curves(runs),
        "force": figures.views(runs),
        "recipe": recipes(runs),
    }
    links = "".join(f"<a href='#{key}'>{escape(short)}</a>" for key, short, _ in SECTIONS)
    sections = "".join(f"<section id='{key}'><h2>{escape(title)}</h2>{bodies[key]}</section>" for key, _, title in SECTIONS)
    here = files("instep.report")
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    title = escape(heading(runs))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><title>{title}</title><style>{style}</style></head><body>"
        f"<header><p class='kicker'>instep report</p><h1>{title}</h1>{''.join(words.what_was_done(run) for run in runs)}{facts(runs)}{problems(runs)}</header>"
        f"<nav aria-label='Sections'>{links}<button id='play' type='button' aria-pressed='true'>Pause animations</button></nav>"
        f"<main>{sections}</main><footer>Written by instep {escape(__version__)}. Metrics compare like with like only at equal numbers of samples and "
        f"the same protocol.</footer><div id='tip' role='status'></div><script>{script}</script></body></html>\n"
    )


def heading(runs: Sequence[RunRecord]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    recipe = runs[0].recipe
    if recipe is None:
        return runs[0].folder.name
    return f"{recipe.get('model')} in {words.plural(len(recipe.get('levels') or []), 'step')}, by {recipe.get('recipe')}"


def facts(runs: Sequence[RunRecord]) -> str:
    """Large metrics of a single run beside the teacher's."""
    student = next(iter(students(runs)), None)
    if student is None or len(runs) > 1:
        return ""
    teachers = [row for row in rows_of(runs) if row.kind == "teacher"]
    teacher = max(teachers, key=lambda row: row.nfe) if teachers else None
    tiles = [_tile("network evaluations", str(student.nfe), f"teacher {teacher.nfe}" if teacher else "")]
    tiles += [_fact(student, teacher, key) for key in ("heldout_both", "fd_open", "modes_motion", "seconds") if key in student.values]
    return f"<dl class='facts'>{''.join(tiles)}</dl>"


def _fact(student: Row, teacher: Row | None, key: str) -> str:
    column = EVERY[key]
    beside = f"teacher {column.text(teacher.values[key].value)}" if teacher and key in teacher.values else ""
    return _tile(column.head, with_error(column, student.values[key]), beside)


def _tile(name: str, value: str, beside: str) -> str:
    return f"<div><dt>{escape(name)}</dt><dd>{value}<span>{escape(beside)}</span></dd></div>"


def problems(runs: Sequence[RunRecord]) -> str:
    lines = [f"<li>{escape(run.label)}: {escape(problem)}</li>" for run in runs for problem in run.problems]
    return f"<ul class='problems'>{''.join(lines)}</ul>" if lines else ""


def verdict(runs: Sequence[RunRecord]) -> str:
    """Each student against its baselines."""
    parts = []
    for _, same in by_protocol(runs):
        for student in students(same):
            title = f"<h3>{escape(student.name)}, NFE {student.nfe}{', ' + escape(student.note) if student.note else ''}</h3>" if len(runs) > 1 else ""
            parts.append(title + words.verdict(student, rows_of(same), real_vs_real_of(same)))
    return "".join(parts) or tables.UNMEASURED


def health(runs: Sequence[RunRecord]) -> str:
    return "".join((f"<h3>{escape(run.label)}</h3>" if len(runs) > 1 else "") + words.health(run) for run in runs)


def recipes(runs: Sequence[RunRecord]) -> str:
    """The command that repeats each run, and its resolved recipe, folded."""
    parts = []
    for run in runs:
        if run.recipe is None:
            parts.append(f"<p class='none'>{escape(run.label)}: the recipe is not recorded.</p>")
            continue
        command = str(run.recipe.get("command") or "")
        shown = f"<pre class='command'><code>{escape(command)}</code></pre>" if command else "<p class='none'>The command is not recorded.</p>"
        resolved = escape(json.dumps(run.recipe, indent=2, ensure_ascii=False))
        title = f"<h3>{escape(run.label)}</h3>" if len(runs) > 1 else ""
        version = escape(str(run.recipe.get("instep", "of an unknown version")))
        parts.append(
            f"{title}<p>Repeated with instep {version} by:</p>{shown}"
            f"<details><summary>Resolved recipe: every setting, defaults included</summary><pre><code>{resolved}</code></pre></details>"
        )
    return "".join(parts)
