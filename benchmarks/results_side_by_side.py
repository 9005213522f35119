"""The section of docs/results.md on the cost beside a neighbour, from benchmarks/results/side_by_side.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from side_by_side import OURS, RESULT, THEIRS

NAMES = {
    THEIRS: "nvidia-modelopt, fastgen DMD2",
    "reused": "instep, re-used rollouts (the default)",
    "fresh": "instep, fresh rollouts",
    "lora": "instep, LoRA roles, re-used rollouts",
}
# limits that were set before this measurement: the figure of a variant is at most this share of theirs
ASKED = (
    ("reused", "CPU time of a cycle, re-used rollouts", "cpu_ratio", 0.66),
    ("fresh", "CPU time of a cycle, fresh rollouts", "cpu_ratio", 1.0),
    ("lora", "weights and optimiser states, LoRA roles", "memory_ratio", 0.3),
    ("reused", "weights and optimiser states, full copies", "memory_ratio", 1.0),
)


def lines() -> list[str]:
    """Returns the section's lines, or that nothing was measured."""
    head = ["## Cost beside a neighbour", ""]
    if not RESULT.is_file():
        return [*head, "not measured", ""]
    result = json.loads(RESULT.read_text())
    measured = result["measured"]
    return [*head, *intro(result), "", *costs(measured), "", *passes(measured[0]), "", *asked(measured), ""]


def intro(result: Mapping[str, Any]) -> list[str]:
    first = result["measured"][0]
    case, versions = first["case"], first["versions"]
    software = {side: ", ".join(f"{name} {number}" for name, number in versions[side].items()) for side in versions}
    loads = ", then ".join(f"{before:.1f} and {after:.1f}" for before, after in (one["load"] for one in result["measured"]))
    sizes, launches, rounds = (in_turn(result["measured"], name) for name in ("batch", "launches", "rounds"))
    return [
        f"`python benchmarks/side_by_side.py --their-python PATH`, {result['date']}, {result['processor']}, one thread a process. "
        f"Ours: {software[OURS[0]]}. "
        f"Theirs: {software[THEIRS]}. At batches of {sizes} the processes were started anew {launches} times (`--launches`), each time for {rounds} "
        f"interleaved rounds (`--rounds`) of {first['cycles_of_a_round']} cycles. Load average before and after: {loads}.",
        "",
        f"A cycle is one student update and {case['critic_updates']} of the fake, for a student of {len(case['levels'])} steps and a teacher with guidance "
        f"{case['guidance']:g}. Both sides train the same Wan transformer ({case['layers']} blocks of width {case['width']}, random weights, float32) on "
        "the same conditions with the same AdamW and clipping. Roles are full copies without an average, except for LoRA roles (rank "
        f"{case['rank']}). The fake is not conditioned on exits here, because theirs is not. Theirs simulates backward and draws one level for a whole "
        "batch; its draws are balanced, so that both sides roll out equally far. Figures are medians, with the smallest and the largest round in "
        "brackets; shares of theirs are taken round by round. Weights include buffers.",
        "",
        "Conditions are of equal length on both sides, and nothing is padded, so neither side needs an attention mask. A stock Wan condition has 512 tokens, "
        "of which ours keeps the prompt and one padding token; that gain is left out, and so is the mask that it takes, about 2 % of a pass of this network.",
    ]


def in_turn(measured: list[dict[str, Any]], name: str) -> str:
    """Returns one figure of each measured case, or the one that is the same for all."""
    found = [str(one["case"].get(name, one.get(name))) for one in measured]
    return found[0] if len(set(found)) == 1 else " and ".join(found)


def costs(measured: list[dict[str, Any]]) -> list[str]:
    table = [
        "| | batch | CPU s a cycle | share of theirs | weights, MB | optimiser states, MB | share of theirs | fake's loss, first cycles |",
        "|---" * 8 + "|",
    ]
    for one in measured:
        for name in (THEIRS, *OURS):
            row = one["rows"][name]
            sizes = [f"{row['bytes'][key] / 1e6:.1f}" for key in ("weights", "optimizer")]
            share, memory = ("-", "-") if name == THEIRS else (ranged(row["cpu_ratio"]), f"{row['memory_ratio']:.3f}")
            cells = [NAMES[name], str(one["case"]["batch"]), ranged(row["cpu_s"]), share, *sizes, memory, f"{row['first_cycles']['fake_loss']:.3f}"]
            table.append("| " + " | ".join(cells) + " |")
    return table


def ranged(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.3f} ({spread['low']:.3f} to {spread['high']:.3f})"


def passes(one: Mapping[str, Any]) -> list[str]:
    """Where the difference comes from: what goes through each network for one sample of the batch in a cycle."""
    table = [
        "Passes through each network in a cycle, for one sample of the batch, forward / backward, counted by hooks:",
        "",
        "| | student | fake | teacher | forward, all | backward, all | calls |",
        "|---" * 7 + "|",
    ]
    for name in (THEIRS, *OURS[:2]):
        found = one["rows"][name]["passes"]
        cells = [f"{found[role]['forward']:g} / {found[role]['backward']:g}" for role in ("student", "fake", "teacher")]
        sums = [f"{sum(found[role][key] for role in found):g}" for key in ("forward", "backward", "calls")]
        table.append(f"| {NAMES[name]} | " + " | ".join([*cells, *sums]) + " |")
    return [
        *table,
        "",
        "With fresh rollouts both sides make the same passes, in different calls (last column): in ours a sample leaves the batch once the input of its exit "
        "is known, and one call predicts all exits. What a call costs by itself weighs more, the smaller network and batch are.",
    ]


def asked(measured: list[dict[str, Any]]) -> list[str]:
    """Each figure that was asked for, with what was found at every batch size. A figure is held, or missed, if every round says so."""
    batches = [one["case"]["batch"] for one in measured]
    table = ["| asked, as a share of theirs | at most | " + " | ".join(f"found, batch {batch}" for batch in batches) + " |", "|---" * (2 + len(batches)) + "|"]
    for name, what, key, limit in ASKED:
        found = (verdict(one["rows"][name][key], limit) for one in measured)
        table.append(f"| {what} | {limit:g} | " + " | ".join(found) + " |")
    return table


def verdict(value: float | Mapping[str, float], limit: float) -> str:
    """`value` is a number, or a median with its smallest and largest round."""
    spread = value if isinstance(value, Mapping) else {"median": value, "low": value, "high": value}
    word = "held" if spread["high"] <= limit else "missed" if spread["low"] > limit else "rounds on both sides of it"
    return f"{spread['median']:.3f} ({word})"
