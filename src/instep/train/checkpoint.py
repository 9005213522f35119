"""Checkpoints: tensors in one safetensors file, everything else in JSON, a folder that appears whole or not at all.

A checkpoint is written beside its final name, flushed to disk, and renamed; a run killed at any moment finds the one before it. Nothing
is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]  # nested dicts of tensors and JSON values
_SEPARATOR = "\x1f"


def save(folder: Path, step: int, state: State, *, keep: int, protect: Collection[int] = ()) -> Path:
    """Writes `folder/step-NNNNNN`, then removes all but the newest `keep` and the steps in `protect`.

    OSError if the disk is full; what was there stays.
    """
    final, temporary = folder / f"step-{step:06d}", folder / f".step-{step:06d}.{os.getpid()}.tmp"
    tensors: dict[str, Tensor] = {}
    values = _split(state, tensors, ())
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.glob(".step-*"):
        shutil.rmtree(torn, ignore_errors=True)
    try:
        temporary.mkdir()
        digest = _write_tensors(temporary / "tensors.safetensors", tensors)
        _write(temporary / "state.json", json.dumps({"step": step, "sha256": digest, "values": values}).encode())
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _flush_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: checkpoint {final} was not written and the ones before it are intact; free some space and repeat the same command",
            ) from error
        raise
    for old in _complete(folder)[keep:]:
        if step_of(old) not in protect:
            shutil.rmtree(old)
    return final


def latest(folder: Path) -> Path | None:
    """The newest checkpoint whose files are whole; a torn one is passed over."""
    return next((path for path in _complete(folder) if _whole(path)), None)


def at(folder: Path, step: int) -> Path | None:
    """The checkpoint of exactly `step`, if it is there and whole."""
    return next((path for path in _complete(folder) if step_of(path) == step and _whole(path)), None)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load(path: Path) -> State:
    """The state that was saved, bit for bit."""
    from safetensors.torch import load_file

    record = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return _join(record["values"], load_file(path / "tensors.safetensors"), ())


def _complete(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((path for path in folder.glob("step-*") if (path / "state.json").is_file()), reverse=True)


def _whole(path: Path) -> bool:
    try:
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
        with open(path / "tensors.safetensors", "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]
    except (OSError, ValueError, KeyError):
        return False


def _split(value: Any, tensors: dict[str, Tensor], at: tuple[str, ...]) -> Any:
    """JSON skeleton of a nested state; tensors move to `tensors` under their joined keys."""
    if isinstance(value, Tensor):
        name = _SEPARATOR.join(at)
        # a copy: safetensors refuses tensors that share memory
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"__tensor__": True}
    if isinstance(value, Mapping):
        return {str(k): _split(v, tensors, (*at, str(k))) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_split(v, tensors, (*at, str(i))) for i, v in enumerate(value)]
    return value


def _join(value: Any, tensors: Mapping[str, Tensor], at: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        if value == {"__tensor__": True}:
            return tensors[_SEPARATOR.join(at)]
        return {k: _join(v, tensors, (*at, k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_join(v, tensors, (*at, str(i))) for i, v in enumerate(value)]
    return value


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    from safetensors.torch import save as to_bytes

    data = to_bytes(dict(tensors))
    _write(path, data)
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def optimizer_state(optimizer: torch.optim.Optimizer) -> State:
    """Everything a torch optimiser needs to go on: per-parameter tensors and each group's numbers."""
    state = optimizer.state_dict()
    groups = [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]
    return {"state": {str(k): v for k, v in state["state"].items()}, "groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: State) -> None:
    """The inverse of `optimizer_state`, for an optimiser over the same parameters in the same order."""
    whole = optimizer.state_dict()
    groups = [{**old, **new} for old, new in zip(whole["param_groups"], saved["groups"], strict=True)]
    state = {int(k): dict(v) for k, v in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": [_tuples(group) for group in groups]})


def _tuples(group: dict[str, Any]) -> dict[str, Any]:
    """JSON turns tuples into lists; betas are a tuple."""
    return {k: tuple(v) if k == "betas" else v for k, v in group.items()}


def rng_state(generator: torch.Generator) -> State:
    """The run's generator and the global ones that a reward function may use."""
    import numpy as np

    name, keys, *rest = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "run": generator.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "numpy": {"name": name, "keys": torch.from_numpy(keys.astype("int64")), "rest": rest},
        "python": [version, list(internal), gauss],
    }


def restore_rng(generator: torch.Generator, saved: State) -> None:
    """The inverse of `rng_state`."""
    import numpy as np

    generator.set_state(saved["run"])
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["cuda"])
    numpy = saved["numpy"]
    np.random.set_state((numpy["name"], numpy["keys"].numpy().astype("uint32"), *numpy["rest"]))
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
