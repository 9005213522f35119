"""DM-Align's Fig. 6: the alignment force beside matching's, decoded."""

from __future__ import annotations

import torch
from every_recipe import PROMPTS, batches_of, family, small, state_of
from report_page import report, words_of
from synthetic_run import write_align_views

from instep.bundled import digits
from instep.recipes.dm_align import dm_align_group, dm_align_pair
from instep.training.align_views import MOST, align_stage, align_views
from instep.training.views import decoded_uint8


def test_both_forces_are_shown_on_the_same_samples_and_nothing_changes():
    fam = family()
    for name, n in (("dm-align-group", 2), ("dm-align-pair", MOST)):
        recipe, source = small(name, batch=2), batches_of(fam)
        state, stage = state_of(recipe, fam), recipe.stages[-1]
        source.next(stage)
        before = state.rng.get_state(), source.state(), state.reward_variance
        shown = align_views(state, stage, fam, source, seed=7)
        again = align_views(state, stage, fam, source, seed=7)
        assert torch.equal(state.rng.get_state(), before[0]) and source.state() == before[1] and state.reward_variance is before[2]
        videos = {key: value for key, value in shown.tensors.items() if value.ndim == 5}
        assert set(videos) == {"generator", "preferred", "align_force", "align_target", "force", "target"}
        assert all(value.shape == (n, 9, 48, 48, 3) and value.dtype == torch.uint8 for value in videos.values()) and len(shown.prompts) == n
        assert all(torch.equal(value, again.tensors[key]) for key, value in shown.tensors.items()), "the same samples every time"
        if name == "dm-align-group":
            first, second = shown.tensors["advantages"].tolist()
            assert first > 0 > second and shown.prompts == (str(PROMPTS[source._orders["prompts"]._order[0]]),) * 2
            assert torch.equal(videos["align_target"][0], videos["generator"][0]), "the better one of the pull is left where it is"
            assert (videos["align_force"][0] - 127 < 2).all() and not torch.equal(videos["align_target"][1], videos["generator"][1])
        else:
            assert "advantages" not in shown.tensors and len(set(shown.prompts)) == len(PROMPTS)


def test_the_direction_is_that_of_the_force_at_the_level_of_matching(monkeypatch):
    """Both forces see one level; what is shown is the decoded sample less the force's own direction."""
    from instep.methods.align import AlignGroup
    from instep.methods.matching import DistributionMatching

    fam, kept = family(), {}
    for kind in (AlignGroup, DistributionMatching):
        real = kind.explain
        monkeypatch.setattr(kind, "explain", lambda self, view, real=real, kind=kind: kept.setdefault(kind, real(self, view)))
    recipe = small("dm-align-group", batch=2)
    shown = align_views(state_of(recipe, fam), recipe.stages[-1], fam, batches_of(fam), seed=7)
    pulled, matched = kept[AlignGroup], kept[DistributionMatching]
    torch.testing.assert_close(pulled.level.cpu(), matched.level.cpu(), rtol=0, atol=0)
    torch.testing.assert_close(pulled.x, matched.x, rtol=0, atol=0)
    for name, target in (("align_target", pulled.x - pulled.direction), ("target", matched.x - matched.direction)):
        expected = decoded_uint8(fam, target)
        assert any(torch.equal(shown.tensors[name], expected[order]) for order in ([0, 1], [1, 0]))


def test_the_stage_that_is_shown_ends_or_begins_there():
    recipe = dm_align_pair(distil=3, iterations=2)
    assert align_stage(recipe, 0) is None and align_stage(recipe, 3).name == "align" and align_stage(recipe, 5).name == "align"
    assert align_stage(dm_align_group(distil=0, iterations=2), 0).name == "align" and align_stage(small("dmd2"), 0) is None


def test_the_report_shows_them_beside_each_other_and_is_silent_without(tmp_path):
    for name in ("with", "without"):
        (tmp_path / name / "views").mkdir(parents=True)
    real = digits.render("reference", [digits.parse("a seven moving left")], 1)
    write_align_views(tmp_path / "with", "a <seven>", real)
    page, text = report(tmp_path, tmp_path / "with")
    said = words_of(text)
    assert "The alignment force beside the matching force" in said and "alignment force" in said and "advantage -1.10" in said and "a <seven>" in said
    assert sum("sheet-align0" in (attributes.get("class") or "") for _, attributes in page.elements) == 6 * 4
    page, text = report(tmp_path, tmp_path / "without")
    assert "alignment force" not in words_of(text)
