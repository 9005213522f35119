"""Writes docs/family.md: AMD's Table 1 from the recipes themselves.

python benchmarks/family.py
"""

from __future__ import annotations

from pathlib import Path

from instep.core.files import write_bytes
from instep.recipes.family import markdown, table

DOC = Path(__file__).parents[1] / "docs" / "family.md"

TEXT = """# The matching family

AMD (Table 1) writes every DMD-like method as one operator, g = H(d_real, d_fake) + λ F_ext, where d = x − x̂₀ is the displacement
to an estimate. `python benchmarks/family.py` reads the rows below from the recipes of this library (`instep/recipes/family.py`). Two recipes
differ exactly where their cells differ. a is the advantage of a sample in its group, α = 1 + s a, β = 1 − s a.

{table}
`dmd2` without its discriminator is the basis of DM-Align and the control of every aligned student. AMD's table has one column for DMDR, which has
two stages; the table prints neither the tilt nor the levels. `naive-adaptive` is AMD's baseline. [errata.md](errata.md) explains how each is read where its
paper leaves something open. [results.md](results.md) shows what each does; to see it yourself, run
`instep lab dmd2 amd naive-adaptive --reward half`.
"""


def main() -> None:
    write_bytes(DOC, TEXT.format(table=markdown(table())).encode())


if __name__ == "__main__":
    main()
