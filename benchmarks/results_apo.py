"""The section of docs/results.md on Diffusion-APO, from what benchmarks/apo.py kept."""

from __future__ import annotations

import json
from statistics import mean, stdev

import results_apo_bundled
from apo import BETA, CELLS, DISTILL_UPDATES, EVALUATIONS, RESULTS, SEQUENCE
from stored import renamed

FIGURES = {"win": "win rate", "share": "share", "quality": "quality", "tv": "TV"}


# written after looking at the tables, three seeds
FOUND = (
    "Found. At equal levels and equal beta DPO turns every mode and loses two fifths of the quality; with as many updates as APO it loses "
    "nearly as much, and five levels drawn from all (no-window) do too: here it is where the window looks that keeps quality, not that it has "
    "five levels. As the paper says, high levels alone align least, and low ones alone cost quality. DPO can be held back by beta: at 20 it "
    "keeps its quality and aligns less than APO does at 2; between 10 and 20 it falls from one to the other. The five stages, each against a "
    "reference of its own, take nine samples in ten to a chosen mode at little loss of quality. TV is that to the whole mixture, so turning "
    "modes raises it.",
    "Not reproduced: with a level of its own for every pair of a batch the loss is as steady without a window as with one. Random shift and "
    "offset make no difference beyond seeds, before or after guidance distillation, which costs nothing here; an offset of .005 in level is "
    "little to a network of three layers.",
)


def records(name: str) -> list[dict]:
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob(f"{name}-[0-9].json"))]
    return [{**record, "after": renamed(record["after"])} for record in found]


