"""Tries every fault and writes docs/faults.md: `make faults`. With --fast those that train are left out; with --new those that are on the page
already, whose lines stay as they are."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from faults.all import FAULTS
from faults.sandbox import KINDS, Fault, Outcome, tried
from instep.core.files import write_text

HEAD = """# Faults

`make faults` tries each of these in a folder of its own and writes this page. A command counts as good if it ends with the right status, prints one line that
names what is wrong, and leaves every file as it was; a call, if it raises that line. `tests/test_faults.py` tries the fast ones on every change, and holds that
each kind fails where its guard is taken away.
"""


PAGE = Path(__file__).parents[2] / "docs" / "faults.md"


def main(fast: bool, new: bool) -> int:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    there = rows_in(PAGE.read_text(encoding="utf-8")) if new else {}
    rows: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, fault in enumerate(FAULTS):
            key = f"{fault.kind} {cell(fault.what)}"
            if key in there:
                rows[key] = there[key]
            elif not (fast and fault.slow):
                outcome = tried(fault, Path(folder) / str(i))
                rows[key] = row(fault, outcome)
                print(f"{time.strftime('%H:%M:%S')} {'good' if outcome.good else 'BAD '} {fault.id}: {outcome.happened}", flush=True)
    write_text(PAGE, page(rows))
    return 0 if all(line.endswith("| good |") for line in rows.values()) else 1


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def row(fault: Fault, outcome: Outcome) -> str:
    cells = (fault.what, fault.must, outcome.happened, f"{outcome.seconds:.2f}", "good" if outcome.good else "**bad**")
    return "| " + " | ".join(map(cell, cells)) + " |"


def rows_in(text: str) -> dict[str, str]:
    """The rows of a page by their kind and what is done."""
    found, kind = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            kind = line.removeprefix("## ").partition(".")[0]
        elif line.startswith("| ") and not line.startswith("| fault |"):
            what = line.removeprefix("| ").partition(" | ")[0]  # a bar within it has a backslash before it
            found[f"{kind} {what}"] = line
    return found


def page(rows: Mapping[str, str]) -> str:
    """The table, a section a kind."""
    good = sum(line.endswith("| good |") for line in rows.values())
    left = len(FAULTS) - len(rows)
    rest = f" {left} were left out here (`--fast`)." if left else ""
    lines = [HEAD, f"{len(rows)} faults, {good} good.{rest}", ""]
    for kind, title in KINDS.items():
        lines += [f"## {kind}. {title}", "", "| fault | what must happen | what happened | seconds | verdict |", "|---|---|---|---|---|"]
        lines += [*(line for key, line in rows.items() if key.startswith(f"{kind} ")), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main("--fast" in sys.argv[1:], "--new" in sys.argv[1:]))
