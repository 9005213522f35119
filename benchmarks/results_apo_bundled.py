"""The section of docs/results.md on Diffusion-APO on the bundled model, from what benchmarks/apo_bundled.py kept."""

from __future__ import annotations

import json
from statistics import mean

from apo_bundled import CELLS, COPIES, DISTILL_UPDATES, RESULTS, UPDATES
from stored import renamed
from verdicts import Claim, claims_table, word

from instep.metrics.figures import Value

STAGES = {
    "start": "start",
    "online": "online",
    "half-online": "half-online",
    "offline": "offline",
    "distill-guidance": "guidance distilled",
    "post-distillation": "distillation-aware",
}


def records(name: str) -> list[dict]:
    """A cell's records, seed by seed; KeyError if there are none."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob(f"{name}-[0-9].json"))]
    found = [{**record, "after": renamed(record["after"])} for record in found]
    if not found:
        raise KeyError(name)
    return found


def win(name: str, stage: str) -> Value:
    """Mean win rate over seeds. All seeds share the prompts, so the error is that of one seed: it is not divided by their number."""
    seen = [record["after"][stage] for record in records(name)]
    return Value(mean(s["win"] for s in seen), mean(s["win_se"] for s in seen))


def with_error(value: Value) -> str:
    return f"{value.value:.3f} ± {value.se:.3f}"


def above(a: Value, b: Value) -> bool:
    return a.value - b.value > 2 * (a.se**2 + b.se**2) ** 0.5


def said(*cells: tuple[str, str, str]) -> str:
    """Win rates of (label, cell, stage)."""
    least = min(len(records(name)) for _, name, _ in cells)
    return ", ".join(f"{label} {with_error(win(name, stage))}" for label, name, stage in cells) + f" ({least} seed(s))"


def wins(of: str = "") -> tuple[str, str]:
    """`of`: before the names of cells, "i2v-" for those of the image-to-video model."""
    half, stages = Value(0.5, 0.0), ("online", "half-online", "offline")
    good = [above(win(f"{of}sequence", stage), half) for stage in stages]
    return word(all(good), any(good)), said(*((STAGES[stage], f"{of}sequence", stage) for stage in stages))


def more_than_dpo(of: str = "") -> tuple[str, str]:
    apo, dpo = win(f"{of}apo", "offline"), win(f"{of}dpo", "offline")
    return word(above(apo, dpo)), said(("APO", f"{of}apo", "offline"), ("DPO", f"{of}dpo", "offline"))


def near_the_trajectory(stage: str) -> tuple[str, str]:
    names = [("with both", "apo"), ("without the shift", "no-shift"), ("without the offset", "no-offset"), ("without both", "neither")]
    there = [(label, name, stage) for label, name in names if stage in records(name)[0]["after"]]
    return word(above(win("apo", stage), win("neither", stage))), said(*there)


def regimes() -> tuple[str, str]:
    both, high, low = (win(name, "offline") for name in ("apo", "high-only", "low-only"))
    good = [above(both, high), above(both, low)]
    return word(all(good), any(good)), said(("both", "apo", "offline"), ("high alone", "high-only", "offline"), ("low alone", "low-only", "offline"))


def steadier() -> tuple[str, str]:
    apo, without = (mean(record["loss_jump"] for record in records(name)) for name in ("apo", "no-window"))
    return word(apo < 0.8 * without), f"jump of the loss from update to update, five levels each: {apo:.4f} with the window, {without:.4f} without"


def drop(of: str = "") -> tuple[str, str]:
    before, after, post = (win(f"{of}sequence", stage) for stage in ("offline", "distill-guidance", "post-distillation"))
    text = said(*((STAGES[stage], f"{of}sequence", stage) for stage in ("offline", "distill-guidance", "post-distillation")))
    return word(above(before, after) and above(post, before), above(post, after)), text


def survives() -> tuple[str, str]:
    """What preferences won, against the same distillation without them."""
    post, alone = win("sequence", "post-distillation"), win("distilled", "distill-guidance")
    cells = [
        ("distilled without preferences", "distilled", "distill-guidance"),
        ("after online, half-online and offline stages", "sequence", "distill-guidance"),
        ("and the distillation-aware one", "sequence", "post-distillation"),
    ]
    return word(above(post, alone)), said(*cells)


def longer() -> tuple[str, str]:
    once, four = win("distilled", "distill-guidance"), win("distilled-4x", "distill-guidance")
    right = [mean(record["after"]["distill-guidance"]["right"] for record in records(name)) for name in ("distilled", "distilled-4x")]
    text = said((f"{DISTILL_UPDATES} updates", "distilled", "distill-guidance"), (f"{4 * DISTILL_UPDATES}", "distilled-4x", "distill-guidance"))
    return word(above(four, once), four.value > once.value), f"{text}; right {right[0]:.3f} and {right[1]:.3f}"


def quicker() -> tuple[str, str]:
    file = RESULTS / "speed.json"
    if not file.is_file():
        raise KeyError("speed")
    kept = json.loads(file.read_text(encoding="utf-8"))
    text, both = kept["text"]["times"], kept["text and skip-layer"]["times"]
    return word(both > 2.8, both > 2), f"CPU time of a step against a distilled one: guided by text {text:.2f} times, by text and skip-layer {both:.2f} times"


def drawn_guidance() -> list[str]:
    """The table of drawn guidance scales."""
    file = RESULTS / "strengths.json"
    if not file.is_file():
        return ["One model for drawn guidance scales: not measured."]
    kept = json.loads(file.read_text(encoding="utf-8"))
    names = {"guided": "the model itself, guided", "drawn": "one pass, told its guidance (drawn from 1 to 5)", "fixed": "one pass, distilled at 3"}
    asked = list(kept["guided"])
    lines = [f"| | {' | '.join(f'right at {w} | distance at {w}' for w in asked)} |", "|---" * (2 * len(asked) + 1) + "|"]
    for name, what in names.items():
        cells = [f"{kept[name][w][key]:.3f}" for w in asked for key in ("right", "distance")]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return [
        f"Guidance distilled over drawn guidance scales, {DISTILL_UPDATES} updates, one seed (`python benchmarks/apo_bundled.py --drawn-guidance`): share "
        "right by the held-out classifier, and root mean square of the difference in pixels to the guided model at the same scale.",
        "",
        *lines,
    ]


CLAIMS: list[Claim] = [
    ("Online, half-online and offline stages each win against the start", wins),
    ("Diffusion-APO wins more than Diffusion-DPO at equal gradient evaluations (Table 1)", more_than_dpo),
    ("Random shift and offset help (Section 4.2)", lambda: near_the_trajectory("offline")),
    ("They help after guidance distillation (Section 4.2)", lambda: near_the_trajectory("distill-guidance")),
    ("A window of both regimes is better than high or low levels alone", regimes),
    ("The window steadies the loss", steadier),
    ("Guidance distillation costs a little, and preferences afterwards more than recover it", drop),
    ("What preferences win outlasts the distillation of guidance", survives),
    ("A longer distillation loses less (our question)", longer),
    ("One pass instead of three: 3 times quicker", quicker),
]


IMAGE_TO_VIDEO: list[Claim] = [
    ("Online, half-online and offline stages each win against the start", lambda: wins("i2v-")),
    ("Diffusion-APO wins more than Diffusion-DPO at equal gradient evaluations", lambda: more_than_dpo("i2v-")),
    ("Guidance distillation costs a little, and preferences afterwards more than recover it", lambda: drop("i2v-")),
]


# written after looking at the tables
FOUND = (
    "Found. Labelled pairs lift the model at whatever levels they are compared, high ones alone the least; the window is no steadier than five levels "
    "of all, and a shift and an offset make no difference to a sampler of ten steps, before or after the guidance is distilled. Distilling it costs "
    "more win rate than preferences had brought: one pass is not quite what guidance made of two, and the last stage recovers a little of that. But it "
    "does not undo what they brought: the same distillation of a model without preferences ends below it by no less than preferences had lifted it. A "
    "student that is told scales from 1 to 5 loses nothing by it at 3, and follows the guided model at both ends. From a first frame, where the "
    "start has every sample right, there is nothing to win: preferences move the win rate by less than two standard errors, and the distillation of "
    "guidance costs as above."
)


def cells() -> list[str]:
    lines = ["| | seeds | win rate | right | win rate, guidance distilled | right, guidance distilled | change | loss jump |", "|---" * 8 + "|"]
    for name, cell in CELLS.items():
        if name.endswith("sequence") or name.startswith("i2v") or not list(RESULTS.glob(f"{name}-[0-9].json")):
            continue
        kept, values = records(name), []
        for stage in ("offline", "distill-guidance"):
            seen = [record["after"].get(stage) for record in kept]
            values += [with_error(win(name, stage)), f"{mean(s['right'] for s in seen):.3f}"] if all(seen) else ["-", "-"]
        first = [next(metrics for stage, metrics in record["after"].items() if stage != "start")["change"] for record in kept]
        jump = mean(record["loss_jump"] for record in kept)
        lines.append(f"| {cell.what} (`{name}`) | {len(kept)} | {' | '.join(values)} | {mean(first):.3f} | {f'{jump:.4f}' if jump else '-'} |")
    return lines


SAID = {"score": "log p", "right": "right", "motion": "motion", "first_frame": "first frame to the given one"}


def sequence(name: str) -> list[str]:
    kept = records(name)
    keys = [key for key in SAID if key in kept[0]["after"]["start"]]
    lines = [f"| after stage | seeds | win rate | {' | '.join(SAID[key] for key in keys)} |", "|---" * (3 + len(keys)) + "|"]
    for stage in kept[0]["after"]:
        seen = [record["after"][stage] for record in kept]
        others = " | ".join(f"{mean(s[key] for s in seen):.3f}" for key in keys)
        lines.append(f"| {STAGES[stage]} | {len(kept)} | {with_error(win(name, stage))} | {others} |")
    return lines


def image_to_video() -> list[str]:
    """The subsection on the image-to-video model."""
    if not list(RESULTS.glob("i2v-sequence-*.json")):
        return ["From a first frame (`moving-digits-i2v`): not measured."]
    return [
        "From a first frame, the paper's setting: the same on `moving-digits-i2v` (cells `i2v-...`), each prompt with a first frame of the reference split. "
        f"The start has {records('i2v-sequence')[0]['after']['start']['right']:.3f} of these samples right, so only the win rate, by log p, can say anything.",
        "",
        *claims_table(IMAGE_TO_VIDEO),
        "",
        *sequence("i2v-sequence"),
    ]


def lines() -> list[str]:
    """The section."""
    try:
        five = ["The five stages in sequence, the recipe's defaults:", "", *sequence("sequence")]
    except KeyError:
        five = ["The five stages in sequence: not measured."]
    return [
        "### On the bundled model",
        "",
        "**Measured without much room**: at guidance 3 the many-step model already follows most of its prompts ([Embedded default](#embedded-default)).",
        "",
        f"`python benchmarks/apo_bundled.py`, then with `--speed`: the held-out classifier on every second prompt of training, {COPIES} noises each, the same "
        f"for all models. Cells are the offline stage alone, {UPDATES} updates of five levels, or {5 * UPDATES} of one (DPO), sampled in 10 steps with "
        "guidance 3; some are then distilled and sampled without. Win rate against the model before: share of the same noises that score higher, .5 is no "
        "change. ± is one standard error over prompts, not divided by the number of seeds, which share them. Change: root mean square of the difference "
        "in pixels to the model before. Loss jump: its deviation from one update to the next.",
        "",
        *claims_table(CLAIMS),
        "",
        FOUND,
        "",
        *cells(),
        "",
        *five,
        "",
        *drawn_guidance(),
        "",
        *image_to_video(),
        "",
    ]
