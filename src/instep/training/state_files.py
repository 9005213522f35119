"""A nested state as one JSON skeleton and one safetensors file, written a tensor at a time. Tensors in shards are whole in the file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instep.core.shards import is_shared, local, whole
from instep.core.tensor_file import DTYPES, Entry, file_parts, in_order

State = dict[str, Any]  # nested dicts (string keys), lists and tuples of tensors and JSON values

_TENSOR, _TUPLE = "__tensor__", "__tuple__"
_SEPARATOR = "\x1f"  # between the keys of a tensor's name: module names hold dots and slashes


def split(state: State) -> tuple[Any, dict[str, Tensor]]:
    """The JSON skeleton of a nested state, and its tensors by name. A tensor that is met again is stored once.

    ValueError names the place of anything that is neither a tensor nor a JSON value.
    """
    tensors: dict[str, Tensor] = {}
    met: dict[tuple[Any, ...], str] = {}

    def walk(value: Any, at: tuple[str, ...]) -> Any:
        if isinstance(value, Tensor):
            return {_TENSOR: _add(value.detach(), _SEPARATOR.join(at), tensors, met)}
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str) or _SEPARATOR in key or key in (_TENSOR, _TUPLE):
                    raise ValueError(f"state: key {key!r} at {_place(at)} is not allowed; use a plain string")
            return {k: walk(v, (*at, k)) for k, v in value.items()}
        if isinstance(value, list | tuple):
            items = [walk(v, (*at, str(i))) for i, v in enumerate(value)]
            return {_TUPLE: items} if isinstance(value, tuple) else items
        # bool is an int; exact types, because a subclass (numpy's float64, an enum) would come back as something else
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise ValueError(f"state: {_place(at)} is a {type(value).__name__}; allowed are tensors, dicts, lists, tuples, numbers, strings and None")

    return walk(state, ()), tensors


def join(value: Any, tensors: Mapping[str, Tensor], at: tuple[str, ...] = ()) -> Any:
    """The inverse of `split`."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            name = value[_TENSOR]
            return tensors[_SEPARATOR.join(at) if name is True else name]  # True: as written at first, by place alone
        if value.keys() == {_TUPLE}:
            return tuple(join(value[_TUPLE], tensors, at))
        return {k: join(v, tensors, (*at, k)) for k, v in value.items()}
    if isinstance(value, list):
        return [join(v, tensors, (*at, str(i))) for i, v in enumerate(value)]
    return value


def _add(x: Tensor, name: str, tensors: dict[str, Tensor], met: dict[tuple[Any, ...], str]) -> str:
    if x.dtype not in DTYPES or x.layout != torch.strided:
        raise ValueError(f"state: {_place(tuple(name.split(_SEPARATOR)))} is a {x.layout} tensor of {x.dtype}; store it as dense numbers")
    mine = local(x)
    # an empty tensor, or an empty shard, has no address to be known by
    same = (x.device, mine.data_ptr(), x.dtype, x.shape, x.stride()) if mine.numel() else (name,)
    if same not in met:
        met[same], tensors[name] = name, x
    return met[same]


def _place(at: tuple[str, ...]) -> str:
    return repr("/".join(at)) if at else "the top"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes a safetensors file and flushes it to disk; returns its SHA-256. At most one tensor is copied or whole at a time."""
    return write(path, file_parts({name: Entry(x.dtype, tuple(x.shape), partial(whole, x)) for name, x in tensors.items()}))


def sharded(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors in shards, in the order in which `write_tensors` makes them whole."""
    return in_order({name: x.dtype for name, x in tensors.items() if is_shared(x)})


def write(path: Path, parts: Iterable[Any]) -> str:
    """Writes the parts (bytes) and flushes them to disk; returns the SHA-256 of the whole."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
