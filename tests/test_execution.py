"""How a run is executed: device, precision, memory. Whatever is chosen, a run computes the same up to rounding, and what was lent stays as it was."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from tiny import tiny_cogvideox_pipeline, tiny_sd3_pipeline, tiny_wan22_pipeline, tiny_wan_i2v_pipeline, tiny_wan_pipeline
from torch import Tensor, nn

from instep.core.rows import by_rows, joined, slices
from instep.core.size import Size
from instep.data.prompt import Prompt, as_prompts
from instep.data.samples import PairSamples, RealSamples
from instep.methods.recipe import AdamWConfig
from instep.models.borrow import borrowed, cast, compute_dtype
from instep.models.families import family_of
from instep.recipes import NAMES, find
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.training.batches import BatchSource
from instep.training.build import make_state
from instep.training.execution import Execution
from instep.training.options import RunOptions
from instep.training.run import train
from instep.training.state import TrainedParams
from instep.training.step import iteration

SIZE = Size(48, 48, 9)
PROMPTS = as_prompts(["a seven moving left fast", "a digit", "an eight", "a two standing still"])
QUICK = RunOptions(save_every=50, probe_every=50, teacher_samples=4)
