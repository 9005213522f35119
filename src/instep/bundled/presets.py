"""How the bundled models are sampled and what recipes begin from on them. It imports no world, so that `--help` on one loads none."""

from __future__ import annotations

from instep.bundled import MOVING_WORDS
from instep.diffusion.levels import few_step_levels
from instep.models.preset import Distillation, Preset

# what the bundled models are sampled with; the options' own defaults are the settings that distil them
MINIATURE = Preset(source="the bundled models of instep", guidance=3.0, sampler_steps=50, for_recipes=False)
WORD_STEPS = 2  # four naive steps are nearly as good as fifty, so they leave a student little to gain
WORDS = Preset(
    source="docs/moving_words.md",
    guidance=4.0,
    sampler_steps=50,
    # at 4 a student of two steps has fewer motions and looks; 16 samples fit a demo of minutes
    distillation=Distillation("docs/moving_words.md", guidance=3.0, levels=few_step_levels(WORD_STEPS, 3.0), shift=3.0, batch=16),
)


def preset_of(name: str) -> Preset:
    """The preset of a bundled model by its name."""
    return WORDS if name == MOVING_WORDS else MINIATURE
