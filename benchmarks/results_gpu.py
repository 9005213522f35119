"""The measured part of docs/gpu.md, from benchmarks/results/gpu.json. No number in it is typed.

make results
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu import RESULT
from gpu_cases import cases, smallest_case

from instep.core.files import write_text

DOCUMENT = Path(__file__).parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- measured: written by make results -->", "<!-- end of what was measured -->"
COLUMNS = (
    "s an iteration",
    "allocated, GB",
    "reserved, GB",
    "host, GB",
    "model PFLOPs",
    "model utilisation",
    "hardware utilisation",
    "planned, GB",
    "planned hardware PFLOPs",
)


def write() -> None:
    """Puts the measured part between its markers. Raises ValueError if the document lacks them."""
    text = DOCUMENT.read_text(encoding="utf-8")
    head, found, rest = text.partition(BEGIN)
    _, ended, tail = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"{DOCUMENT.name}: {BEGIN!r} and {END!r} are not both there; the measured part goes between them")
    write_text(DOCUMENT, "\n".join([head + BEGIN, *lines(), END + tail]))


def lines(result: Path = RESULT) -> list[str]:
    """Returns a section for each card, or that there was none. Rows of a CPU are left out: they show that the program runs, and nothing of a GPU."""
    rows = [row for row in json.loads(result.read_text(encoding="utf-8"))["rows"] if row["card"]] if result.is_file() else []
    cards = dict.fromkeys(row["card"] for row in rows)
    body = [line for card in cards for line in section(card, [row for row in rows if row["card"] == card])]
    return ["", *(body or absent()), *commands(), ""]


def absent() -> list[str]:
    return [
        f"**No GPU was there: none of the {len(cases())} cases was run on one, and there is no figure to show.** On a CPU the test suite runs the",
        f"smallest case with the same program (`{smallest_case().name}`). It also computes an iteration of blocks of full",
        "size as shapes without memory, and counts its FLOPs. These commands, on a machine with a CUDA card, fill the table:",
        "",
    ]


def commands() -> list[str]:
    return [
        "```",
        "python benchmarks/gpu.py --smallest --device cuda    # seconds: does the program run on the card?",
        "python benchmarks/gpu.py --list                      # the cases",
        "python benchmarks/gpu.py                             # all of them; interrupted, the same command goes on",
        "python benchmarks/gpu.py --only '1.3B-*-micro-1-checkpointed' --attention _native_cudnn native",
        "make results                                         # this document",
        "```",
    ]


def section(card: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    dates = sorted({row["date"] for row in rows})
    software = dict.fromkeys(", ".join(f"{name} {number}" for name, number in row["software"].items()) for row in rows)
    counts = dict.fromkeys(f"{row['warmup']} iterations before and {row['repeats']} measured" for row in rows)
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return [
        f"### {card}",
        "",
        f"`python benchmarks/gpu.py`, {when}; {'; '.join(software)}; {'; '.join(counts)}. Seconds are medians, with the fastest and the slowest "
        f"iteration in brackets. {sum(row['outcome'] == 'measured' for row in rows)} of {len(rows)} cases ran to the end.",
        "",
        "| case | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
        *(f"| {row['name']} | " + " | ".join(cells(row)) + " |" for row in rows),
        "",
    ]


def cells(row: Mapping[str, Any]) -> list[str]:
    """A case that ran, or the reason why it did not with the peaks that it came to. What was planned has its error in brackets where it was measured."""
    peak, plan = row["peak"] or {}, row["planned"]
    memory = [gigabytes(peak.get(kind)) for kind in ("allocated", "reserved", "resident")]
    ran = row["outcome"] == "measured"
    estimate = ["-", "-"]
    if plan:
        flops = plan["flops"]["hardware"]
        estimate = [gigabytes(plan["bytes"]) + error(plan["bytes"], peak.get("allocated") if ran else None)]
        estimate += [f"{flops / 1e15:.1f}" + error(flops, row["flops"]["hardware"] if ran else None)]
    if not ran:
        return [why(row), *memory, "-", "-", "-", *estimate]
    seconds, shares = row["seconds"], row["utilisation"]
    used = [f"{shares[kind]:.0%}" if shares else "-" for kind in ("model", "hardware")]
    spread = f"{seconds['median']:.1f} ({seconds['low']:.1f} to {seconds['high']:.1f})"
    return [spread, *memory, f"{row['flops']['model'] / 1e15:.1f}", *used, *estimate]


def error(planned: float, measured: float | None) -> str:
    """How far a plan is above (+) or below (-) what was measured, in brackets; nothing where nothing was."""
    return f" ({planned / measured - 1:+.1%})" if measured else ""


def why(row: Mapping[str, Any]) -> str:
    where = f" ({row['phase']})" if row["phase"] else ""
    return row["outcome"] + where if row["outcome"] == "out of memory" else f"{row['outcome']}{where}: {row['error'].replace('|', '/')}"


def gigabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e9:.1f}"


if __name__ == "__main__":
    write()
    print(f"wrote docs/{DOCUMENT.name}")
