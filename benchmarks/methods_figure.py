"""docs/methods.png and docs/readings.png: what each method, and each reading of DM-Align (Group), gains over the control, against what it keeps of the
control's modes, from what `methods_on.py` measured.

python benchmarks/methods_figure.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from methods_on import ARMS, GROUP
from results_methods import MODES, Cells, Compared, compared_methods, compared_readings, read, reading

DOCS = Path(__file__).parents[1] / "docs"
FLOOR = -0.2  # least gain that is drawn


def main() -> None:
    cells = read()
    methods = [(each, compared_methods(each)) for each in cells]
    draw(DOCS / "methods.png", methods, lambda one: f"{ARMS[one.arm].what} ({len(one.seeds)})", "method (seeds)")
    readings = [(each, compared_readings(each, GROUP)) for each in cells]
    draw(DOCS / "readings.png", readings, lambda one: reading(one.arm).replace("`", ""), ARMS[GROUP].what)


def draw(file: Path, found: Sequence[tuple[Cells, Sequence[Compared]]], label: Callable[[Compared], str], title: str) -> None:
    """Writes a figure with a panel for each world and number of steps that has arms to show."""
    found = [(cells, against) for cells, against in found if against]
    figure, axes = plt.subplots(len(found), 1, figsize=(10, 4 * len(found)), constrained_layout=True, squeeze=False)
    shown = {one.arm for _, against in found for one in against}
    marks = {arm: (f"C{i % 10}", "os^Dv"[i // 10]) for i, arm in enumerate(arm for arm in ARMS if arm in shown)}
    for axis, (cells, against) in zip(axes[:, 0], found, strict=True):
        panel(axis, cells, against, marks, label)
        axis.legend(fontsize=7, title=title, title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=110)
    print(f"wrote {file}")


def panel(axis: plt.Axes, cells: Cells, against: Sequence[Compared], marks: Mapping[str, tuple[str, str]], label: Callable[[Compared], str]) -> None:
    """One world and number of steps; colour and mark of each arm are the same in all. A hollow point has one seed; what collapses is in the legend alone."""
    for one in against:
        colour, mark = marks[one.arm]
        face = colour if len(one.seeds) > 1 else "white"
        below = one.gain.value < FLOOR
        y, name = (math.nan, f"{label(one)}: {one.gain.value:.2f}, below") if below else (one.gain.value, label(one))
        axis.errorbar(one.modes.value, y, one.gain.se, one.modes.se, fmt=mark, color=colour, markerfacecolor=face, capsize=2, label=name)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axvline(MODES, color="black", linewidth=0.8, linestyle="--")
    steps = cells.plan["steps"]
    axis.set(
        title=f"{cells.plan['world']}, {steps} step{'s' * (steps > 1)}",
        xlabel="smallest share of the control's modes",
        ylabel=f"{against[0].column.head}, gain over the control",
    )
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
