"""The section of docs/results.md on class-conditional one-step generation, from benchmarks/results/class/*.json."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from class_conditional import CELLS, ITERATIONS, RESULTS, SAMPLES, rows
from stored import renamed

COLUMNS = {
    "fd": "Frechet distance",
    "recall": "recall",
    "inception": "inception score",
    "precision": "precision",
    "heldout": "right class (held-out)",
    "diversity": "spread in a class",
    "vendi": "Vendi in a class",
    "training_score": "training classifier, log p",
    "nearest_train": "to the nearest training scan",
    "mean_brightness": "mean brightness",
}
PAPER = {  # DMDR, Table 6: FID, recall, inception score, precision
    "dmd2-1": (2.13, 0.64, 232.15, 0.77),
    "dmd2-1.5": (5.20, 0.48, 387.24, 0.88),
    "dmd2-4": (15.70, 0.11, 453.65, 0.86),
    "dmdr-1": (6.95, 0.40, 416.01, 0.90),
    "dmdr-1.5": (13.43, 0.24, 494.43, 0.93),
}


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds and its standard error."""

    value: float
    se: float

    def __str__(self) -> str:
        digits = 3 if abs(self.value) < 10 else 1
        return f"{self.value:.{digits}f}" + (f" ± {self.se:.{digits}f}" if math.isfinite(self.se) else "")


def estimate(name: str, key: str) -> Estimate:
    """KeyError if the cell was not measured."""
    values = [renamed(row["figures"])[key] for row in rows(name)]
    if not values:
        raise KeyError(name)
    mean = sum(values) / len(values)
    spread = sum((v - mean) ** 2 for v in values) / (len(values) - 1) if len(values) > 1 else math.nan
    return Estimate(mean, math.sqrt(spread / len(values)))


def step(a: str, b: str, key: str) -> int:
    """+1 if the metric rises from cell a to cell b by more than two standard errors of the difference, -1 if it falls, 0 if neither.

    KeyError if one of them was measured with fewer than two seeds.
    """
    x, y = estimate(a, key), estimate(b, key)
    if not math.isfinite(x.se + y.se):
        raise KeyError(f"{a} or {b}: one seed")
    bound = 2 * math.hypot(x.se, y.se)
    return 0 if not abs(y.value - x.value) > bound else 1 if y.value > x.value else -1


def show(a: str, b: str, keys: Sequence[str]) -> str:
    return "; ".join(f"{COLUMNS[k]} {estimate(a, k)} to {estimate(b, k)}" for k in keys)


def moves(pairs: Sequence[tuple[str, str]], wanted: dict[str, int]) -> tuple[str, str]:
    """How many of the asked movements are seen, over all pairs."""
    seen = [step(a, b, key) == sign for a, b in pairs for key, sign in wanted.items()]
    word = "reproduced" if all(seen) else "partly" if sum(seen) * 2 >= len(seen) else "not reproduced"
    numbers = "; ".join(f"{a} to {b}: {show(a, b, tuple(wanted))}" for a, b in pairs)
    return f"{word} ({sum(seen)} of {len(seen)})", numbers


SHARPER = {"fd": 1, "recall": -1, "inception": 1, "precision": 1}


def guidance_sharpens() -> tuple[str, str]:
    return moves([("dmd2-1", "dmd2-1.5"), ("dmd2-1.5", "dmd2-4")], SHARPER)


def rl_sharpens() -> tuple[str, str]:
    return moves([("dmd2-1", "dmdr-1")], SHARPER)


def rl_sharpens_guided() -> tuple[str, str]:
    return moves([("dmd2-1.5", "dmdr-1.5")], SHARPER)


def rl_beats_guidance() -> tuple[str, str]:
    return moves([("dmd2-1.5", "dmdr-1")], {"fd": 1, "recall": -1, "inception": 1, "precision": 1})


def diversity() -> tuple[str, str]:
    return moves([("dmd2-1", "dmdr-1"), ("dmd2-1.5", "dmdr-1.5")], {"diversity": -1, "vendi": -1})


def surpasses() -> tuple[str, str]:
    word, numbers = moves([("teacher-50-1", "dmdr-1"), ("teacher-50-1.5", "dmdr-1.5")], {"inception": 1, "precision": 1, "heldout": 1})
    worse = "; ".join(f"{a} to {b}: {show(a, b, ('fd', 'recall'))}" for a, b in (("teacher-50-1", "dmdr-1"), ("teacher-50-1.5", "dmdr-1.5")))
    return word, f"{numbers}; what it pays: {worse}"


