"""docs/latent_fit.png: how well latent reward models predict samples they have not learned from, from what `dollar.py --look` kept (DOLLAR Fig. 10).

python benchmarks/latent_figure.py
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from results_dollar import FITTED, looked

FIGURE = Path(__file__).parents[1] / "docs" / "latent_fit.png"


def main() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    titles = {"correlation": "correlation with the reward", "error": "squared error, in variances of the reward"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for i, (name, what) in enumerate(FITTED.items()):
            curves = [seen["latent_reward"] for seen in looked(name) if seen.get("latent_reward")]
            if not curves:
                continue
            steps = [point["step"] for point in curves[0]]
            values = [[point[key] for point in at] for at in zip(*curves, strict=True)]
            middle, seeds = [mean(v) for v in values], len(curves)
            axis.plot(steps, middle, marker="o", markersize=3, color=f"C{i}", label=f"{what} ({seeds} seed{'s' if seeds > 1 else ''})")
            if seeds > 1:
                spread = [stdev(v) for v in values]
                low, high = ([m + s * d for m, d in zip(middle, spread, strict=True)] for s in (-1, 1))
                axis.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="iteration", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(FIGURE, dpi=110)
    print(f"wrote {FIGURE}")


if __name__ == "__main__":
    main()
