"""Bytes: how many are free where something will be written, and how many there are in words."""

from __future__ import annotations

import shutil
from pathlib import Path


def free_bytes(path: Path) -> int:
    """Of the disk on which `path` lies, or will lie."""
    return shutil.disk_usage(next(folder for folder in (path, *path.absolute().parents) if folder.exists())).free


def gb(count: float) -> str:
    """Bytes in words: GB of 1e9, smaller ones in MB."""
    if count >= 1e10:
        return f"{count / 1e9:.0f} GB"
    return f"{count / 1e9:.2g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
