"""safetensors files that are written and read a tensor at a time.

The package's own writer takes all tensors at once, on the CPU, unshared and contiguous, and reports a full disk in words alone. Its own reader maps a whole
file for as long as one tensor of it is alive.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
TYPES = {name: dtype for dtype, name in DTYPES.items()}
# bytes; the bound of the safetensors library itself
LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its dtype and shape, and `make`, which returns it when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, x: Tensor) -> Entry:
        return cls(x.dtype, tuple(x.shape), lambda: x)


def file_parts(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> Iterator[Any]:
    """The bytes of a safetensors file in pieces: the header, then one tensor at a time. At most one tensor is copied at a time.

    Raises ValueError where `make` returns another dtype or shape than its entry has.
    """
    names = in_order({name: entry.dtype for name, entry in entries.items()})
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + entries[name].size
        header[name] = {"dtype": DTYPES[entries[name].dtype], "shape": list(entries[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        x = entries[name].make()
        if x.dtype != entries[name].dtype or tuple(x.shape) != entries[name].shape:
            raise ValueError(f"tensors: {name} is {x.dtype} {tuple(x.shape)}, and its entry has {entries[name].dtype} {entries[name].shape}")
        if x.numel():
            yield x.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def in_order(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """The names of a file's tensors in their order in it: wide types first, so that each starts at a multiple of its element's size."""
    return sorted(dtypes, key=lambda name: (-dtypes[name].itemsize, name))


def write_parts(path: Path, parts: Iterable[Any]) -> None:
    """Writes the parts (bytes) into a new file and flushes them to disk."""
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def dtypes_in(path: Path) -> set[torch.dtype]:
    """The dtypes of a file's tensors, from its header alone."""
    with open(path, "rb") as file:
        return {TYPES[entry["dtype"]] for entry in _header(file).values()}


def check_whole(path: Path) -> None:
    """Raises ValueError unless a file is a safetensors file as long as its header says."""
    with open(path, "rb") as file:
        begin = file.read(8)
        length, there = int.from_bytes(begin, "little"), os.path.getsize(path)
        if begin.startswith(b"version"):
            raise ValueError(f"weights: {path} is a pointer of Git LFS, not the file itself; run git lfs pull in its folder")
        if len(begin) == 8 and length <= there - 8:
            try:
                header = json.loads(file.read(length))
            except ValueError:
                raise ValueError(f"weights: {path} is no safetensors file; copy or download it again") from None
            header.pop("__metadata__", None)
            if there >= 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0):
                return
    raise ValueError(f"weights: {path} ends too early, after {there} bytes; copy or download it again")


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file by name, in their order in it, each in memory of its own on the CPU. Raises ValueError for a file that ends too early."""
    with open(path, "rb") as file:
        header = _header(file)
        begin = file.tell()
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            file.seek(begin + start)
            x = torch.empty(entry["shape"], dtype=TYPES[entry["dtype"]])
            if x.numel() and file.readinto(x.reshape(-1).view(torch.uint8).numpy().data) != end - start:
                raise ValueError(f"weights: {path} ends within {name}; it was not written whole, copy it again")
            yield name, x


def _header(file: BinaryIO) -> dict[str, Any]:
    length = int.from_bytes(file.read(8), "little")
    if length > min(LARGEST_HEADER, os.fstat(file.fileno()).st_size):
        raise ValueError(f"weights: the header of {file.name} claims {length:,} bytes, more than such a file has; it is damaged, copy it again")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"weights: the header of {file.name} is damaged ({' '.join(str(error).split())}); copy the file again") from error
    if not isinstance(header, dict):
        raise ValueError(f"weights: the header of {file.name} is no object; the file is damaged, copy it again")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _is_entry(entry):
            raise ValueError(f"weights: {file.name} describes {name!r} by values that do not fit each other; the file is damaged, copy it again")
    return header


def _is_entry(entry: Any) -> bool:
    """Whether a header's value describes a tensor: a known dtype, a shape, and as many bytes as both take."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or entry["dtype"] not in TYPES:
        return False
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    for value in (shape, offsets):
        if not isinstance(value, list) or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value):
            return False
    return len(offsets) == 2 and offsets[1] - offsets[0] == prod(shape) * TYPES[entry["dtype"]].itemsize
