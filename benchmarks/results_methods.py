"""The first section of docs/results.md: methods side by side on bundled worlds whose teacher leaves room, from what benchmarks/methods_on.py measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from methods_on import ARMS, GROUP, RESULTS
from stored import row_of
from verdicts import signed

from instep.bundled import WORLDS, find
from instep.bundled.baselines import FILE
from instep.metrics.columns import Column
from instep.metrics.compare import Row, combined, difference, direction
from instep.metrics.figures import Value
from instep.report.verdict import listed

MODES = 0.95  # share of the control's modes that a gain may not cost more than


@dataclass(frozen=True)
class Cells:
    """What was measured of one world and one number of steps: rows by arm and seed, processor seconds of training alike, and the rows that ship with the
    world."""

    plan: dict[str, Any]
    rows: dict[str, dict[int, Row]]
    seconds: dict[str, dict[int, float]]
    baselines: tuple[Row, ...]


def read(results: Path = RESULTS) -> list[Cells]:
    """All cells, moving-words first, then by steps, many before few."""
    groups: dict[tuple[str, int], dict[str, Any]] = {}
    for file in sorted(results.glob("*.json")):
        stored = json.loads(file.read_text(encoding="utf-8"))
        plan = stored["plan"]
        group = groups.setdefault((plan["world"], plan["steps"]), {"plan": plan, "arms": {}})
        group["arms"].setdefault(stored["arm"], {})[stored["seed"]] = stored
    found = []
    for (world, _), group in sorted(groups.items(), key=lambda item: (item[0][0] != "moving-words", item[0][0], -item[0][1])):
        if world in WORLDS:
            rows = {arm: {seed: row_of(cell["row"]) for seed, cell in cells.items()} for arm, cells in group["arms"].items()}
            seconds = {arm: {seed: _seconds(group["arms"], arm, seed) for seed in cells} for arm, cells in group["arms"].items()}
            found.append(Cells(group["plan"], rows, seconds, shipped(group["plan"])))
    return found


def shipped(plan: dict[str, Any]) -> tuple[Row, ...]:
    """Real videos, real videos through the VAE, the teacher in 50 steps, and naive sampling in the student's number of steps, guided and not."""
    rows = json.loads((find(plan["world"]).folder / FILE).read_text(encoding="utf-8"))["rows"]
    pairs = dict.fromkeys([(50, plan["guidance"]), (plan["steps"], plan["guidance"]), (plan["steps"], 1.0)])
    keys = ("real", "decoded", *(f"teacher-{steps}-{guidance:g}" for steps, guidance in pairs))
    return tuple(Row.of_json(rows[key]) for key in keys if key in rows)


def command(plan: dict[str, Any]) -> str:
    """What measures the cells of a plan."""
    options = {"steps": "steps", "guidance": "guidance", "base": "base", "more": "more", "batch": "batch", "critic-updates": "critic_updates"}
    return " ".join([f"python benchmarks/methods_on.py {plan['world']}", *(f"--{option} {plan[key]:g}" for option, key in options.items())])


def _seconds(arms: dict[str, dict[int, Any]], arm: str, seed: int) -> float:
    """Processor seconds of training a cell and those that it goes on from."""
    cell = arms[arm][seed]
    before = cell.get("before")
    return cell["train_cpu_s"] + (_seconds(arms, before, seed) if before and seed in arms.get(before, {}) else 0.0)


def paired(rows: dict[int, Row], others: dict[int, Row], key: str) -> Value | None:
    """Mean over the seeds of both of row minus other, with the larger of two errors: the spread between seeds, and what the samples of independent rows
    allow. None without a common seed that has the metric."""
    seeds = [seed for seed in rows if seed in others and key in rows[seed].values and key in others[seed].values]
    if not seeds:
        return None
    each = [difference(rows[seed], others[seed], key) for seed in seeds]
    values = torch.tensor([d.value for d in each], dtype=torch.float64)
    within = math.sqrt(sum(d.se**2 for d in each)) / len(each)
    between = float(values.std()) / math.sqrt(len(each)) if len(each) > 1 else 0.0
    return Value(float(values.mean()), max(within, between))


def modes(rows: dict[int, Row], control: dict[int, Row]) -> Value:
    """The share of the control's modes that an arm shows: the smallest over all kinds of modes that are counted, each as a quotient of means over the seeds of
    both. Its error is what the samples allow; the seeds come first since the smallest of several noisy quotients is too small."""
    seeds = [seed for seed in rows if seed in control]
    found = []
    for key in (key for key in rows[seeds[0]].values if key.startswith("modes")):
        means = [sum(cells[seed].values[key].value for seed in seeds) for cells in (rows, control)]
        errors = [math.sqrt(sum(cells[seed].values[key].se ** 2 for seed in seeds)) for cells in (rows, control)]
        share = means[0] / means[1]
        found.append(Value(share, share * math.hypot(*(error / mean for error, mean in zip(errors, means, strict=True)))))
    return min(found, key=lambda value: value.value)


