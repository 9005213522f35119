"""The table of the matching family in the docs is what the recipes say of themselves."""

from __future__ import annotations

from pathlib import Path

from instep.methods.recipe import describe
from instep.recipes.family import FAMILY, external, markdown, table

DOC = Path(__file__).parents[1] / "docs" / "family.md"


def test_the_docs_print_the_table_of_the_recipes():
    assert markdown(table()) in DOC.read_text(encoding="utf-8"), "write it anew: python benchmarks/family.py"


def test_rows_are_the_papers():
    by_name = {row[0]: row[1:] for row in table()[1:]}
    assert by_name["dmd2"] == ("d_real - d_fake", "0", "all", "fixed", "denoising")
    assert by_name["amd"] == ("alpha d_ca + beta d_dm", "0", "all", "fixed", "exp(-a) x denoising")
    assert by_name["dmd2 --gan 0.01"][1] == "-grad log D(x_t)" and by_name["magic"][3] == "adapter, annealed to fixed"
    assert by_name["decoupled-dmd"][2] == "DM all, CA above the exit"
    ours = [row[1:] for row in table()[1:] if not row[0].startswith("dmdr")]
    assert len(set(ours)) == len(ours), "no two recipes fill the same cells"
    assert by_name["dmdr, stage tilt"] == ("exp(r/norm) (d_real - d_fake)", "0", "annealed from high noise", "adapter, annealed to fixed", "denoising")
    assert by_name["dmdr, stage joint"] == by_name["refl"], "its second stage is matching with the reward's gradient beside it"


def test_recipes_share_what_the_table_does_not_name():
    """Roles, learning rates, levels and batch are one and the same in every row: only the cells of the table differ."""
    plain = describe(FAMILY["dmd2"])
    for name, recipe in FAMILY.items():
        other = describe(recipe)
        assert other["levels"] == plain["levels"] and other["guidance"] == plain["guidance"]
        assert other["roles"]["student"] == plain["roles"]["student"], name
        assert {k: v for k, v in other["roles"]["fake"].items() if k != "head"} == {k: v for k, v in plain["roles"]["fake"].items() if k != "head"}
        assert other["stages"][-1]["batch"] == plain["stages"][-1]["batch"]


def test_an_unknown_term_goes_by_its_name():
    from instep.methods.align import AlignGroup

    assert external(AlignGroup()) == "group"
