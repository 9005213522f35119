"""Preferred samples on their way to DM-Align (Pair): chosen ones alone, several of a prompt."""

from __future__ import annotations

import torch
from every_recipe import small
from test_run import PROMPTS, family

from instep.data.prompt import as_prompts
from instep.data.samples import RealSamples
from instep.recipes.common import Common
from instep.recipes.dm_align import dm_align_pair
from instep.training.batches import BatchSource
from instep.training.checks import check_inputs

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