def said(values: list[float]) -> str:
    """Mean, and the deviation over seeds where there are several."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def cells() -> list[str]:
    heads = [f"{what}, {when}" for when in ("before", "after") for what in FIGURES.values()]
    lines = [f"| | seeds | {' | '.join(heads)} | loss from update to update |", "|---" * (len(heads) + 3) + "|"]
    for name, cell in CELLS.items():
        kept = records(name)
        if not kept:
            continue
        first = next(iter(kept[0]["after"]))
        values = [said([record["after"][stage][key] for record in kept]) for stage in (first, "distill-guidance") for key in FIGURES]
        lines.append(f"| {name}: {cell.what} | {len(kept)} | {' | '.join(values)} | {said([record['after'][first]['loss_jump'] for record in kept])} |")
    return lines


def sequence() -> list[str]:
    kept = records("sequence")
    if not kept:
        return ["Not measured."]
    lines = [f"| after stage | seeds | {' | '.join(FIGURES.values())} |", "|---" * (len(FIGURES) + 2) + "|"]
    for stage in kept[0]["after"]:
        values = [said([record["after"][stage][key] for record in kept]) for key in FIGURES]
        lines.append(f"| {results_apo_bundled.STAGES.get(stage, stage)} | {len(kept)} | {' | '.join(values)} |")
    return lines


def round_trip() -> list[str]:
    """What benchmarks/round_trip.py kept: from answers on the human-evaluation page to a tuned model."""
    file = RESULTS.parent / "round_trip.json"
    if not file.is_file():
        return ["Not measured."]
    kept = renamed(json.loads(file.read_text(encoding="utf-8")))
    classifiers = {"heldout": "held-out classifier", "monitor": "monitor classifier", "training": "training classifier"}
    rows = [
        ("scripted answers, against the start", kept["against_start"]["scripted"]),
        ("every other pair exchanged, against the start", kept["against_start"]["half exchanged"]),
        ("all pairs exchanged, against the start", kept["against_start"]["all exchanged"]),
        ("scripted answers, against every other pair exchanged", kept["scripted_against_half_exchanged"]),
    ]
    heads = " | ".join(f"win rate, {name}" for name in classifiers.values())
    table = [f"| | {heads} | right before and after, held-out classifier |", "|---" * (len(classifiers) + 2) + "|"]
    for name, row in rows:
        wins = " | ".join(f"{row[classifier]['win']:.3f} ± {row[classifier]['win_se']:.3f}" for classifier in classifiers)
        table.append(f"| {name} | {wins} | {row['heldout']['both_start']:.3f}, {row['heldout']['both_tuned']:.3f} |")
    beaten = [row["heldout"]["win"] - 0.5 > 2 * row["heldout"]["win_se"] for _, row in rows]
    said = [
        f"the tuned model {'wins' if beaten[0] else 'does not win beyond two standard errors'} against the start",
        f"the labels {'make a difference' if beaten[-1] else 'make no difference beyond two standard errors'} (last row: the same pairs and updates)",
    ]
    half = kept["against_start"]["half exchanged"]["heldout"]
    noisy = " Labels half of which are wrong are not without effect: they cost." if half["win"] + 2 * half["win_se"] < 0.5 else ""
    return [
        "`python benchmarks/round_trip.py`, one seed. **A script answered, no person**: it saw what the page of `instep human-eval` shows of "
        f"{kept['prompts_shown']} prompts, two samples of the bundled model each ({kept['steps']} steps, guidance {kept['guidance']:g}), and preferred "
        f"what the training classifier scores higher, or said equal within {kept['margin']:g} of log p. {kept['pairs_decided']} pairs were told apart, "
        f"exported, and trained on in {kept['updates']} updates of the offline stage. Win rates are on {kept['prompts_compared']} other prompts with "
        f"{kept['copies']} noises each, ± one standard error over prompts; only the held-out and the monitor classifier had no part in the answers.",
        "",
        *table,
        "",
        f"By the held-out classifier {said[0]}, and {said[1]}.{noisy}{first_look()}",
    ]


def first_look() -> str:
    """What the same runs looked like on the noises that were looked at first."""
    file = RESULTS.parent / "round_trip_first_look.json"
    if not file.is_file():
        return ""
    kept = renamed(json.loads(file.read_text(encoding="utf-8")))
    seen = {label: f"{row['heldout']['win']:.3f} ± {row['heldout']['win_se']:.3f}" for label, row in kept["against_start"].items()}
    return (
        f" The same models had been compared before, on {kept['copies']} other noises a prompt: {seen['scripted']} with the answers, "
        f"{seen['half exchanged']} and {seen['all exchanged']} with exchanged pairs. The first of these was too coarse to tell; nothing was "
        "trained anew in between, and the table is of fresh noise."
    )


def lines() -> list[str]:
    """The section."""
    start = [record["start"] for record in records("apo")]
    begins = f"The start has share {said([s['share'] for s in start])} and quality {said([s['quality'] for s in start])}. " if start else ""
    steps = ", ".join(f"{results_apo_bundled.STAGES[key.replace('_', '-')]} {value}" for key, value in SEQUENCE.items())
    return [
        "## Diffusion-APO",
        "",
        "### In the laboratory",
        "",
        "`python benchmarks/apo.py`: a learned many-step model of the ring, sampled in 10 steps with guidance 1.5; half of the modes are the chosen ones. "
        f"Every cell spends {EVALUATIONS} levels on labelled pairs, or on the model's own, where it does not say otherwise: one an update (DPO), or five, in "
        f"{EVALUATIONS // 5} updates; beta is {BETA:g}. Then come {DISTILL_UPDATES} updates of guidance distillation, after which it is sampled without "
        f"guidance. {begins}Win rate: share of the same noises that score more than .1 higher than at the start, alike ones as half, so .75 is what a model "
        "reaches that turns every rejected mode into a chosen one. ± is the deviation over seeds. The loss of a window is the mean of its levels, so its "
        "jumps are smaller for that alone: compare cells of as many levels.",
        "",
        *cells(),
        "",
        f"The five stages in sequence ({steps} updates):",
        "",
        *sequence(),
        "",
        "\n\n".join(FOUND),
        "",
        *results_apo_bundled.lines(),
        "### From answers on the human-evaluation page to a tuned model",
        "",
        *round_trip(),
        "",
    ]
