"""Preferred samples on their way to DM-Align (Pair): chosen ones alone, several of a prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from every_recipe import small
from test_run import PROMPTS, family

from instep.cli.train import load_labelled
from instep.data.animation import save_animation
from instep.data.media import read_media
from instep.data.pairs import read_preferred
from instep.data.prompt import as_prompts
from instep.data.samples import RealSamples
from instep.recipes.apo import apo
from instep.recipes.common import Common
from instep.recipes.dm_align import dm_align_pair
from instep.training.batches import BatchSource
from instep.training.checks import check_inputs
from instep.training.run import train

COMMON = Common(batch=4, steps=2, critic_updates=1)


def test_a_batch_brings_several_preferred_samples_of_each_prompt_and_needs_no_rejected_ones(tmp_path) -> None:
    fam, names = family(), (PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0])
    latents = torch.arange(4.0).reshape(4, *(1,) * len(fam.latent_shape)).expand(4, *fam.latent_shape).contiguous()
    real = RealSamples(names, latents)
    recipe = dm_align_pair(COMMON, distil=0, iterations=1, candidates=3)
    check_inputs(recipe, fam, None, real, as_prompts(PROMPTS), export_to=tmp_path / "student")
    batch = BatchSource(fam, PROMPTS, real, 0).next(recipe.stages[0])[0]
    assert batch.preferred is not None and batch.preferred.shape == (4, 3, *fam.latent_shape)
    for prompt, first, several in zip(batch.prompts, batch.real, batch.preferred, strict=True):
        seen = [int(x.flatten()[0]) for x in several]
        assert seen[0] == int(first.flatten()[0]), "the sample that the order drew comes first"
        assert seen == [1, 1, 1] if str(prompt) == PROMPTS[1] else sorted(seen) == [0, 2, 3], "others of its prompt follow; one alone is repeated"
    assert batch.rows(slice(1, 3)).preferred.shape[0] == 2


def test_a_recipe_that_does_not_choose_gets_none() -> None:
    fam = family()
    real = RealSamples((PROMPTS[0],), torch.zeros(1, *fam.latent_shape))
    stage = small("sft-after").stages[-1]
    assert stage.preferred_count == 0
    assert BatchSource(fam, PROMPTS, real, 0).next(stage)[0].preferred is None


def test_a_file_of_preferred_samples_needs_no_rejected_ones(tmp_path) -> None:
    """On the command line: rows with and without a rejected file serve dm-align-pair, and recipes that compare pairs refuse those without."""
    rng = torch.Generator().manual_seed(0)
    for name in "ab":
        save_animation(tmp_path / f"{name}.webp", torch.rand(9, 48, 48, 3, generator=rng).mul(255).round().to(torch.uint8))
    kept = [{"prompt": "a seven", "chosen": "a.webp"}, {"prompt": "a digit", "chosen": "b.webp", "rejected": "a.webp"}, {"prompt": "a two", "chosen": "b.webp"}]
    tie = {"prompt": "an eight", "chosen": "a.webp", "rejected": "b.webp", "tie": True}
    file = written(tmp_path / "mixed.jsonl", [*kept, tie])
    recipe, fam = dm_align_pair(COMMON, distil=0, iterations=1), family()
    real, pairs = load_labelled(file, recipe).encoded(fam)
    assert pairs is None and real is not None and [str(prompt) for prompt in real.prompts] == ["a seven", "a digit", "a two"], "a tie prefers nothing"
    media = [fam.encode_media(read_media(tmp_path / row["chosen"])[None])[0] for row in kept]
    torch.testing.assert_close(real.latents, torch.stack(media))
    check_inputs(recipe, fam, None, real, as_prompts(PROMPTS), export_to=tmp_path / "student")
    run = train(recipe, fam, out=tmp_path / "run", prompts=PROMPTS, real=real)
    assert run.state.step == 1 and "force/pair/norm" in (run.out / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="row 1: rejected: missing; a row has prompt, chosen, rejected"):
        load_labelled(file, apo())
    whole = load_labelled(written(tmp_path / "whole.jsonl", [kept[1]]), apo()).encoded(fam)
    assert whole[0] is None and whole[1] is not None and len(whole[1].rejected) == 1


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "p"}, "row 1: chosen: missing; a row has prompt, chosen, and may have rejected, "),
        ({"prompt": "p", "chosen": "none.webp"}, "row 1: chosen: '.*none.webp' is not allowed; it is a file that exists"),
        ({"prompt": "p", "chosen": "a.webp", "tie": True}, "row 1: tie: True is not allowed; it is left out where there is no rejected sample"),
        ({"prompt": " ", "chosen": "a.webp"}, "row 1: prompt: ' ' is not allowed; it is text that is not empty"),
        ({"prompt": "p", "chosen": "a.webp", "rejcted": "b.webp"}, "row 1: rejcted: 'b.webp' is not allowed; it is no field of that name"),
        ({"prompt": "p", "chosen": "a.webp", "rejected": "b.webp", "tie": True}, "all rows of .* are ties, which carry no preference"),
    ],
)
def test_a_wrong_row_of_preferred_samples_is_named(tmp_path, row, answer) -> None:
    for name in "ab":
        (tmp_path / f"{name}.webp").write_bytes(b"x")
    with pytest.raises(ValueError, match=answer):
        read_preferred(written(tmp_path / "p.jsonl", [row]))


def written(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
