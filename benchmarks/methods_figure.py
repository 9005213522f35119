"""docs/methods.png: what each method gains over its control, against what it keeps of the control's modes, from what `methods_on.py` measured.

python benchmarks/methods_figure.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from methods_on import ARMS
from results_methods import MODES, Cells, Compared, compared, read

FIGURE = Path(__file__).parents[1] / "docs" / "methods.png"


def main() -> None:
    found = [(cells, against) for cells in read() if (against := [one for one in compared(cells) if not ARMS[one.arm].reading_of])]
    figure, axes = plt.subplots(1, len(found), figsize=(7.5 * len(found), 5), constrained_layout=True, squeeze=False)
    shown = {one.arm for _, against in found for one in against}
    marks = {arm: (f"C{i % 10}", "os^Dv"[i // 10]) for i, arm in enumerate(arm for arm in ARMS if arm in shown)}
    for axis, (cells, against) in zip(axes[0], found, strict=True):
        panel(axis, cells, against, marks)
    figure.savefig(FIGURE, dpi=110)
    print(f"wrote {FIGURE}")


def panel(axis: plt.Axes, cells: Cells, against: Sequence[Compared], marks: Mapping[str, tuple[str, str]]) -> None:
    """One world and number of steps; colour and mark of each arm are the same in all. A hollow point is of one seed."""
    for one in against:
        colour, mark = marks[one.arm]
        face = colour if len(one.seeds) > 1 else "white"
        label = f"{ARMS[one.arm].what} ({len(one.seeds)})"
        axis.errorbar(one.modes.value, one.gain.value, one.gain.se, one.modes.se, fmt=mark, color=colour, markerfacecolor=face, capsize=2, label=label)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axvline(MODES, color="black", linewidth=0.8, linestyle="--")
    steps = cells.plan["steps"]
    axis.set(
        title=f"{cells.plan['world']}, {steps} step{'s' * (steps > 1)}",
        xlabel="smallest share of the control's modes",
        ylabel=f"{against[0].column.head}, gain over the control",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, title="method (seeds)", title_fontsize=7)


if __name__ == "__main__":
    main()
