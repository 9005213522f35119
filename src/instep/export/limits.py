"""How far samples of an export may lie from those it stands for, before it is refused. Full copies and LoRA have the same limits."""

from __future__ import annotations

import torch

from instep.core.unusable import Unusable

# All are relative to the largest latent. In float32 the orders of two sums differ: 3e-6 and less is measured over 1 to 4 steps of the bundled and the tests'
# models, and GPU kernels of lower precision are allowed some hundred times that; another level, text or weight differs by more than 1e-2
FLOAT32 = 1e-3
# Rounded weights move a sample by about one rounding (5e-4 in float16, 4e-3 in bfloat16) times the network's sensitivity: 7e-4 and 1.1e-2 at most are
# measured, and some twenty times that are allowed
LIMITS = {torch.float32: FLOAT32, torch.float16: 2e-2, torch.bfloat16: 2e-1}


def check_differences(sampler: float, student: float, largest: float, *, stored: torch.dtype, memory: torch.dtype) -> None:
    """Raises Unusable for differences of final latents that rounding cannot explain.

    sampler: stock diffusers against our sampler on the same weights, both in float32. student: the folder against the student in memory, whose weights were
    rounded from the dtype `memory` to `stored`. largest: the largest absolute latent, to which limits are relative if it is above 1.
    """
    scale = max(1.0, largest)
    allowed = max(LIMITS.get(kind, FLOAT32) for kind in (stored, memory))
    for what, off, limit in (
        ("our sampler on the same weights", sampler, FLOAT32),
        ("the student in memory", student, allowed),
    ):
        if not off <= limit * scale:  # a NaN must not pass
            raise Unusable(
                f"samples: stock diffusers on the exported folder differs from {what} by {off:.2g}, and {limit * scale:.2g} is allowed (largest latent "
                f"{largest:.2g}); nothing was written; with the same weights and another dtype (--dtype float32) it may pass, otherwise report this"
            )
