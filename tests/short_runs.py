"""Runs of a few steps on the tiny Wan, for tests of how a run computes."""

from __future__ import annotations

import torch
from every_recipe import PROMPTS

from instep.methods.role_config import AdamWConfig
from instep.models.borrow import cast
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.training.execution import Execution
from instep.training.options import RunOptions
from instep.training.run import train

BF16 = torch.bfloat16
QUICK = RunOptions(save_every=50, probe_every=50, teacher_samples=4)
FAST = {"student": AdamWConfig(1e-2), "fake": AdamWConfig(1e-2)}


def in_bfloat16(pipe, vae: torch.dtype = torch.float32):
    """As `from_pretrained(dtype=torch.bfloat16, vae=a VAE in float32)` loads it."""
    cast(pipe.transformer, BF16)
    cast(pipe.text_encoder, BF16)
    cast(pipe.vae, vae)
    return pipe


def run(pipe, out, iterations: int = 2, rank: int | None = None, **options):
    recipe = dmd2(Common(steps=2, batch=4, critic_updates=1, lora_rank=rank, **FAST), iterations=iterations)
    return train(recipe, pipe, out=out, prompts=PROMPTS, options=RunOptions(save_every=50, probe_every=50, execution=Execution(**options)))
