"""Atomic writing of stages, so that an interrupted run goes on and a reader never sees half a file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch


def begin(out: Path, threads: int, resume: bool = True) -> None:
    """Makes the folder of a training, and without `resume` forgets what an interrupted one left there. ValueError if `threads` is below 1."""
    if threads < 1:
        raise ValueError(f"threads: {threads} is not allowed; use 1 or more, at most the number of cores")
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        shutil.rmtree(out / ".work", ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """JSON beside its name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as f:
        f.write(json.dumps(value, indent=1) + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_folder(path: Path, save: Callable[[Path], None]) -> None:
    """Whatever `save(folder)` writes, beside its name, then swapped for the old folder file by file."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save(temporary)
    path.mkdir(exist_ok=True)
    for file in sorted(temporary.iterdir()):
        os.replace(file, path / file.name)
    temporary.rmdir()


def checksums(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` that the pipeline needs (hidden files and pretrain.json left out)."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "pretrain.json")
    names = ((f.relative_to(folder), f) for f in files)
    return {n.as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for n, f in names if not any(p.startswith(".") for p in n.parts)}


def stage_done(work: Path, name: str, config: Any, seed: int) -> dict[str, Any] | None:
    """What a finished stage noted, or None; a stage with other settings or another seed counts as not done."""
    path = work / f"{name}.json"
    note = json.loads(path.read_text()) if path.exists() else None
    return note if note and note["config"] == json.loads(json.dumps(asdict(config))) and note["seed"] == seed else None
