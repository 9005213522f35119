"""Stock diffusers against our own sampler, on exported students of 1, 2 and 4 steps.

    python benchmarks/export_difference.py

Largest absolute difference of final latents, float32, same noise: of the two samplers on the same weights, and of the exported folder
against the student in memory (the weights here are the bundled teacher's; full copy and LoRA). Writes benchmarks/results/export.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from instep.bundled import MOVING_DIGITS, load
from instep.core.files import write_json
from instep.diffusion.levels import few_step_levels
from instep.diffusion.sampling import Sampling
from instep.methods.role_config import LoRA
from instep.models.backbone import Backbone
from instep.models.role import Role
from instep.training.finish import export_role


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for n in (1, 2, 4):
        for lora in (False, True):
            family = load(MOVING_DIGITS)
            backbone = Backbone(family, family.pretrained if lora else family.new_backbone())
            if lora:
                backbone.add_adapter("student", LoRA(8, 8.0))
                for p in backbone.adapter_parameters("student").values():
                    torch.nn.init.normal_(p, std=0.05)
            role = Role("student", backbone, adapter="student" if lora else None)
            with tempfile.TemporaryDirectory() as folder:
                report = export_role(
                    role,
                    family,
                    Sampling(few_step_levels(n, 3.0)),
                    Path(folder) / "student",
                    recipe="none",
                    seed=0,
                    prompts=1,
                    example="a seven",
                    command="benchmark",
                )
            rows.append(
                {
                    "steps": n,
                    "student": "LoRA" if lora else "full copy",
                    "samplers": report.sampler_difference,
                    "end_to_end": report.student_difference,
                }
            )
            print(rows[-1], flush=True)
    write_json(Path(__file__).parent / "results" / "export.json", rows)


if __name__ == "__main__":
    main()
