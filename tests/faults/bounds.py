"""Kinds 1, 4, 5, 8 and 9: what a student cannot do, levels, two experts, damaged caches, and what a run and its caches may take of the disk."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny import tiny_wan22_pipeline, tiny_wan_pipeline

from faults.files import line, reads, text
from faults.identity import SMALL, family
from faults.runs import environment
from faults.sandbox import Fault, Outcome, call, holds, swapped
from instep.bundled import baselines
from instep.cli.sample_layout import _claim
from instep.core import disk
from instep.core.size import Size
from instep.data import latent_cache
from instep.methods.recipe import Recipe
from instep.models import prompt_cache
from instep.models.dit import DiTFamily
from instep.models.prompt_cache import PromptCache
from instep.models.wan import WanFamily
from instep.models.wan22 import Wan22Family
from instep.planning.plan import Machine, plan
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.recipes.many_step import ManySteps, flow_grpo
from instep.training.checks import shift_note
from instep.training.execution import Execution

INFO = {"base_model": "m", "size": {"height": 16, "width": 16, "frames": 5}, "example_prompt": "a cat"}
# the folder of a student of two steps, of which only the JSON files are there: nothing of it can be loaded
STUDENT = (
    text("student/model_index.json", json.dumps({"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]})),
    text("student/instep_export.json", json.dumps({"levels": [1.0, 0.75], "info": INFO})),
)
SCALED = (STUDENT[0], text("student/instep_export.json", json.dumps({"levels": [1.0, 0.75], "info": INFO, "guidance_scales": [3.0, 0.0]})))
PROMPTS = text("p.txt", "a cat\na dog\n")
EVALUATED = "eval student --prompts p.txt --out e.json --reward compressible"
STEPS = (
    (STUDENT, "sample student --steps 4", "steps: 4 does not fit student; its scheduler is solved for exactly 2"),
    (STUDENT, "sample student --steps 1 --size 16 16 5", "steps: 1 does not fit student"),
    (SCALED, "sample student --guidance 3", "guidance: 3 is not allowed; student has its own in its weights"),
    ((*STUDENT, PROMPTS), f"{EVALUATED} --steps 4", "steps: 4 does not fit student"),
    ((*SCALED, PROMPTS), f"{EVALUATED} --guidance 3", "guidance: 3 is not allowed"),
)


def noted(recipe: Recipe, pattern: str | None, folder: Path) -> Outcome:
    note = shift_note(recipe, family())
    return holds(lambda: note is None if pattern is None else pattern in (note or ""), note or "nothing is said", note or "nothing is said")


def two_experts(folder: Path) -> Outcome:
    """The same plan for a model of one network and for one of two such networks."""
    recipe, size, execution = dmd2(SMALL, iterations=2), Size(48, 48, 9), Execution(device="cpu", dtype="float32")
    one, two = (made.placed("meta") for made in (WanFamily(tiny_wan_pipeline(), size), Wan22Family(tiny_wan22_pipeline(), size)))
    found = [plan(recipe, each, execution, Machine(1e12, 1e12), terms_every=0).stages[0] for each in (one, two)]
    weights = [sum(count for kind, count in each.memory.items() if "activations" not in kind and "samples" not in kind) for each in found]
    return holds(lambda: weights[1] > 1.8 * weights[0], "the memory of both is planned", f"{weights} bytes")


# made, what reads it, the message, what it is
DAMAGED = (
    (
        text("real/latents.json", "{"),
        lambda f: latent_cache._begin(f / "real", {}),
        "real: .*latents.json is damaged .*remove .*real: its",
        "a damaged latents.json of real samples",
    ),
    (
        text("each.json", "[1]"),
        lambda f: _claim(f / "each", {}),
        "each: .*each.json holds a list, not an object",
        "a damaged record of a benchmark's samples",
    ),
    (
        text("m/scheduler/scheduler_config.json", "{"),
        lambda f: DiTFamily.load(f / "m"),
        "model: .*scheduler_config.json is damaged",
        "a damaged scheduler_config.json",
    ),
)


def measured_again(content: str, folder: Path) -> Outcome:
    text("row.json", content)(folder)
    return holds(lambda: baselines._read(folder / "row.json") is None, "it is measured again", "it is read")


def small_disk(folder: Path) -> Outcome:
    with swapped(disk, "free_bytes", lambda path: 10**9):
        return call(
            lambda: disk.check_disk(folder / "run", {"checkpoints": 3 * 10**9, "export": 2 * 10**8}, "run"),
            r"out: 1 GB are free where .*run lies, and this run needs about 3.2 GB \(checkpoints 3 GB, export 200 MB\)",
            folder,
        )


def encoded(count: int, folder: Path, name: str = "texts") -> PromptCache:
    """A cache of as many texts, of 4 kB each, in a folder."""
    cache = PromptCache()
    cache.open(folder / name, "0" * 32)
    cache.fill([f"text {i}" for i in range(count)], lambda one: {"text": torch.zeros(1000)}, lambda: None)
    return cache


def many_texts(folder: Path) -> Outcome:
    (folder / "texts").mkdir()
    with swapped(prompt_cache, "free_bytes", lambda path: 10**6):
        return call(lambda: encoded(1000, folder), r"prompt_cache: 1,000 encoded texts need about 4 MB in .*texts, and 1 MB are free there", folder)


def shared_folder(folder: Path) -> Outcome:
    """Files of three other models, of which the oldest go; a user's own file stays, and so do those of this model."""
    encoded(2, folder)
    names = [f"{digit * 32}-{digit * 32}.safetensors" for digit in "abc"]
    for age, name in enumerate(names):
        text(f"texts/{name}", bytes(10_000))(folder)
        os.utime(folder / "texts" / name, (age, age))
    text("texts/mine.safetensors", bytes(10_000))(folder)
    with swapped(prompt_cache, "DISK_LIMIT", 20_000):
        PromptCache().open(folder / "texts", "0" * 32)
    left = {path.name for path in (folder / "texts").iterdir()}
    good = {names[2], "mine.safetensors"} <= left and not {*names[:2]} & left and len(left) == 3
    return holds(lambda: good, "the oldest files of other models go", f"left: {sorted(left)}")


