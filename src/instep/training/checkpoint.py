"""Checkpoints: tensors in one safetensors file, everything else in JSON, in a folder that appears whole or not at all.

A checkpoint is written beside its final name, flushed to disk, and renamed, so a run killed at any moment still has the previous one.
Nothing is ever unpickled. The file does not depend on the number of processes: tensors in shards are whole in it, and each process takes its shards from it.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from instep.core.files import write_error
from instep.core.shards import is_shared, part_of
from instep.training.low_bit import in_8_bit, is_low_bit, moment_of, plain
from instep.training.state_files import State, join, sha256, split, write, write_tensors

__all__ = [
    "State",
    "at",
    "clear",
    "drop_after",
    "every",
    "latest",
    "load",
    "load_optimizer_state",
    "optimizer_state",
    "restore_rng",
    "rng_state",
    "save",
    "step_of",
    "write_state",
]

_NAME = re.compile(r"step-(\d{6,})")
_REPLACED = re.compile(r"\.(step-\d{6,})\.replaced")


def save(folder: Path, step: int, state: State, *, keep: int, protect: Collection[int] = ()) -> Path:
    """Writes `folder/step-NNNNNN`, then removes all but the newest `keep` and the steps in `protect`.

    `state` is nested dicts with string keys, lists and tuples of tensors and JSON values. Raises ValueError if it is not, and OSError
    if it cannot be written, for example on a full disk; earlier checkpoints stay.
    """
    return write_state(folder, step, *split(state), keep=keep, protect=protect)


def write_state(folder: Path, step: int, values: Any, tensors: Mapping[str, Tensor], *, keep: int, protect: Collection[int] = ()) -> Path:
    """`save` of a state that `split` has taken apart."""
    if keep < 1:
        raise ValueError(f"keep: {keep} is not allowed; keep at least 1 checkpoint")
    if step < 0:
        raise ValueError(f"step: {step} is not allowed; steps count from 0")
    final, temporary = folder / f"step-{step:06d}", folder / f".step-{step:06d}.{os.getpid()}.tmp"
    try:
        _make(folder)
        _recover(folder)
        temporary.mkdir()
        digest = write_tensors(temporary / "tensors.safetensors", tensors)
        record = {"step": step, "sha256": digest, "values": values}
        _write(temporary / "state.json", json.dumps(record).encode())
        _flush_folder(temporary)
        if _same(temporary, final):  # the run was stopped right after a checkpoint, which is already there
            shutil.rmtree(temporary)
        else:
            _put(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise write_error(error, f"checkpoint {final}", "the ones before it are intact") from error
        raise
    _prune(folder, step, keep, protect)
    return final


def latest(folder: Path) -> Path | None:
    """Returns the newest intact checkpoint, or None if there is no checkpoint. Damaged ones are skipped with a warning.

    Raises ValueError if there are checkpoints and none is intact: starting anew would overwrite files that may still be of use.
    """
    _recover(folder)
    damaged: dict[str, str] = {}
    for path in every(folder):
        damage = _damage(path)
        if damage is None:
            for name, what in damaged.items():
                warnings.warn(f"checkpoint {folder / name} is damaged ({what}) and is passed over; {path.name} is used", RuntimeWarning, stacklevel=2)
            return path
        damaged[path.name] = damage
    if damaged:
        raise ValueError(
            f"checkpoints: {folder} holds {len(damaged)} and none is whole ({'; '.join(f'{name}: {what}' for name, what in damaged.items())}); to "
            f"train anew remove {folder.parent} or choose another --out"
        )
    return None


def at(folder: Path, step: int) -> Path | None:
    """Returns the checkpoint of exactly `step`, or None if it is missing or damaged (with a warning)."""
    _recover(folder)
    path = next((path for path in every(folder) if step_of(path) == step), None)
    damage = _damage(path) if path is not None else None
    if damage is not None:
        warnings.warn(f"checkpoint {path} is damaged ({damage}) and is passed over", RuntimeWarning, stacklevel=2)
        return None
    return path


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(path.name.removeprefix("step-"))


def load(path: Path) -> State:
    """Loads the saved state, bit for bit, on the CPU. A tensor that was shared by two places is shared again."""
    from safetensors.torch import load_file

    record = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return join(record["values"], load_file(path / "tensors.safetensors"))


def clear(folder: Path) -> None:
    """Removes what writers left that were killed, and puts a checkpoint back that one had moved aside. No other writer may be at work."""
    _recover(folder)
    for torn in folder.glob(".step-*"):
        shutil.rmtree(torn, ignore_errors=True)


def drop_after(folder: Path, step: int) -> None:
    """Removes every checkpoint after `step`, so that a run that went back does not continue from a later one."""
    for path in every(folder):
        if step_of(path) > step:
            _remove(path)


def every(folder: Path) -> list[Path]:
    """Every checkpoint folder, whole or damaged, newest first."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if they are whole."""
    try:
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
        whole = sha256(path / "tensors.safetensors") == record["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if whole else "its tensors do not match their checksum"


def _same(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same state (state.json holds the checksum of the tensors)."""
    there = other / "state.json"
    return there.is_file() and there.read_bytes() == (one / "state.json").read_bytes() and _damage(other) is None


def _put(temporary: Path, final: Path) -> None:
    """Renames into place. An existing checkpoint of the same step is moved aside first; `_recover` restores it if the process dies in between."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        os.replace(final, replaced)
    try:
        os.replace(temporary, final)
    except BaseException:
        if replaced.exists():
            os.replace(replaced, final)
        raise
    _flush_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _recover(folder: Path) -> None:
    """Restores a checkpoint that was moved aside for one that was never completed."""
    for path in list(folder.glob(".step-*.replaced")):
        match = _REPLACED.fullmatch(path.name)
        if match and not (folder / match[1]).exists():
            os.replace(path, folder / match[1])


def _prune(folder: Path, step: int, keep: int, protect: Collection[int]) -> None:
    """Removes old checkpoints and partial ones of a killed run. Checkpoints after `step` are kept and do not count."""
    clear(folder)
    known = [path for path in every(folder) if step_of(path) <= step]
    for old in known[keep:]:
        if step_of(old) not in protect:
            _remove(old)


def _remove(old: Path) -> None:
    # out of sight first: a half-removed folder must not look like a damaged checkpoint
    hidden = old.with_name(f".{old.name}.{os.getpid()}.tmp")
    os.replace(old, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _make(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _flush_folder(folder.parent)


def _write(path: Path, data: bytes) -> None:
    write(path, [data])


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def optimizer_state(optimizer: torch.optim.Optimizer) -> State:
    """Returns the state of a torch optimiser: its tensors for each parameter, and each group's settings."""
    state = optimizer.state_dict()
    groups = [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]
    return {"state": {str(k): {name: plain(v) for name, v in entry.items()} for k, entry in state["state"].items()}, "groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: State) -> None:
    """The inverse of `optimizer_state`, for an optimiser over the same parameters in the same order. Raises ValueError if they differ."""
    whole = optimizer.state_dict()
    if len(whole["param_groups"]) != len(saved["groups"]):
        raise ValueError(
            f"optimizer: the checkpoint holds {len(saved['groups'])} parameter groups and this optimiser has {len(whole['param_groups'])}; "
            "resume with the recipe that wrote it"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    _check_moments(optimizer, parameters, saved["state"])
    state = {int(k): {name: moment_of(name, v) if isinstance(v, dict) else v for name, v in entry.items()} for k, entry in saved["state"].items()}
    for i, entry in state.items():
        if i >= len(parameters) or any(v.ndim and v.shape != parameters[i].shape for v in entry.values() if isinstance(v, Tensor)):
            raise ValueError(f"optimizer: the checkpoint's state of parameter {i} does not fit this optimiser; resume with the recipe that wrote it")
        if is_shared(parameters[i]):
            state[i] = {name: part_of(v, parameters[i]) if isinstance(v, Tensor) and v.ndim else v for name, v in entry.items()}
    groups = [{**old, **_tuples(old, new)} for old, new in zip(whole["param_groups"], saved["groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_moments(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], saved: State) -> None:
    """Raises ValueError if one of the checkpoint and the optimiser has moments in 8 bit and the other has not."""
    known = {int(k): entry for k, entry in saved.items() if int(k) < len(parameters)}
    for i, entry in known.items():
        theirs, ours = isinstance(entry.get("exp_avg"), dict), is_low_bit(optimizer) and in_8_bit(parameters[i])
        if "exp_avg" in entry and theirs != ours:
            words = {True: "8bit", False: "float32"}
            raise ValueError(f"moments: the checkpoint's are in {words[theirs]} and this run's in {words[ours]}; give --moments {words[theirs]}")


def _tuples(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Lists become tuples where this optimiser has tuples (checkpoints of 0.1.0's first days hold lists)."""
    return {k: tuple(v) if isinstance(old.get(k), tuple) else v for k, v in new.items()}


def rng_state(generator: torch.Generator) -> State:
    """Returns the states of the run's generator and of the global ones, which a reward function may use."""
    import numpy as np

    name, keys, *rest = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state(legacy=True))
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
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda"])
    numpy = saved["numpy"]
    np.random.set_state((numpy["name"], numpy["keys"].numpy().astype("uint32"), *numpy["rest"]))
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