def headline(rows: Sequence[Row], columns: Sequence[Column]) -> Column:
    """The first metric with a good end that all rows have: the held-out judge's, or without it the monitor's."""
    return next(c for c in columns if c.verdict and direction(c.key) and all(c.key in row.values for row in rows))


def shown(rows: Sequence[Row], columns: Sequence[Column]) -> list[Column]:
    """The columns of the table: those that the terminal or a verdict shows and some row has."""
    return [c for c in columns if (c.short or c.verdict) and any(c.key in row.values for row in rows)]


def table(cells: Cells, columns: Sequence[Column]) -> list[str]:
    """Every row: real videos, the teacher, each method in its default reading; seeds of an arm as their mean."""
    rows = [(row.name, row, None, "-") for row in cells.baselines]
    for arm, what in ARMS.items():
        if arm in cells.rows and not what.reading_of:
            seconds = cells.seconds[arm].values()
            rows.append((what.what, combined(list(cells.rows[arm].values())), len(cells.rows[arm]), f"{sum(seconds) / len(seconds):.0f}"))
    kept = shown([row for _, row, _, _ in rows], columns)
    lines = ["| | NFE | seeds | " + " | ".join(c.head for c in kept) + " | CPU s of training |", "|---" * (len(kept) + 4) + "|"]
    for name, row, seeds, seconds in rows:
        figures = [f"{c.text(row.values[c.key].value)} ± {c.text(row.values[c.key].se)}" if c.key in row.values else "-" for c in kept]
        lines.append(f"| {name} | {row.nfe or '-'} | {seeds or '-'} | " + " | ".join(figures) + f" | {seconds} |")
    return lines


def _or_dash(value: Value | None) -> str:
    return "-" if value is None else signed(value)


@dataclass(frozen=True)
class Compared:
    """An arm against the control of its seeds: gain in the headline and by the monitor, Frechet distance added, on all prompts and on open ones (None: not
    measured), and the smallest share of the control's modes."""

    arm: str
    seeds: tuple[int, ...]
    column: Column
    gain: Value
    monitor: Value | None
    distance: Value
    open_distance: Value | None
    modes: Value

    @property
    def figures(self) -> str:
        """Its cells of a table: the three differences, and the share of modes."""
        differences = [_or_dash(value) for value in (self.gain, self.distance, self.open_distance)]
        return " | ".join([*differences, f"{self.modes.value:.0%} ± {self.modes.se:.0%}"])


def compared(cells: Cells) -> list[Compared]:
    """Every arm that shares a seed with the control, in the order of ARMS."""
    control, evaluation = cells.rows.get("control"), find(cells.plan["world"]).evaluation
    assert evaluation is not None
    if not control:
        return []
    column, found = headline([row for arm in cells.rows.values() for row in arm.values()], evaluation.columns), []
    for arm in ARMS:
        rows = cells.rows.get(arm, {})
        keys = (column.key, column.key.replace("heldout", "monitor"), "fd", "fd_open")
        gain, monitor, distance, open_distance = (paired(rows, control, key) for key in keys)
        if arm not in ("control", "start", "tuned-teacher") and gain is not None and distance is not None:
            seeds = tuple(sorted(rows.keys() & control.keys()))
            found.append(Compared(arm, seeds, column, gain, monitor, distance, open_distance, modes(rows, control)))
    return found


def compared_methods(cells: Cells) -> list[Compared]:
    """The methods in their default reading."""
    return [one for one in compared(cells) if not ARMS[one.arm].reading_of]


def against_control(cells: Cells) -> list[str]:
    """Each method minus the control, seed by seed, in the headline and the distance; what it keeps of the control's modes; and the verdict."""
    found = compared_methods(cells)
    if not found:
        return []
    column = found[0].column
    lines = [f"| against the control | seeds | {column.head} | FD | FD (open prompts) | modes, of the control's | verdict |", "|---" * 7 + "|"]
    for one in found:
        lines.append(f"| {ARMS[one.arm].what} | {len(one.seeds)} | {one.figures} | {verdict(one)} |")
    return lines


def reading(arm: str) -> str:
    """What a table of readings calls an arm."""
    return ARMS[arm].what if ARMS[arm].reading_of else "the default"


