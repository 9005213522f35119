"""Writes docs/results.md, and the measured part of docs/gpu.md, from what the benchmarks measured (benchmarks/results/*.json). No number in them is typed.

make results
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import claims
import results_align
import results_apo
import results_communication
import results_dollar
import results_gpu
import results_hacking
import results_hold
import results_methods
import results_precision
import results_reinforce
import results_side_by_side
import results_soak
import results_videos
from moving_digits import BASE, CELLS, FEW, MORE, RESULTS, rows_of
from results_class import class_lines
from results_lab import lab_lines
from stored import row_of, wording
from verdicts import signed

from instep.bundled.classifiers import load_classifier
from instep.core.files import write_text
from instep.metrics.compare import Row, better, combined, difference

COLUMNS = {
    "heldout_both": "right digit and motion",
    "heldout_both_open": "right, open prompts",
    "train_both": "training classifier",
    "fd": "FD",
    "fd_open": "FD open",
    "precision": "precision",
    "recall": "recall",
    "vendi": "Vendi",
    "modes_motion": "motions of 9",
    "modes_digit": "digits of 10",
    "mean_brightness": "mean brightness",
    "wobble": "wobble",
    "seconds": "CPU s a video",
}
CLAIMS = ("heldout_both", "fd", "fd_open")


def load_row(name: str) -> Row | None:
    file = RESULTS / f"{name}.json"
    return row_of(json.loads(file.read_text())["row"]) if file.is_file() else None


def cell(name: str) -> Row | None:
    rows = rows_of(name)
    return combined(rows) if rows else None


def number(value: float, se: float | None = None) -> str:
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 100 else 1
    return f"{value:.{digits}f}" + (f" ± {se:.{digits}f}" if se is not None else "")


def table(rows: Sequence[tuple[str, Row]]) -> list[str]:
    lines = ["| | NFE | videos | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 3) + "|"]
    for name, row in rows:
        cells = [number(row.values[key].value, row.values[key].se) if key in row.values else "-" for key in COLUMNS]
        lines.append(f"| {name} | {row.nfe or '-'} | {row.n} | " + " | ".join(cells) + " |")
    return lines


def verdict(a: Row, b: Row, key: str) -> str:
    """Difference, error, and what two standard errors say about it."""
    word = "better" if better(a, b, key) else "worse" if better(b, a, key) else "no difference beyond 2 standard errors"
    return f"{signed(difference(a, b, key))} ({word})"


def against_naive() -> list[str]:
    lines = ["| student | naive sampling at the same NFE | " + " | ".join(COLUMNS[k] for k in CLAIMS) + " |", "|---" * (len(CLAIMS) + 2) + "|"]
    naive = {4: ("teacher-4-1", "teacher-2-3"), 2: ("teacher-2-1", "teacher-1-3"), 1: ("teacher-1-1",)}
    for name in ("dmd2-4", "dmd2-2", "dmd2-1"):
        student = cell(name)
        for other in naive[int(name[-1])]:
            row = load_row(other)
            if student and row:
                lines.append(f"| {name} | {row.name} | " + " | ".join(verdict(student, row, key) for key in CLAIMS) + " |")
    return lines


def aligned() -> list[str]:
    control, teacher = cell("dmd2-4-more"), load_row("teacher-50-3")
    lines = [
        "| aligned student | held-out alignment, against the control | against the 50-step teacher | motions covered, of the control's | "
        "digits covered, of the control's | FD, against the control | FD open, against the control |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("group-signed", "pair", "group-printed", "group-pull", "group-high", "pair-half", "amd", "amd-weight", "refl"):
        row = cell(name)
        if row and control and teacher:
            share = [row.values[k].value / control.values[k].value for k in ("modes_motion", "modes_digit")]
            lines.append(
                f"| {name} | {verdict(row, control, 'heldout_both')} | {verdict(row, teacher, 'heldout_both')} | {share[0]:.0%} | {share[1]:.0%} | "
                f"{verdict(row, control, 'fd')} | {verdict(row, control, 'fd_open')} |"
            )
    return lines


def room() -> str:
    """How much better than its control an aligned student could be, by the held-out classifier, and what stands in the way."""
    control, teacher, real, aligned_row = cell("dmd2-4-more"), load_row("teacher-50-3"), load_row("floor"), cell("group-signed")
    if not (control and teacher and real and aligned_row):
        return ""
    c, t, f = (row.values["heldout_both"] for row in (control, teacher, real))
    se = difference(aligned_row, control, "heldout_both").se
    return (
        f"The control stands at {c.value:.3f}, the teacher at {t.value:.3f}, real videos at {f.value:.3f}: the {f.value - c.value:.3f} between the "
        f"control and real videos is {(f.value - c.value) / se:.1f} standard errors of the difference that is asked about. Guidance is this model's "
        "alignment already. At weights that leave images whole the alignment force is too weak to use what is left (`group-signed` and "
        "`group-printed`, of opposite signs, do the same); at larger ones it does harm (`pair-half`)."
    )


def against(first: str, others: Sequence[str], heading: str) -> list[str]:
    """Rows as differences to the first of them, with what training cost."""
    base = cell(first)
    if base is None:
        return ["not measured"]
    keys = ("heldout_both", "fd", "fd_open", "modes_motion")
    lines = [f"| {heading} | " + " | ".join(COLUMNS[k] for k in keys) + " | CPU s of training |", "|---" * (len(keys) + 2) + "|"]
    for name in (first, *others):
        row = cell(name)
        if row:
            seconds = [json.loads(f.read_text())["train_cpu_s"] for f in sorted(RESULTS.glob(f"{name}-[0-9].json"))]
            what = CELLS[name].what
            values = " | ".join(number(row.values[k].value, row.values[k].se) if name == first else verdict(row, base, k) for k in keys)
            lines.append(f"| {what} | {values} | {sum(seconds) / len(seconds):.0f} |")
    return lines


def exported() -> list[str]:
    """Metrics of the exported folder beside those of the same run's student, seed by seed."""
    lines, keys = [], ("heldout_both", "fd", "fd_open", "modes_motion")
    for file in sorted(RESULTS.glob("exported-[0-9].json")):
        a, b = load_row(file.stem.replace("exported", "group-signed")), load_row(file.stem)
        if a and b:
            both = (f"{COLUMNS[k]} {number(a.values[k].value)} and {number(b.values[k].value)}" for k in keys)
            lines.append(f"- seed {file.stem[-1]}, in the run and exported: " + "; ".join(both))
    return lines or ["not measured"]


