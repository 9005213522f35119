"""What a command may write to: one guard for the outputs of all commands, before the work whose result it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path


def check_output(
    field: str,
    path: Path,
    *,
    suffixes: Sequence[str] = (),
    overwrite: bool = False,
    ours: Callable[[Path], bool] | None = None,
    fills: bool = False,
    empty: bool = False,
) -> None:
    """Raises ValueError unless a file (or a new folder) can be written at `path`, an option named `field`. Nothing is made or changed.

    A path that exists is refused unless `ours`, which tells whether instep wrote it (None: nothing there is replaced), and `overwrite`. `fills`: `path` is a
    folder that may be there already, and whose files stay. `empty`: it is a folder that may be there already, if nothing is in it. `suffixes`: the endings
    that the format has; none: any.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{field}: {path} has the ending {path.suffix!r}, which is not allowed; allowed: {', '.join(suffixes)}")
    allowed = path.is_dir() and (fills or (empty and not any(path.iterdir())))
    if (path.exists() or path.is_symlink()) and not allowed:
        if ours is None:
            raise ValueError(f"{field}: {path} exists; choose another name, nothing is overwritten unasked")
        if not ours(path):
            raise ValueError(f"{field}: {path} exists and was not written by instep; choose another name, such a file is never replaced")
        if not overwrite:
            raise ValueError(f"{field}: {path} exists; give --overwrite (in Python overwrite=True), or choose another name")
    check_place(field, path, fills=fills)


def check_place(field: str, path: Path, *, fills: bool = False) -> None:
    """Raises ValueError unless the folder that `path` is made in, or the nearest one above it that is there, can be written to; with `fills` `path` itself."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents)[0 if fills else 1 :] if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is not a folder" if not there.is_dir() else "cannot be written to"
        raise ValueError(f"{field}: {path} cannot be written, because {there} {what}; choose another path")


def begins_with(path: Path, marks: Sequence[bytes], within: int = 4096) -> bool:
    """Whether all `marks` stand in the first `within` bytes of a file."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(within)
    return all(mark in head for mark in marks)