CLAIMS: dict[str, Callable[[], tuple[str, str]]] = {
    "Guidance (1, 1.5, 4) sharpens: Frechet distance and inception score up, recall down, precision up (the paper's: .77, .88, .86)": guidance_sharpens,
    "RL without guidance sharpens likewise (FID 2.13 to 6.95, recall .64 to .40, IS 232 to 416, precision .77 to .90)": rl_sharpens,
    "RL on top of guidance 1.5 sharpens further (FID 5.20 to 13.43, recall .48 to .24, IS 387 to 494, precision .88 to .93)": rl_sharpens_guided,
    "RL without guidance sharpens more than guidance 1.5 alone (FID 5.20, 6.95; recall .48, .40; IS 387, 416; precision .88, .90)": rl_beats_guidance,
    "The price is diversity (here: spread and Vendi score in a class)": diversity,
    "The student surpasses the many-step teacher (abstract; not shown in Table 6), in inception score, precision and right classes": surpasses,
}


def reading() -> str:
    """Why the Frechet distance may fall where the paper's rises, in numbers."""
    real = json.loads((RESULTS / "floor.json").read_text())["figures"]["fd"]
    weights = {0: "dmd2-1", 0.05: "refl-1-low", 0.5: "refl-1-half", 5: "refl-1-high"}
    parts = {w: ", ".join(f"{COLUMNS[k]} {estimate(name, k)}" for k in ("fd", "recall", "precision")) for w, name in weights.items()}
    curve = "; ".join(f"weight {w}: {text}" for w, text in parts.items())
    high = {k: estimate("refl-1-high", k) for k in ("diversity", "heldout", "inception")}
    return (
        f"Where the Frechet distance parts from the paper: the unguided teacher stands at {estimate('teacher-50-1', 'fd')} and its student at "
        f"{estimate('dmd2-1', 'fd')}, real scans at {real:.3f}. An unguided model of this size draws some digits that are none, so a first bit of sharpening, "
        "by guidance or by the reward, takes it nearer to the real ones; what is sharpened further moves away again. If the paper's unguided "
        f"student starts near its data already, it has only the second half (our reading, not tested). "
        f"The weight of the reward's gradient beside plain matching, guidance 1: {curve}. "
        f"At weight 5 the student collapses (spread in a class {high['diversity']}, plain {estimate('dmd2-1', 'diversity')}) while the "
        f"classifiers are content (right class {high['heldout']}, inception score {high['inception']}): the decline beyond an optimal "
        "weight that the paper's Table 5c reports, and a warning about what these metrics reward."
    )


def table() -> list[str]:
    lines = ["| | guidance | RL | seeds | " + " | ".join(COLUMNS.values()) + " | CPU s of training |", "|---" * (len(COLUMNS) + 5) + "|"]
    real = RESULTS / "floor.json"
    if real.is_file():
        values = renamed(json.loads(real.read_text())["figures"])
        lines.append("| real: training scans against the reference | - | - | - | " + " | ".join(f"{values[k]:.3f}" for k in COLUMNS) + " | - |")
    for name, cell in CELLS.items():
        found = rows(name)
        if found:
            seconds = [row["train_cpu_s"] for row in found if "train_cpu_s" in row]
            cost = f"{sum(seconds) / len(seconds):.0f}" if seconds else "-"
            cells = " | ".join(str(estimate(name, key)) for key in COLUMNS)
            lines.append(f"| {cell.what} (`{name}`) | {cell.guidance:g} | {'yes' if cell.rl else 'no'} | {len(found)} | {cells} | {cost} |")
    return lines


def paper() -> list[str]:
    lines = ["| CFG | RL | FID | recall | inception score | precision |", "|---|---|---|---|---|---|"]
    for name, values in PAPER.items():
        lines.append(f"| {CELLS[name].guidance:g} | {'yes' if CELLS[name].rl else 'no'} | " + " | ".join(f"{v:g}" for v in values) + " |")
    return lines


def class_lines() -> list[str]:
    """The whole section."""
    out = [
        "## Class-conditional, one step (DMDR Table 6)",
        "",
        "`python benchmarks/class_conditional.py --seeds 0 1 2` on the bundled `digits` (8 x 8 real handwritten digits, a DiT of .4 million parameters "
        f"trained as a flow; docs/class_conditional.md). Every student has one step and {ITERATIONS} updates; {SAMPLES} samples a row and seed, in the "
        "features of the held-out classifier against 297 reference scans that neither teacher, classifiers nor students have seen. It is a Frechet distance in "
        "*classifier* features, not FID, and the inception score is that of a classifier of ten classes (at most 10): directions can be compared with the "
        "paper's, sizes cannot. ± is one standard error over seeds.",
        "",
        *table(),
        "",
        "The paper's Table 6 (SiT-XL, ImageNet 256 x 256, one step):",
        "",
        *paper(),
        "",
        "A movement counts as seen if it is larger than two standard errors of the difference; all of a claim's: reproduced, at least half: partly.",
        "",
        "| claim | here | numbers |",
        "|---|---|---|",
    ]
    for text, check in CLAIMS.items():
        try:
            verdict, numbers = check()
        except KeyError as missing:
            verdict, numbers = "not measured", str(missing)
        out.append(f"| {text} | **{verdict}** | {numbers} |")
    with contextlib.suppress(KeyError, FileNotFoundError):
        out += ["", reading()]
    return [*out, ""]
