"""The section of docs/results.md on DMDR: the table of benchmarks/reinforce.py, and what the paper claims beside what was found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import results_methods
from methods_on import ARMS
from reinforce import CELLS, OWN
from stored import row_of
from verdicts import Claim, claims_table, differences, measured, signed, word

from instep.metrics.compare import Row, better, combined, difference, direction

COLUMNS = {
    "train_score": "training reward",
    "train_both": "right, training classifier",
    "heldout_both": "right, held-out classifier",
    "fd": "FD",
    "fd_open": "FD open",
    "modes_motion": "motions of 9",
    "modes_digit": "digits of 10",
    "vendi": "Vendi",
    "mean_brightness": "mean brightness",
}
LAB = Path(__file__).parent / "results" / "lab"
REACHED = 0.6  # quality in the laboratory that the iterations to are counted
# what a cell is a variation of: the same steps, the same number of iterations
CONTROL = {2: "distil-only", 1: "one-distil-only"}


def records(name: str) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(OWN.glob(f"{name}-[0-9].json"))]


def cell(name: str) -> Row | None:
    rows = [row_of(record["row"]) for record in records(name)]
    return combined(rows) if rows else None


def flagged(name: str) -> str:
    """At which step of each seed's run the hacking flag was raised."""
    steps = [record["hacking"] for record in records(name)]
    return "-" if not any(steps) else ", ".join("no" if step is None else str(step) for step in steps)


def table() -> list[str]:
    lines = ["| | NFE | seeds | " + " | ".join(COLUMNS.values()) + " | hacking flag at step |", "|---" * (len(COLUMNS) + 4) + "|"]
    for name, what in CELLS.items():
        row = cell(name)
        if row:
            cells = [f"{row.values[k].value:.{3 if abs(row.values[k].value) < 1 else 2}f} ± {row.values[k].se:.3f}" for k in COLUMNS]
            lines.append(f"| {what.what} (`{name}`) | {row.nfe} | {len(records(name))} | " + " | ".join(cells) + f" | {flagged(name)} |")
    return lines


def modes(row: Row, control: Row) -> float:
    """The smaller of the two shares of the control's modes."""
    return min(row.values[k].value / control.values[k].value for k in ("modes_motion", "modes_digit"))


def said(row: Row, other: Row, *keys: str) -> str:
    return differences(row, other, keys, COLUMNS)


def need(*names: str) -> list[Row]:
    return measured(names, cell)


def alone_hacks() -> tuple[str, str]:
    alone, joint, control = need("rl-refl", "joint-0.1", "distil-only")
    highest = alone.values["train_score"].value > joint.values["train_score"].value
    lost = better(control, alone, "fd") and modes(alone, control) < 0.95
    numbers = f"alone against the control: {said(alone, control, 'train_score', 'heldout_both', 'fd', 'fd_open')}, {modes(alone, control):.0%} of its modes"
    return word(highest and lost, highest or lost), numbers


def joint_wins() -> tuple[str, str]:
    found, words = [], []
    for steps, prefix in ((2, ""), (1, "one-")):
        control = cell(CONTROL[steps])
        for name in CELLS if control else ():
            if name.startswith(f"{prefix}joint-") and name[len(prefix) + 6].isdigit() and (row := cell(name)):
                assert control is not None
                good, kept = better(row, control, "heldout_both"), modes(row, control) >= 0.95
                words.append((good and kept, good))
                seeds = f"{len(records(name))} seed{'s' * (len(records(name)) > 1)}"
                found.append(f"{name}: {said(row, control, 'heldout_both')}, {modes(row, control):.0%} of the modes ({seeds})")
    if not words:
        raise KeyError("joint")
    return word(any(both for both, _ in words), any(good for _, good in words)), "; ".join(found)


def flag() -> tuple[str, str]:
    need("rl-refl", "joint-0.1", "distil-only")
    raised = {name: [r["hacking"] for r in records(name)] for name in ("rl-refl", "joint-0.1", "distil-only")}
    right = all(step is not None for step in raised["rl-refl"]) and all(step is None for name in ("joint-0.1", "distil-only") for step in raised[name])
    return word(right), "; ".join(f"{name}: {flagged(name)}" for name in raised)


def trade_off() -> tuple[str, str]:
    names = [name for name in ("joint-0.1", "joint-0.5", "joint-1", "joint-2") if cell(name)]
    rows, (control,) = need(*names), need("distil-only")
    if len(rows) < 2:
        raise KeyError("joint")
    falls = better(rows[0], rows[-1], "fd") or modes(rows[-1], control) < modes(rows[0], control)
    rises = rows[-1].values["train_score"].value > rows[0].values["train_score"].value
    each = "; ".join(
        f"{name}: reward {row.values['train_score'].value:.3f}, FD {row.values['fd'].value:.2f}, {modes(row, control):.0%} of the modes"
        for name, row in zip(names, rows, strict=True)
    )
    return word(rises and falls, rises or falls), each