def asked(cells: Cells) -> list[str]:
    """Whether a reading of DM-Align (Group) gains at nothing's cost, and which one gains most."""
    group = [one for one in compared(cells) if GROUP in (one.arm, ARMS[one.arm].reading_of)]
    if not group:
        return []
    best = max(group, key=lambda one: direction(one.column.key) * one.gain.value)
    free = [reading(one.arm) for one in group if verdict(one, open_prompts=False) == "better"]
    told = f"reached by {', '.join(free)}" if free else "**not reached** by any of these readings"
    return [
        f"- Asked of DM-Align (Group): a gain of more than two standard errors at {MODES:.0%} of the control's modes or more and no larger FD: {told}. "
        f"Of them {reading(best.arm)} gains most: {signed(best.gain)} at {best.modes.value:.0%}.",
        "",
    ]


def verdict(one: Compared, open_prompts: bool = True) -> str:
    """What two standard errors allow to be told: of the headline, then of what a gain costs."""
    sign = direction(one.column.key)
    if abs(one.gain.value) <= 2 * one.gain.se:
        return "no difference"
    if sign * one.gain.value < 0:
        return "worse"
    distances = {"FD": one.distance, "FD (open prompts)": one.open_distance if open_prompts else None}
    costs = ["modes"] if one.modes.value < MODES else []
    costs += [name for name, value in distances.items() if value is not None and value.value > 2 * value.se]
    return f"better, at the cost of {listed(costs)}" if costs else "better"


def lines() -> list[str]:
    """The section; empty as long as nothing was measured."""
    found = read()
    if not found:
        return []
    text = [
        "## Methods side by side, where there is room",
        "",
        "`python benchmarks/methods_on.py WORLD`. DMD2 first, then each method for as many iterations from that start; `two stages` aligns the teacher for as "
        "many iterations as an arm has and then distils for as many as the start has. A gain over the control is the mean of the differences seed by seed; its "
        'error is the larger of their spread and what the samples allow. The verdict says "at the cost of" where the smallest share of the control\'s modes '
        f"(motions, fonts, sizes or digits, and all of them together; means over seeds) is below {MODES:.0%}, or a Fréchet distance grows by more than two "
        "standard errors. Rows without seeds are those that ship with the world, of fewer videos. Processor seconds are those of training, the start included; "
        "machines differ. Readings of DM-Align other than the default have a table of their own; they were looked at on seed 0 first, which is one of those "
        "reported. The figures (`python benchmarks/methods_figure.py`) show the table against the control of each section, and that of Group's readings.",
        "",
        "![Methods: gain over the control against the share of its modes](methods.png)",
        "",
        "![Readings of DM-Align (Group): the same](readings.png)",
        "",
    ]
    for cells in found:
        evaluation, plan = find(cells.plan["world"]).evaluation, cells.plan
        assert evaluation is not None
        text += [
            f"### {plan['world']}, {plan['steps']} step{'s' * (plan['steps'] > 1)}",
            "",
            f"Teacher's guidance {plan['guidance']:g}; {plan['base']} iterations, then {plan['more']}, batch {plan['batch']}, "
            f"{plan['critic_updates']} updates of the fake for each of the student: `{command(plan)}`.",
            "",
            *table(cells, evaluation.columns),
            "",
            *against_control(cells),
            "",
            *(line for method in dict.fromkeys(arm.reading_of for arm in ARMS.values() if arm.reading_of) for line in readings(cells, method)),
            *asked(cells),
        ]
    return text


def compared_readings(cells: Cells, method: str) -> list[Compared]:
    """A method's other readings, after its default on the same seeds, which comes once for each set of seeds; empty without one."""
    others, found = [one for one in compared(cells) if ARMS[one.arm].reading_of == method], []
    for seeds in dict.fromkeys(one.seeds for one in sorted(others, key=lambda one: -len(one.seeds))):
        same = replace(cells, rows={arm: {seed: row for seed, row in rows.items() if seed in seeds} for arm, rows in cells.rows.items()})
        found += [one for one in compared(same) if one.arm == method and one.seeds == seeds]
        found += [one for one in others if one.seeds == seeds]
    return found


def readings(cells: Cells, method: str) -> list[str]:
    """The table of a method's readings; empty if there is only its default."""
    found = compared_readings(cells, method)
    if not found:
        return []
    head = found[0].column.head
    return [
        f"Readings of {ARMS[method].what} against the control; each differs from the default in the options that are named:",
        "",
        f"| reading | seeds | {head} (monitor) | {head} | FD | FD (open prompts) | modes, of the control's |",
        "|---" * 7 + "|",
        *(f"| {reading(one.arm)} | {', '.join(map(str, one.seeds))} | {_or_dash(one.monitor)} | {one.figures} |" for one in found),
        "",
    ]
