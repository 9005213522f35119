"""Bytes: how many are free where something will be written, how many there are in words, and what goes from a folder that has a limit."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path


def free_bytes(path: Path) -> int:
    """Of the disk on which `path` lies, or will lie."""
    return shutil.disk_usage(next(folder for folder in (path, *path.absolute().parents) if folder.exists())).free


def gb(count: float) -> str:
    """Bytes in words: GB of 1e9, smaller ones in MB."""
    if count >= 1e10:
        return f"{count / 1e9:.0f} GB"
    return f"{count / 1e9:.2g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def check_disk(out: Path, needed: Mapping[str, int], what: str) -> None:
    """Raises ValueError if less is free where `out` lies than `what`, a run or an export, `needed`: bytes by what they are."""
    free, total = free_bytes(out), sum(needed.values())
    if free < total:
        parts = ", ".join(f"{part} {gb(count)}" for part, count in needed.items())
        raise ValueError(
            f"out: {gb(free)} are free where {out} lies, and this {what} needs about {gb(total)} ({parts}); free some space or choose another disk"
        )


def make_room(
    files: Iterable[Path], most: int, size: Callable[[os.stat_result], int] = lambda stat: stat.st_size, stays: Callable[[Path], bool] = lambda path: False
) -> None:
    """Removes files, those changed longest ago first, while they have more than `most` bytes (or what `size` has of each); what `stays` is counted alone."""
    found = []
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # another process makes room too
            found.append((path.stat(), path))
    total = sum(size(stat) for stat, _ in found)
    for stat, path in sorted(found, key=lambda one: one[0].st_mtime):
        if total <= most:
            return
        if not stays(path):
            total -= size(stat)
            path.unlink(missing_ok=True)
