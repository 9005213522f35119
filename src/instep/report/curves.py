"""Learning curves from log.jsonl: one line a scalar, or, of several runs, one colour a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from instep.report.charts import COLOURS, Series, line_chart, rolling, shorter
from instep.report.read import RunRecord

WINDOW = 10  # iterations that per-iteration scalars are averaged over
NAMES = {
    "probe/train_score_teacher": "teacher, training classifier",
    "probe/monitor_score_teacher": "teacher, monitor classifier",
    "reward/train": "training batches",
    "probe/train_score": "training classifier (probe)",
    "probe/monitor_score": "monitor classifier (probe)",
    "probe/monitor_both": "both",
    "wall_s": "on the clock",
    "cpu_s": "all threads",
}


@dataclass(frozen=True)
class Panel:
    """A chart: title, what to look for, which scalars (a pattern; its group is the line's name), scale."""

    title: str
    caption: str
    pattern: str
    log: bool = False
    bounds: tuple[float, float] | None = None
    folded: bool = False


PANELS = (
    Panel(
        "Reward",
        "What alignment climbs. Nothing is trained on the monitor classifier: if only the training classifier rises, the reward is hacked.",
        r"(reward/train|probe/(?:train|monitor)_score(?:_teacher)?)",
    ),
    Panel(
        "Prompts followed (monitor)",
        "Share of probe samples that a classifier outside of training finds right.",
        r"probe/(monitor_both(?:_teacher)?)",
        bounds=(0.0, 1.0),
    ),
    Panel(
        "Diversity", "Mean distance between samples of one prompt. A fall below the teacher's is the first sign of collapse.", r"probe/(diversity(?:_teacher)?)"
    ),
    Panel("Mean brightness", "Above the teacher's: too much guidance, or a reward that likes thick strokes.", r"probe/(mean_brightness(?:_teacher)?)"),
    Panel("Motion", "Mean change from frame to frame. A student that stands still is falling short of its teacher.", r"probe/(motion(?:_teacher)?)"),
    Panel("Saturation", "Share of raw values outside [0, 1] by more than 0.05.", r"probe/(saturation(?:_teacher)?)"),
    Panel(
        "Held figures",
        "Each figure relative to its value at the start of the stage, and the bound that the controller keeps it inside of.",
        r"hold/((?!multiplier$).+)",
    ),
    Panel("Weight of the reward", "The factor by which the controller multiplies the weight of every reward term, between 0 and 4.", r"hold/(multiplier)"),
    Panel(
        "Gradient of each term",
        "Norm of the gradient of the student's parameters that a term leaves, its weight included: the one size that all terms have in common.",
        r"term/([^/]+)/gradient",
        log=True,
    ),
    Panel("Size of the forces", "Norm of each force on a sample. A force a hundred times weaker than another does nothing.", r"force/([^/]+)/norm", log=True),
    Panel(
        "Angle between forces",
        "Cosine: +1 they pull together, 0 they ignore each other, −1 each undoes the other's work.",
        r"force/cosine/(.+)",
        bounds=(-1.0, 1.0),
    ),
    Panel("Critic loss", "How well the fake score follows the student. Rising for long: it no longer keeps up; update it more often.", r"critic/(.+)"),
    Panel("Objectives", "Losses on parameters.", r"objective/(.+)"),
    Panel("Student's gradient", "Norm before clipping.", r"grad/(student)", log=True, folded=True),
    Panel("Gradient of each term, without its weight", "The norm at weight 1.", r"term/([^/]+)/gradient_unweighted", log=True, folded=True),
    Panel("Weights of terms", "The factor on each term's own loss; of a share it follows the gradients.", r"term/([^/]+)/weight", log=True, folded=True),
    Panel("Learning rates", "After warm-up and decay.", r"lr/(.+)", folded=True),
    Panel("Seconds an iteration", "On the clock, and of all threads together.", r"(wall_s|cpu_s)", bounds=(0.0, 0.0), folded=True),
)


def panel_series(panel: Panel, runs: Sequence[RunRecord]) -> list[Series]:
    """The panel's lines. One run: a colour a scalar; several: a colour a run, a dash a scalar. The teacher's metrics are thin and grey."""
    pattern, found = re.compile(panel.pattern), []
    keys = sorted({key for run in runs for row in run.log or [] for key in row if pattern.fullmatch(key)})
    plain = [key for key in keys if not key.endswith("_teacher")]
    for i, run in enumerate(runs):
        for key in keys:
            points = [(float(row["step"]), float(row[key])) for row in run.log or [] if isinstance(row.get(key), int | float)]
            reference = key.endswith("_teacher")
            if not points or (reference and i):
                continue
            match = pattern.fullmatch(key)
            assert match is not None
            name = NAMES.get(key, "teacher") if reference else NAMES.get(key, match.group(1).replace("~", " and "))
            if len(runs) > 1 and not reference:
                name = f"{run.label}, {name}" if len(plain) > 1 else run.label
            scalar = key.removesuffix("_teacher")
            where = plain.index(scalar) if scalar in plain else 0
            colour, dash = (i, where) if len(runs) > 1 else (where, 0)
            if reference and len(runs) == 1 and len(keys) - len(plain) > 1:  # which teacher's line is whose: by the scalar's colour
                reference, dash = False, 2
            noisy = not key.startswith(("probe/", "lr/", "hold/")) and len(points) > 2 * WINDOW
            smooth = shorter(rolling(points, WINDOW)) if noisy else shorter(points)
            band = (1 if points[-1][1] < 1 else -1) if key.endswith("/bound") and len(runs) == 1 else 0
            found.append(Series(name.replace("/bound", ", bound"), smooth, colour, dash, reference, shorter(points) if noisy and len(runs) == 1 else (), band))
    return found


def run_legend(series: Sequence[Series], runs: Sequence[RunRecord]) -> list[tuple[str, str]] | None:
    """Of several runs with several scalars each: the runs by colour, then the scalars by dash, instead of every line. Else None."""
    dashes = {s.dash: s.name.rsplit(", ", 1)[-1] for s in series if not s.reference}
    if len(runs) < 2 or len(dashes) < 2:
        return None
    here = sorted({s.colour for s in series if not s.reference})
    return [(runs[i].label, f"c{i % COLOURS} d0") for i in here] + [(name, f"plain d{dash % 3}") for dash, name in sorted(dashes.items())]


def curves(runs: Sequence[RunRecord]) -> str:
    """All panels that have data (HTML), the technical ones folded."""
    missing = [run.label for run in runs if not run.log]
    if len(missing) == len(runs):
        return "<p class='none'>Learning curves are not recorded (log.jsonl is missing).</p>"
    note = f"<p class='none'>No log is recorded of {escape(', '.join(missing))}.</p>" if missing else ""
    stages = runs[0].stages if all(run.stages == runs[0].stages for run in runs if run.log) else []
    steps = [row["step"] for run in runs for row in run.log or []]
    span = (float(min(steps)), float(max(steps)))
    shown: dict[bool, list[str]] = {False: [], True: []}
    for panel in PANELS:
        series = panel_series(panel, runs)
        legend = run_legend(series, runs)
        chart = line_chart(panel.title, panel.caption, series, log=panel.log, bounds=panel.bounds, span=span, stages=stages, legend=legend)
        shown[panel.folded].append(chart)
    charts, folded = ("".join(parts) for parts in (shown[False], shown[True]))
    more = f"<details><summary>Gradient, learning rates, time</summary><div class='charts'>{folded}</div></details>" if folded else ""
    about = (
        f"<p class='note'>Curves run over training steps; strong lines are means of {WINDOW} iterations. A dashed upright line marks the start of a stage. "
        "A <b>probe</b> measures the student on fixed prompts and noise while it trains. "
        "The <b>fake</b> is the critic that follows the student's distribution.</p>"
    )
    return f"{note}{about}<div class='charts'>{charts}</div>{more}"
