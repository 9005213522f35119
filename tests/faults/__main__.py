"""Tries every fault and writes docs/faults.md: `make faults`; with --fast without those that train."""

from __future__ import annotations

import os
import sys
import tempfile
import time
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


def main(fast: bool) -> int:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    found: list[tuple[Fault, Outcome]] = []
    with tempfile.TemporaryDirectory() as folder:
        for i, fault in enumerate(fault for fault in FAULTS if not (fast and fault.slow)):
            found.append((fault, tried(fault, Path(folder) / str(i))))
            print(f"{time.strftime('%H:%M:%S')} {'good' if found[-1][1].good else 'BAD '} {fault.id}: {found[-1][1].happened}", flush=True)
    write_text(Path(__file__).parents[2] / "docs" / "faults.md", page(found))
    return 0 if all(outcome.good for _, outcome in found) else 1


def page(found: list[tuple[Fault, Outcome]]) -> str:
    """The table, a section a kind."""
    good = sum(outcome.good for _, outcome in found)
    left = len(FAULTS) - len(found)
    rest = f" {left} slow ones, which train, were left out here (`--fast`)." if left else ""
    lines = [HEAD, f"{len(found)} faults, {good} good.{rest}", ""]
    for kind, title in KINDS.items():
        mine = [(fault, outcome) for fault, outcome in found if fault.kind == kind]
        lines += [f"## {kind}. {title}", "", "| fault | what must happen | what happened | seconds | verdict |", "|---|---|---|---|---|"]
        for fault, outcome in mine:
            cells = (fault.what, fault.must, outcome.happened, f"{outcome.seconds:.2f}", "good" if outcome.good else "**bad**")
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main("--fast" in sys.argv[1:]))
