"""Writes docs/family.md: AMD's Table 1 from the recipes themselves.

python benchmarks/family.py
"""

from __future__ import annotations

from pathlib import Path

from instep.core.files import write_bytes
from instep.recipes.family import markdown, table

DOC = Path(__file__).parents[1] / "docs" / "family.md"

TEXT = """# The matching family

One operator, one table: AMD (Table 1) reads every DMD-like method as g = H(d_real, d_fake) + λ F_ext, with d = x − x̂₀ the displacement
to a teacher's estimate. The rows below are read off the recipes of this library (`instep/recipes/family.py`, written here by
`python benchmarks/family.py`); a recipe differs from its neighbours in exactly these cells. a is the advantage of a sample in its
group, α = 1 + s a, β = 1 − s a.

{table}
`dmd2` without its discriminator is what DM-Align builds on and every aligned student's control. AMD's table gives DMDR one column; it has
two stages, of which the table prints neither the tilt nor the levels. `naive-adaptive` is the baseline that AMD is set against. How each is read where its
paper leaves something open: [errata.md](errata.md). What each does: [results.md](results.md), and by yourself:
`instep lab dmd2 amd naive-adaptive --reward half`.
"""


def main() -> None:
    write_bytes(DOC, TEXT.format(table=markdown(table())).encode())


if __name__ == "__main__":
    main()