def memory(folder: Path) -> Outcome:
    cache = PromptCache(limit=100_000)
    for i in range(1000):
        cache.keep(f"text {i}", {"text": torch.zeros(1000)})
    return holds(lambda: cache.nbytes <= 100_000 and len(cache._memory) == 25, "25 texts of 4 kB stay", f"{cache.nbytes} bytes")


def rows(folder: Path) -> Outcome:
    for i in range(12):
        text(f"{i:02d}.json", "{}")(folder)
        os.utime(folder / f"{i:02d}.json", (i, i))
    row = baselines.Row("real", "real", {})
    kept = baselines.Baselines(SimpleNamespace(), SimpleNamespace(complete=lambda row: True), None)  # type: ignore[arg-type]
    vars(kept)["fingerprint"] = "f"
    with swapped(baselines, "KEPT", 5), swapped(baselines, "cache_folder", lambda: folder):
        kept._kept("real", lambda: row)
    names = sorted(path.stem for path in folder.iterdir())
    return holds(lambda: names == ["08", "09", "10", "11", "f-real"], "the newest stay", f"{names}")


def begun(folder: Path, iterations: int) -> tuple[subprocess.Popen[str], list[str]]:
    """`instep train` on the smallest bundled model, in its first iterations, and its command."""
    options = f"--model digits --steps 1 --shift 1 --guidance 1 --batch 4 --iterations {iterations} --out run --threads 1 --no-evaluate"
    words = [sys.executable, "-m", "instep", "train", "dmd2", *options.split()]
    process = subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment())
    until = time.perf_counter() + 600
    while not (folder / "run" / "log.jsonl").is_file() and process.poll() is None and time.perf_counter() < until:
        time.sleep(0.02)
    return process, words


def gone(folder: Path) -> Outcome:
    """The folder of `instep train` is deleted while it runs."""
    start = time.perf_counter()
    process, _ = begun(folder, 5000)
    with contextlib.suppress(OSError):
        (folder / "run").rename(folder / "deleted")  # at once; removing its files takes a while
    shutil.rmtree(folder / "deleted")
    err = process.communicate(timeout=300)[1]
    said = [row for row in io.StringIO(err) if row.startswith("error: ")]
    good = process.returncode == 2 and len(said) == 1 and "was removed or moved while the run was writing to it" in said[0] and "Traceback" not in err
    return Outcome(good and not (folder / "run").exists(), f"status {process.returncode}: {' '.join(err.split())[-160:]}", time.perf_counter() - start)


def interrupted(folder: Path) -> Outcome:
    """SIGTERM, as a scheduler sends it, to `instep train`; then the same command."""
    start, count = time.perf_counter(), 100
    process, words = begun(folder, count)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=300)[1]
    again = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, timeout=600)
    steps = [json.loads(row)["step"] for row in (folder / "run" / "log.jsonl").read_text().splitlines()]
    good = process.returncode == 130 and "saved at step" in err and again.returncode == 0 and steps == [*range(count + 1)]
    return Outcome(good, f"status {process.returncode}, then {again.returncode}; {len(steps)} rows in the log", time.perf_counter() - start)


def scaled(**shared: Any) -> Recipe:
    return dmd2(Common(steps=4, batch=2, **shared), iterations=1)


FAULTS = (
    *(
        Fault(1, f"instep {words} of a student for 2 steps", "refused before anything is loaded", partial(line, make, words, found))
        for make, words, found in STEPS
    ),
    Fault(
        4,
        "shift 1 on a model whose scheduler has 3",
        "named before the run, with both lists of levels",
        partial(noted, scaled(shift=1.0), "(shift 3) visits 1.000, 0.900"),
    ),
    Fault(4, "shift 3 on a model whose scheduler has 3", "nothing is said", partial(noted, scaled(shift=3.0), None)),
    Fault(4, "shift 5, that of the model's published distillation", "nothing is said", partial(noted, scaled(shift=5.0), None)),
    Fault(
        4,
        "shift 1 of a many-step model that is exported with a scheduler of shift 3",
        "named before the run, and what it is sampled at",
        partial(noted, flow_grpo(ManySteps(steps=4, batch=4, shift=1.0), iterations=1, group=2), "its exported pipeline samples at the scheduler's"),
    ),
    Fault(4, "instep plan of a model with two experts", "both are counted", two_experts, slow=True),
    *(Fault(5, what, "the file is named", partial(reads, (make,), do, found)) for make, do, found, what in DAMAGED),
    *(
        Fault(8, f"a kept baseline row holds {content!r}", "it is a cache and made anew", partial(measured_again, content))
        for content in ("", "[1]", '{"name": 1}')
    ),
    Fault(8, "the output folder is deleted in the middle of a run", "status 2, one line, no other folder of that name", gone, slow=True),
    Fault(8, "SIGTERM in the middle of a run", "status 130; the same command goes on", interrupted, slow=True),
    Fault(9, "a disk that has less than a run needs", "refused before the run; what needs how much", small_disk),
    Fault(9, "a disk that has less than the encoded texts need", "refused after the first few", many_texts),
    Fault(9, "a folder of encoded texts beyond its limit", "the oldest of other models go", shared_folder),
    Fault(9, "a thousand encoded texts in memory", "those used last stay", memory),
    Fault(9, "rows of baselines beyond their number", "the newest stay", rows),
)
