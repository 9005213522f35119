"""The laboratory's part of docs/results.md, from benchmarks/results/lab/*.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stored import renamed, wording

LAB = Path(__file__).parent / "results" / "lab"
Metrics = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """Something asked of a recipe: the metric, its bounds, and whose it is."""

    name: str
    key: str
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Section:
    """One experiment's table: its heading, what is claimed or asked, the metrics shown, and the bars."""

    experiment: str
    title: str
    text: str
    keys: Sequence[str] = ("quality", "tv", "energy", "rkl", "spread", "reached")
    bars: Sequence[Bar] = ()
    curve: str | None = None


REWARDED = ("quality", "tv", "energy", "spread", "share", "reached")
SECTIONS = (
    Section(
        "one-step",
        "One step, ring of 8",
        "The external forces and the adapter beside plain matching. Asked: quality at least .70, TV at most .10.",
        bars=(Bar("dmd2", "quality", low=0.70), Bar("dmd2", "tv", high=0.10)),
    ),
    Section("one-step-guided", "One step, guidance 1.5", "Guidance changes the target, so TV to the unguided mixture is no error here.", keys=REWARDED),
    Section(
        "four-steps",
        "Four steps, ring of 8",
        "A fake told the exit, one that is not, fresh rollouts, a discriminator. Asked of the first: quality at least .87, TV at most .07.",
        bars=(Bar("dmd2", "quality", low=0.87), Bar("dmd2", "tv", high=0.07)),
    ),
    Section("four-steps-guided", "Four steps, guidance 1.5", "Decoupled-DMD's levels against shared ones."),
    *(
        Section(
            f"one-step-{name}",
            f"One step, {name}",
            "Our own bars for this geometry: DMD2 quality at least .60, TV at most .12; AMD's share in [.70, .94].",
            keys=REWARDED,
            bars=(Bar("dmd2", "quality", low=0.60), Bar("dmd2", "tv", high=0.12), Bar("amd", "share", 0.70, 0.94)),
        )
        for name in ("grid9", "moons", "rings")
    ),
    *(
        Section(
            f"four-steps-{name}",
            f"Four steps, {name}",
            "Our own bars: conditioned, quality at least .80, TV at most .08.",
            bars=(Bar("dmd2", "quality", low=0.80), Bar("dmd2", "tv", high=0.08)),
        )
        for name in ("grid9", "moons", "rings")
    ),
    Section(
        "far",
        "A far start, exact teacher (AMD Fig. 2)",
        "Student and fake begin on a blob at (5, 5), off every mode; the taxonomy says plain DMD stalls there. Without guidance "
        "Decoupled-DMD *is* DMD2: what differs between those two rows is rounding, and shows how far chance goes.",
        curve="quality",
    ),
    Section("far-learned", "A far start, learned teacher", "The same with a network for a teacher, which has never seen what lies at (5, 5).", curve="quality"),
    Section("far-guided", "A far start, guidance 1.5", "The noise reset: guidance at levels of its own.", curve="quality"),
    Section("far-reward", "A far start, with a reward", "The first coordinate is rewarded, up to 2.", keys=REWARDED, curve="quality"),
    Section(
        "selective",
        "Selective reward (AMD Fig. 7, top; Fig. 6)",
        "Half of each class's modes are rewarded; `share` is their part of what is on a mode. Asked of AMD: share in [.76, .94] at quality at least .70.",
        keys=REWARDED,
        curve="share",
        bars=(Bar("amd", "share", 0.76, 0.94), Bar("amd", "quality", low=0.70)),
    ),
    Section("selective-gradient", "Selective reward, by its gradient", "Larger weights of the gradient.", keys=REWARDED, curve="share"),
    Section("global", "Global reward (Fig. 7, bottom)", "Every mode of the class is rewarded alike; off-mode samples are not.", curve="quality"),
    Section("naive", "Naive adaptation against AMD (Fig. 8)", "Asked: naive adaptation at least .25 in quality below AMD.", keys=REWARDED, curve="quality"),
    Section("ablation", "Both components on and off (Fig. 5), guidance 1.5", "", keys=REWARDED),
    Section("sweep-sensitivity", "s", "Score adaptation's sensitivity; .5 is the ablation's last row.", keys=REWARDED),
    Section("sweep-group", "K", "Samples a group; 8 is the ablation's last row.", keys=REWARDED),
    Section("sweep-guidance", "w", "The teacher's guidance; 1.5 is the ablation's.", keys=REWARDED),
    Section("sweep-tilt", "tilt", "The exponent of the critic's weight; 1 (the paper's) is the ablation's last row.", keys=REWARDED),
    Section(
        "two-stage",
        "Two stages",
        "1,000 iterations of DMD, then each method for a further 500 (the paper's SiT protocol); DMD2 for all 1,500 is the control.",
        keys=REWARDED,
    ),
    Section(
        "consistency",
        "Consistency distillation beside matching, one step (DOLLAR)",
        "Of the teacher's own trajectories on exact real samples: alone, "
        "beside matching with one and five steps, at a larger weight, and with a student whose network predicts x0.",
    ),
    Section("consistency-four", "Consistency distillation beside matching, four steps", ""),
    Section(
        "latent",
        "A black-box reward through its latent copy (DOLLAR)",
        "Half of each class's modes are rewarded; `dollar` gets the reward as a number alone and climbs its copy, fitted for 40 iterations before "
        "(`fit=0`: together from the start). Weights are in deviations of the reward, ReFL's in its own unit.",
        keys=REWARDED,
    ),
    Section(
        "particles",
        "Particles: fixed points",
        "Free points with the exact fake: where a method comes to rest. Theory for AMD's weight: .814.",
        keys=REWARDED,
        bars=(Bar("dmd2", "quality", low=0.95), Bar("amd:sensitivity=0", "share", 0.75, 0.87)),
    ),
)