def algorithms() -> tuple[str, str]:
    (control,) = need("distil-only")
    names = [name for name in ("joint-0.1", "joint-dpo", "joint-grpo") if cell(name)]
    if len(names) < 2:
        raise KeyError("joint-dpo")
    gains = [difference(row, control, "train_score") for row in need(*names)]
    up = [d.value > 2 * d.se for d in gains]
    numbers = "; ".join(f"{name}: training reward {signed(d)}" for name, d in zip(names, gains, strict=True))
    return word(all(up), any(up)), numbers


def apart_and_together() -> tuple[str, str]:
    digit, motion, both, control = need("reward-digit", "reward-motion", "reward-both", "distil-only")
    own = {"digit": difference(digit, motion, "heldout_digit"), "motion": difference(motion, digit, "heldout_motion")}
    numbers = f"digit's reward against motion's: held-out digit {signed(own['digit'])}, motion {-own['motion'].value:+.3f} ± "
    numbers += f"{own['motion'].se:.3f}; both against the control: {said(both, control, 'heldout_both')}"
    return word(all(d.value > 2 * d.se for d in own.values()), any(d.value > 2 * d.se for d in own.values())), numbers


def tilted_start() -> tuple[str, str]:
    joint, more, control = need("tilted-joint", "tilted-more", "distil-only")
    good = better(joint, more, "train_score")
    numbers = f"RT-DM then joint against RT-DM all the way: {said(joint, more, 'train_score', 'heldout_both')}"
    numbers += f"; against distillation alone: {said(joint, control, 'train_score', 'heldout_both')}"
    return word(good and better(joint, control, "heldout_both"), good), numbers


def two_stage() -> tuple[str, str]:
    """On the worlds with room, where every arm has as many iterations (first section)."""
    wins, numbers = [], []
    for cells in results_methods.read():
        if "two-stage" not in cells.rows:
            continue
        column = results_methods.compared(cells)[0].column
        for arm in ("dmdr-refl", "dmdr-grpo"):
            gain = results_methods.paired(cells.rows[arm], cells.rows["two-stage"], column.key)
            assert gain is not None
            wins.append(direction(column.key) * gain.value > 2 * gain.se)
            seeds = len(cells.rows[arm].keys() & cells.rows["two-stage"].keys())
            numbers.append(f"{ARMS[arm].what} less two stages, {cells.plan['world']}, {seeds} seed{'s' * (seeds > 1)}: {column.head} {signed(gain)}")
    if not wins:
        raise KeyError("two-stage")
    return word(all(wins), any(wins)), "; ".join(numbers)


def rollout_cost() -> tuple[str, str]:
    file = Path(__file__).parent / "results" / "rl_cost.json"
    if not file.is_file():
        raise KeyError(file)
    rows = {row["what"]: row for row in json.loads(file.read_text())}
    student, many = rows["policy gradient alone, student of 4 steps"], rows["many-step model, 25 guided steps"]
    times = many["rollout, CPU s"] / student["rollout, CPU s"]
    return word(times > 5), f"25 guided steps against 4: {times:.1f} times in rollout (`python benchmarks/rl_cost.py`)"


def dynamics() -> tuple[str, str]:
    file = LAB / "far-dynamic.json"
    if not file.is_file():
        raise KeyError(file)
    numbers, best = [], {}
    for run in json.loads(file.read_text())["runs"]:
        quality = [(point["step"], sum(f["quality"] for f in point["figures"]) / len(point["figures"])) for point in run["curve"]]
        best[run["name"]] = next((step for step, q in quality if q >= REACHED), None)
        numbers.append(f"`{run['name']}`: {best[run['name']] or 'never'} (at the end {quality[-1][1]:.2f})")
    plain = best.pop("dmd2")
    quicker = [step is not None and (plain is None or step < plain) for step in best.values()]
    return word(all(quicker), any(quicker)), f"iterations to a quality of {REACHED} from a far start: " + "; ".join(numbers)


CLAIMS: Sequence[Claim] = (
    ("Reinforcement learning alone on the distilled student reaches the highest reward, by hacking it (Fig. 4)", alone_hacks),
    ("Joint training beats its distillation control on the held-out classifier, at 95 % of its modes (Fig. 4; asked here)", joint_wins),
    ("The hacking flag is raised alone, not in joint training or distillation (asked here)", flag),
    ("A larger weight of the reward trades generality for reward (Table 5c)", trade_off),
    ("ReFL, DPO and GRPO all improve the reward in joint training (Table 5b)", algorithms),
    ("Each reward improves its own metric; together they balance (Table 5a)", apart_and_together),
    ("RT-DM first, then joint, is best; RT-DM alone saturates (Fig. 5)", tilted_start),
    ("Joint training beats reinforcement learning followed by distillation (Table 1)", two_stage),
    ("A rollout of the few-step student is about ten times cheaper (Table 1)", rollout_cost),
    ("DynaRS and DynaDG make the start quicker (Fig. 6)", dynamics),
)


def lines() -> list[str]:
    return [*claims_table(CLAIMS), "", *table()]
