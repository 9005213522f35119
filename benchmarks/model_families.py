"""Writes docs/models.md: the model families, their published settings, and, given results, which tests of tests/test_families.py passed for each.

pytest tests/test_families.py -m "" --junitxml=results.xml
PYTHONPATH=tests python benchmarks/model_families.py results.xml

Several files may be given, of runs of some of the tests each; of a test in several the last one counts.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from family_cases import CASES, family, pipeline_of

from instep.core.files import write_bytes

DOC = Path(__file__).parents[1] / "docs" / "models.md"


@dataclass(frozen=True)
class Column:
    """yes where all of `tests` passed: pairs of a test and, of one that has several for each family, which. shown: the property that the tests recorded for
    this column, which is shown instead; where they passed without recording it, the column does not apply to the family.
    """

    tests: tuple[tuple[str, str], ...]
    shown: str | None = None


LORA = ("test_a_lora_student_is_sampled_by_stock_diffusers", "")
FULL, ADAPTER = (("test_a_student_killed_and_resumed_ends_the_same", prefix) for prefix in ("full-", "LoRA-"))
RANKS = tuple(("test_two_ranks_a_row_at_a_time_train_as_one_process", prefix) for prefix in ("full-", "LoRA-"))
COLUMNS = {
    "teacher": Column((("test_the_guided_teacher_takes_the_stock_pipelines_step", ""),), "difference"),
    "decoding": Column((("test_shapes_features_and_skipped_blocks", ""),)),
    "full": Column((FULL,)),
    "LoRA": Column((LORA,)),
    "bf16": Column((("test_a_group_in_bfloat16_is_computed_a_row_at_a_time", ""),)),
    "group over micro-batches": Column(RANKS),
    "kill and resume": Column((FULL, ADAPTER)),
    "export": Column((LORA,)),
    "stock sampling": Column((LORA, FULL, ADAPTER), "folder"),
    "LoRA file": Column((LORA,), "LoRA"),
    "ComfyUI names": Column((LORA,), "ComfyUI"),
    "two ranks": Column(RANKS),
    "plan": Column((("test_the_commands_take_a_folder", ""),)),
}

TEXT = """# Model families

Each family is one file in `src/instep/models/` behind one protocol ([adding one](how_to/own_family.md)). This page is written by
`python benchmarks/model_families.py` from the families themselves and from results of `tests/test_families.py`. All of it is tested on tiny random pipelines of
diffusers' own classes, in float32 on a CPU unless stated; full-size weights of these models were never run here.

## Published settings

Where recipes begin on a model. Guidance is w of u + w (c − u); a pair is that of two experts.

{settings}
## What is tested for each

{results}A number is the largest difference that the tests found, a dash a test that was not run for this page.

- **teacher**: the guided prediction equals what the stock pipeline gives its scheduler's step, at three levels, without and with a negative prompt, to 1e-5 of
  its largest value, in double precision (Z-Image's pipeline takes float32 alone). FLUX.2-klein and DiT take no negative prompt; two prompts stand for it.
- **decoding**: media are the stock pipeline's; a discriminator reads tokens, blocks can be skipped, planning's conditions have the shapes of prompts'.
- **full**, **LoRA**: full copies and adapters are trained.
- **bf16**: groups of two under a reward, computed in bfloat16, one row at a time with activation checkpointing, and exported.
- **kill and resume**: a run that is killed and resumed ends with the same weights and log, full copies and LoRA.
- **export**, **stock sampling**: stock diffusers draws from a LoRA student's folder what the library draws, to 1e-6 of the largest latent
  (Wan 2.2 T2V to 2e-6). The tests of killed and resumed runs hold their exports, full copies too, to the same.
- **LoRA file**: on the base model, stock diffusers draws with it what it draws from the folder, to 1e-5 of the largest latent. `DiTPipeline` loads no LoRA.
- **ComfyUI names**: each tensor of the LoRA file has a name that ComfyUI's loader knows. The rules were taken from ComfyUI's source (`tests/comfyui_names.py`
  says where each stands); ComfyUI itself was not run. It has no DiT, and of CogVideoX it reads names that stock diffusers does not. A workflow is written for
  Wan text-to-video alone.
- **two ranks**, **group over micro-batches**: two processes share a batch of DM-Align (Group), divide every network between them (`--shard on`), and compute
  one row at a time. After an iteration they have the weights, moments and log of one process that computes all rows in one call, full copies and LoRA, in
  double precision to 1e-9.
- **plan**: `instep plan`, and `instep sample`, on a saved folder.

[SiT](how_to/sit.md) has no stock pipeline; `tests/test_sit.py` holds it against a second implementation of the published network.

LTX-2 and HunyuanVideo 1.5 are not supported. LTX-2 denoises video and sound together, where a family here has one latent tensor. HunyuanVideo 1.5 would be one
more file, whose `stock_sample` sets the pipeline's guider, since its call takes no guidance, and whose condition holds the tokens of two text encoders.
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


@dataclass(frozen=True)
class Outcome:
    passed: bool
    recorded: Mapping[str, str]


def outcomes(files: list[Path]) -> dict[tuple[str, str], Outcome]:
    """(test, parameters) -> whether it passed and what it recorded, of all the files."""
    found = {}
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            if match := re.fullmatch(r"(\w+)\[(.+)\]", case.get("name", "")):
                passed = not any(child.tag in ("failure", "error", "skipped") for child in case)
                found[match[1], match[2]] = Outcome(passed, {entry.get("name", ""): entry.get("value", "") for entry in case.iter("property")})
    return found


def cell(column: Column, case: str, found: Mapping[tuple[str, str], Outcome]) -> str:
    """What a column says of a case."""
    there = [found.get((test, f"{prefix}{case}")) for test, prefix in column.tests]
    if any(one is not None and not one.passed for one in there):
        return "**no**"
    ran = [one for one in there if one is not None]
    if len(ran) < len(there):
        return "-"
    if column.shown is None:
        return "yes"
    values = [one.recorded[column.shown] for one in ran if column.shown in one.recorded]
    return max(values, key=lambda value: 0.0 if value == "yes" else float(value), default="none")


def results_table(found: Mapping[tuple[str, str], Outcome]) -> str:
    """One row a case, one column a property."""
    return table(["family", *COLUMNS], [[name, *(cell(column, name, found) for column in COLUMNS.values())] for name in CASES])


def main() -> None:
    files = [Path(file) for file in sys.argv[1:]]
    results = results_table(outcomes(files)) + "\n" if files else ""
    write_bytes(DOC, TEXT.format(settings=settings_table(), results=results).encode())


if __name__ == "__main__":
    main()