def plain(name: str) -> list[str]:
    """A benchmark's JSON rows as a table."""
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        return ["not measured"]
    rows = json.loads(file.read_text())
    keys = list(rows[0])
    shown = [[f"{r[k]:.2g}" if isinstance(r[k], float) and abs(r[k]) < 1e-3 else wording(str(r[k])) for k in keys] for r in rows]
    return ["| " + " | ".join(keys) + " |", "|---" * len(keys) + "|", *("| " + " | ".join(row) + " |" for row in shown)]


def baselines() -> list[tuple[str, Row]]:
    names = [f"teacher-{steps}-{w}" for steps in (50, 4, 2, 1) for w in ("3", "1")]
    real = [("real-vs-real", load_row("floor")), ("real through the VAE", load_row("floor-vae"))]
    found = [*real, *((row.name, row) for row in map(load_row, names) if row)]
    return [(name, row) for name, row in found if row]


NO_ROOM = (
    "**Measured without much room**, on moving-digits with its guided teacher ([Embedded default](#embedded-default)); for worlds with room see "
    "[the first section](#methods-side-by-side-where-there-is-room)."
)


def main() -> None:
    students = [(f"{name} ({what.what})", row) for name, what in CELLS.items() if (row := cell(name))]
    seeds = max((len(rows_of(name)) for name in CELLS), default=0)
    accuracy = {name: load_classifier(name).accuracy for name in ("training", "monitor", "heldout")}
    classifiers = "; ".join(f"{name}: digit {a['digit']:.3f}, motion {a['motion']:.3f}, both {a['both']:.3f}" for name, a in accuracy.items())
    text = [
        "# Results",
        "",
        "Generated by `make results` from `benchmarks/results/*.json`; no number of a table is typed. CPU only. ± is one standard error. 'Better' and "
        "'worse' mean by more than two standard errors of the difference.",
        "",
        *results_methods.lines(),
        "## Embedded default",
        "",
        "**Measured without room.** On moving-digits with its guided teacher the first rows below, real videos and the teacher, are hardly better than a "
        "distilled student of 4 steps. So 'no difference' here, and in the sections on DMDR, DOLLAR and Diffusion-APO on the same world, does not mean that a "
        "method has no effect; where there is room, in the section above, methods separate.",
        "",
        "`python benchmarks/moving_digits.py --seeds 0 1 2 --jobs 2`. "
        f"Mean of up to {seeds} seeds (the column of videos says how many a row has: 612 a seed); "
        f"612 videos a model and seed (270 fully specified prompts, 342 open ones). "
        f"Students of 4 steps train {BASE} iterations, aligned ones and their control {MORE} more from the same start, students of 2 and 1 step {FEW}. "
        "Metrics are by the held-out classifier, which nothing was trained on or chosen by. Classifiers on real reference videos: " + classifiers + ".",
        "",
        *table([*baselines(), *sorted(students, key=lambda named: -named[1].nfe)]),
        "",
        "### Asked: each student beats naive sampling at equal NFE",
        "",
        *against_naive(),
        "",
        "### Asked: the aligned student beats its control and the 50-step teacher, at 95 % of the control's modes",
        "",
        *aligned(),
        "",
        room(),
        "",
        "### Ablations at 4 steps (difference to the first row)",
        "",
        *against("dmd2-4", ("dmd2-4-one-fake", "dmd2-4-fresh"), "student"),
        "",
        "### The matching family at 4 steps, same budget (difference to the first row)",
        "",
        "The discriminator sees real videos, which the others do not; at DMD2's weight the runs' health line calls its force silent (below a hundredth of "
        "matching's), so this row says that such a weight does nothing here, not what a discriminator can do.",
        "",
        *against("dmd2-4", ("dmd2-4-gan", "decoupled-4"), "student"),
        "",
        f"After {MORE} more iterations from the same start, with the training classifier as reward where one is used:",
        "",
        *against("dmd2-4-more", ("amd", "amd-weight", "refl", "group-signed"), "student"),
        "",
        "At 2 steps, where the held-out classifier leaves more room: see the section on DMDR below.",
        "",
        "### The exported student in stock diffusers",
        "",
        *exported(),
        "",
        "## Reinforcement learning and distillation in one loop (DMDR), 2 steps and 1 step",
        "",
        NO_ROOM,
        "",
        "`python benchmarks/reinforce.py`. On the student of 2 steps, and where its name says so of 1: that of 4 steps has no room left (above). Every cell "
        f"goes on for {MORE} iterations from the same distilled student, those that begin with RT-DM after {FEW} of that. The training reward is the "
        "training classifier's log-probability of what the prompt says; the held-out classifier was used for nothing else. 'Beats' and 'improves' mean by more "
        "than two standard errors of the difference; shares of modes are the smaller of motions' and digits'. Verdicts that rest on "
        "one seed (see the table) are provisional. The joint weight .1, the smallest of the paper's sweep, was settled on after seed 0 of .05, .1 "
        "and .5 had been seen; the flag's margins on diversity were set with these very runs of reinforcement alone.",
        "",
        *results_reinforce.lines(),
        "",
        "What an iteration costs (`python benchmarks/rl_cost.py`):",
        "",
        *plain("rl_cost"),
        "",
        "## Consistency, score distillation and a latent reward model (DOLLAR)",
        "",
        NO_ROOM,
        "",
        "`python benchmarks/dollar.py`, then with `--look`. Students of 2 steps unless a row says otherwise; every cell goes on for "
        f"{MORE} iterations from the same distilled student, as its control does (VSD is DMD2 without a discriminator). The reward is the training "
        "classifier's probability of the prompt, used as a black box: a number without a gradient. Vendi of pixels is the paper's Eq. 17. Where a row has "
        "fewer than three seeds its verdict is provisional. Seed 0 of `dynamic` and `dynamic-alone` was trained while labels were standardised by the first "
        "eight batches' moments; all else, by running sums.",
        "",
        *results_dollar.lines(),
        "",
        "What a gradient of the reward costs (`python benchmarks/latent_cost.py`; the paper's Table 1):",
        "",
        *plain("latent_cost"),
        "",
        *results_apo.lines(),
        *class_lines(),
        "## The exact laboratory",
        "",
        "What is claimed, and what was found; 'above' and 'better' mean by more than two standard errors over three seeds:",
        "",
        *claims.lines(),
        "",
        *lab_lines(),
        *results_hold.lines(),
        *results_hacking.lines(),
        *results_align.lines(),
        *results_precision.lines(),
        *results_soak.lines(),
        "## Stock diffusers against our sampler",
        "",
        "`python benchmarks/export_difference.py`: largest absolute difference of final latents, float32.",
        "",
        *plain("export"),
        "",
        "## Cost of an iteration",
        "",
        "`python benchmarks/iteration_cost.py`: process CPU time of a cycle (1 student and 5 fake updates) over the sum of the passes it cannot avoid.",
        "",
        *plain("iteration_cost"),
        "",
        *results_side_by_side.lines(),
        *results_communication.lines(),
        *results_videos.lines(),
        "## Memory",
        "",
        "`python benchmarks/memory.py`: peak resident memory of two iterations, less what the process held before.",
        "",
        *plain("memory"),
        "",
    ]
    write_text(Path(__file__).parents[1] / "docs" / "results.md", "\n".join(text))
    results_gpu.write()
    print("wrote docs/results.md, docs/gpu.md")


if __name__ == "__main__":
    main()