def load(name: str) -> dict[str, Any] | None:
    file = LAB / f"{name}.json"
    if not file.is_file():
        return None
    measured = renamed(json.loads(file.read_text()))
    return {**measured, "runs": [{**run, "name": wording(run["name"])} for run in measured["runs"]]}


def over_seeds(rows: Sequence[dict[str, float | None]]) -> Metrics:
    """Mean and deviation of each metric; nan where a seed has none."""
    found: Metrics = {}
    for key in rows[0]:
        values = [math.nan if row[key] is None else float(row[key]) for row in rows]  # type: ignore[arg-type]
        mean = sum(values) / len(values)
        found[key] = mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
    return found


def cell(metrics: Metrics, key: str) -> str:
    if key not in metrics:
        return "-"
    mean, sd = metrics[key]
    digits = 1 if key == "reached" else 4 if key == "energy" else 3
    return "-" if math.isnan(mean) else f"{mean:.{digits}f} ± {sd:.{digits}f}"


def lines_of(section: Section) -> list[str]:
    """The section's Markdown; nothing if it was not measured."""
    measured = load(section.experiment)
    if measured is None:
        return []
    runs = {run["name"]: over_seeds(run["curve"][-1]["figures"]) for run in measured["runs"]}
    out = [f"### {section.title}", "", *([section.text, ""] if section.text else [])]
    out += ["| | " + " | ".join(section.keys) + " | CPU s |", "|---" * (len(section.keys) + 2) + "|"]
    seconds = {run["name"]: run["cpu_s"] for run in measured["runs"]}
    for name, metrics in {"exact samples": over_seeds(measured["exact_samples"]), **runs}.items():
        time = f"{seconds[name]:.0f}" if name in seconds else ""
        out.append(f"| {name} | " + " | ".join(cell(metrics, key) for key in section.keys) + f" | {time} |")
    out += ["", *(met(bar, runs[bar.name]) for bar in section.bars)]
    if section.experiment == "naive":
        gap = runs["amd"]["quality"][0] - runs["naive-adaptive"]["quality"][0]
        out.append(f"- asked: AMD's quality at least .25 above naive adaptation's: {gap:+.3f}, {'reached' if gap >= 0.25 else 'not reached'}")
    if section.curve:
        out += ["", *curves(measured, section.curve)]
    return [*out, ""]


def met(bar: Bar, metrics: Metrics) -> str:
    mean = metrics[bar.key][0]
    asked = " and ".join(f"{word} {bound:g}" for word, bound in (("at least", bar.low), ("at most", bar.high)) if math.isfinite(bound))
    return f"- asked: {bar.name}, {bar.key} {asked}: {mean:.3f}, {'reached' if bar.low <= mean <= bar.high else 'not reached'}"


def curves(measured: dict[str, Any], key: str) -> list[str]:
    """A metric over the iterations, one row a recipe."""
    steps = [shot["step"] for shot in measured["runs"][0]["curve"]]
    keep = steps if len(steps) <= 11 else [*steps[:6], *steps[7::2]]
    lines = [f"Over the iterations, mean {key}:", "", "| | " + " | ".join(map(str, keep)) + " |", "|---" * (len(keep) + 1) + "|"]
    for run in measured["runs"]:
        shots = {shot["step"]: over_seeds(shot["figures"]) for shot in run["curve"]}
        lines.append(f"| {run['name']} | " + " | ".join("-" if math.isnan(shots[s][key][0]) else f"{shots[s][key][0]:.2f}" for s in keep) + " |")
    return lines


def lab_lines() -> list[str]:
    """Everything that was measured in the laboratory."""
    found = [line for section in SECTIONS for line in lines_of(section)]
    if not found:
        return ["not measured", ""]
    head = (
        "`python benchmarks/lab.py`; any one by itself: `instep lab dmd2 amd --reward half`. Three seeds (mean ± deviation), 4,000 samples each; "
        "1,500 iterations; what the columns mean: `instep/lab/metrics.py`. Rows are `RECIPE:overrides`. "
        "`magic` adapts its teacher, which only a network can have: in every table its teacher is the learned one. Exact samples are 4,000, "
        "particles are 1,024. Where the heading names no guidance it is 1, and AMD's score adaptation then only weighs the matching term."
    )
    return [head, "", *found]
