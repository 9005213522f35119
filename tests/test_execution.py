"""How a run is executed: device, precision, memory. Whatever is chosen, a run computes the same up to rounding, and what was lent stays as it was."""

from __future__ import annotations

from instep.core.size import Size
from instep.data.prompt import as_prompts
from instep.training.options import RunOptions

SIZE = Size(48, 48, 9)
PROMPTS = as_prompts(["a seven moving left fast", "a digit", "an eight", "a two standing still"])
QUICK = RunOptions(save_every=50, probe_every=50, teacher_samples=4)
