"""What `instep plan` estimates for a case of benchmarks/gpu.py: memory and FLOPs of its iteration, traced on the meta device."""

from __future__ import annotations

import math
from typing import Any

import torch
from gpu_cases import Case
from gpu_family import RandomWan, execution_of, random_pipeline, recipe_of

from instep.planning.plan import Machine, iterations


def planned(case: Case) -> dict[str, Any]:
    """Returns the planner's estimate: {"bytes": peak of the device, "flops": {"model": ..., "hardware": ...}}.

    FLOPs are those of the networks, as the measured rows have them: the decoder is left out.
    """
    recipe = recipe_of(case)
    family = RandomWan(random_pipeline(case.model, torch.device("meta")), case)
    (stage,) = iterations(recipe, family, execution_of(case, torch.device("meta")), Machine(math.inf, 1.0))
    hardware = {key: count for key, count in stage.trace.flops.items() if key[0] in recipe.roles}
    model = sum(count for (_, phase), count in hardware.items() if phase != "recomputation")
    return {"bytes": stage.bytes, "flops": {"model": model, "hardware": sum(hardware.values())}}
