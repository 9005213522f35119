"""The page: sections in the order in which a reader asks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from instep.core.files import write_text
from instep.core.outputs import begins_with
from instep.core.version import __version__
from instep.report import curves, figures, tables, verdict, words
from instep.report.columns import columns_of
from instep.report.read import RunRecord, read_runs
from instep.report.rows import by_protocol, real_vs_real_of, rows_of, students

SECTIONS = (
    ("verdict", "Table", "The student beside the others"),
    ("health", "Health", "Health"),
    ("samples", "Samples", "Samples"),
    ("metrics", "Metrics", "Metrics"),
    ("curves", "Curves", "Learning curves"),
    ("force", "Force", "What the matching force sees"),
    ("recipe", "Recipe", "How it was made"),
)


# by which a page that instep wrote is told from a user's own file
MARK = "<meta name='generator' content='instep'>"


def is_report(path: Path) -> bool:
    """Whether a file is a page that `write_report` wrote."""
    return begins_with(path, (MARK.encode(),))


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
        "verdict": comparison(runs),
        "health": health(runs),
        "samples": figures.samples(runs),
        "metrics": tables.all_tables(runs),
        "curves": curves.curves(runs),
        "force": figures.views(runs) + figures.align_views(runs),
        "recipe": recipes(runs),
    }
    links = "".join(f"<a href='#{key}'>{escape(short)}</a>" for key, short, _ in SECTIONS)
    sections = "".join(f"<section id='{key}'><h2>{escape(title)}</h2>{bodies[key]}</section>" for key, _, title in SECTIONS)
    here = files("instep.report")
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    title = escape(heading(runs))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"{MARK}"
        f"<meta name='color-scheme' content='light dark'><title>{title}</title><style>{style}</style></head><body>"
        f"<header><p class='kicker'>{title}</p><h1>Did it help?</h1>{answer(runs)}{problems(runs)}</header>"
        f"<nav aria-label='Sections'>{links}<button id='play' type='button' aria-pressed='true'>Pause animations</button></nav>"
        f"<main>{sections}</main><footer>Written by instep {escape(__version__)}. Metrics compare like with like only at equal numbers of samples and "
        f"the same protocol.</footer><div id='tip' role='status'></div><script>{script}</script></body></html>\n"
    )


def answer(runs: Sequence[RunRecord]) -> str:
    """The sentence that the page is read for, and what its words mean."""
    found = verdict.answer(runs)
    notices = dict.fromkeys(run.metrics.notice for run in runs if run.metrics and run.metrics.notice)
    notes = "".join(f"<p class='note'>{escape(note)}</p>" for note in (*found.notes, *(f"{notice[0].upper()}{notice[1:]}." for notice in notices)))
    control = any(row.kind == "control" for _, same in by_protocol(runs) for row in rows_of(same))
    return f"<p class='answer {found.outcome}'>{found.sentence}</p>{notes}{verdict.terms(control) if any(run.metrics for run in runs) else ''}"


def heading(runs: Sequence[RunRecord]) -> str:
    """The first run, and how many others stand beside it."""
    recipe, beside = runs[0].recipe, len(runs) - 1
    if recipe is None:
        first = runs[0].folder.name
    else:
        first = f"{recipe.get('model')} in {words.plural(len(recipe.get('levels') or []), 'step')}, by {recipe.get('recipe')}"
    return f"{first}, beside {words.plural(beside, 'other run')}" if beside else first


def problems(runs: Sequence[RunRecord]) -> str:
    lines = [f"<li>{escape(run.label)}: {escape(problem)}</li>" for run in runs for problem in run.problems]
    return f"<ul class='problems'>{''.join(lines)}</ul>" if lines else ""


def comparison(runs: Sequence[RunRecord]) -> str:
    """The table of the student and its opponents; runs of other protocols apart."""
    parts, groups = [], by_protocol(runs)
    for protocol, same in groups:
        student = next(iter(students(same)), None)
        if student is not None:
            title = f"<h3>{escape(student.name)}, protocol {escape(protocol or 'not recorded')}</h3>" if len(groups) > 1 else ""
            parts.append(title + verdict.table(student, rows_of(same), real_vs_real_of(same), columns_of(same)))
    return "".join(parts) or tables.UNMEASURED


def health(runs: Sequence[RunRecord]) -> str:
    about = "<p class='note'>Health watches every run on fixed prompts while it trains. A warning or an alarm stays open until its cause is gone.</p>"
    return about + "".join((f"<h3>{escape(run.label)}</h3>" if len(runs) > 1 else "") + words.health(run) for run in runs)


def recipes(runs: Sequence[RunRecord]) -> str:
    """What each run did, the command that repeats it, and its resolved recipe, folded."""
    parts = []
    for run in runs:
        if run.recipe is None:
            parts.append(words.what_was_done(run))
            continue
        command = str(run.recipe.get("command") or "")
        shown = f"<pre class='command'><code>{escape(command)}</code></pre>" if command else "<p class='none'>The command is not recorded.</p>"
        resolved = escape(json.dumps(run.recipe, indent=2, ensure_ascii=False))
        title = f"<h3>{escape(run.label)}</h3>" if len(runs) > 1 else ""
        version = escape(str(run.recipe.get("instep", "of an unknown version")))
        parts.append(
            f"{title}{words.what_was_done(run)}<p>To repeat it with instep {version}:</p>{shown}"
            f"<details><summary>Resolved recipe: every setting, defaults included</summary><pre><code>{resolved}</code></pre></details>"
        )
    return "".join(parts)
