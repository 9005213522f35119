"""Writes docs/models.md: the model families, their published settings, and, given results, which tests of tests/test_families.py passed for each.

pytest tests/test_families.py --junitxml=results.xml
PYTHONPATH=tests python benchmarks/model_families.py results.xml

Several files may be given, of runs of some of the tests each; of a test in several the last one counts.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from family_cases import CASES, family, pipeline_of

from instep.core.files import write_bytes

DOC = Path(__file__).parents[1] / "docs" / "models.md"

# column -> the test and, of a test that has several for each family, which one
TESTS = {
    "teacher": ("test_the_guided_teacher_takes_the_stock_pipelines_step", ""),
    "decoding": ("test_shapes_features_and_skipped_blocks", ""),
    "LoRA": ("test_a_lora_student_is_sampled_by_stock_diffusers", ""),
    "resume, full": ("test_a_student_killed_and_resumed_ends_the_same", "full-"),
    "resume, LoRA": ("test_a_student_killed_and_resumed_ends_the_same", "LoRA-"),
    "bfloat16 group": ("test_a_group_in_bfloat16_is_computed_a_row_at_a_time", ""),
    "commands": ("test_the_commands_take_a_folder", ""),
}

TEXT = """# Model families

Each family is one file in `src/instep/models/` behind one protocol ([adding one](how_to/own_family.md)). This page is written by
`python benchmarks/model_families.py` from the families themselves and from results of `tests/test_families.py`. All of it is tested on tiny random pipelines of
diffusers' own classes, in float32 on a CPU unless stated; full-size weights of these models were never run here.

## Published settings

Where recipes begin on a model. Guidance is w of u + w (c − u); a pair is that of two experts.

{settings}
## What is tested for each

{results}- **teacher**: the guided prediction equals the stock pipeline's own step at three levels, with and without a negative prompt, to 1e-5 of the largest
  latent; DiT's pipeline takes no negative class, so two classes stand for it.
- **decoding**: media are the stock pipeline's; a discriminator reads tokens, blocks can be skipped, planning's conditions have the shapes of prompts'.
- **LoRA**: a LoRA student is trained and exported; stock diffusers draws from the folder what the library draws, to 1e-6 of the largest latent, and from the
  LoRA file on the base model what it draws from the folder, to 1e-5 (not DiT's, whose pipeline loads no LoRA).
- **resume**: a run that is killed and resumed ends with the same weights and log, with full copies and with LoRA; the exports are held to the same limits.
- **bfloat16 group**: groups of two under a reward, computed in bfloat16, one row at a time with activation checkpointing, and exported.
- **commands**: `instep sample` and `instep plan` on a saved folder.

A dash is a test that was not run for this page.

Not tested: ComfyUI has names and a workflow for Wan text-to-video alone.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def settings_table() -> str:
    """One row a case: its pipeline and preset."""
    rows = []
    for name, case in CASES.items():
        found = family(case)
        preset, published = found.preset, found.preset.distillation
        guidance = f"{preset.guidance:g}" + (f", {preset.guidance_2:g}" if preset.guidance_2 is not None else "")
        rows.append([name, f"`{type(pipeline_of(name)).__name__}`", str(preset.sampler_steps), guidance, preset.source, published.source if published else "-"])
    return table(["family", "pipeline", "steps", "guidance", "sampling from", "few-step distillation from"], rows)


def outcomes(files: list[Path]) -> dict[tuple[str, str], bool]:
    """(test, parameters) -> whether it passed, of all the files."""
    found = {}
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            if match := re.fullmatch(r"(\w+)\[(.+)\]", case.get("name", "")):
                found[match[1], match[2]] = not any(child.tag in ("failure", "error", "skipped") for child in case)
    return found


def results_table(found: dict[tuple[str, str], bool]) -> str:
    """One row a case, one column a test: yes, no, or - where it did not run."""
    says = {True: "yes", False: "**no**", None: "-"}
    rows = [[name, *(says[found.get((test, f"{prefix}{name}"))] for test, prefix in TESTS.values())] for name in CASES]
    return table(["family", *TESTS], rows)


def main() -> None:
    files = [Path(file) for file in sys.argv[1:]]
    results = results_table(outcomes(files)) + "\n" if files else ""
    write_bytes(DOC, TEXT.format(settings=settings_table(), results=results).encode())


if __name__ == "__main__":
    main()
