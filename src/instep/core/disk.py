"""Bytes: how many are free where something will be written, and how many there are in words."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
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
