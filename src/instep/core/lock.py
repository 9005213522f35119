"""Locks of the operating system, which the kernel takes back however a process ends: one process a run, and one a file or folder that is being written."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such lock on this platform: nothing is held, and one process a folder is up to the user
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
# what a file system answers that knows no locks (some network mounts): as on a platform without them
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds `folder`, made if it is not there, while the block runs; ValueError names the process that holds it already.

    The lock ends with the process, after a SIGKILL too. Its file is removed at the end, and so is a folder in which nothing was written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file; give a folder")
    made = not folder.exists()
    handle = _take(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / NAME).unlink()  # while it is held: whoever has it open by now finds that it lost its name and asks again
        if handle is not None:
            os.close(handle)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # refuses unless empty


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """Holds a file or folder that is there while the block runs, under its new name too if it is renamed. Where there are no locks, nothing is held."""
    handle = os.open(path, os.O_RDONLY) if fcntl is not None else None
    try:
        if handle is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def is_abandoned(path: Path) -> bool:
    """Whether a file or folder that was made under `holding` is held no more; False where there are no locks."""
    if fcntl is None:
        return False
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # its writer has just finished
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _take(folder: Path) -> int | None:
    """The open and locked file; None where there are no locks."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        try:
            handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # a holder that wrote nothing has just removed the folder
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(handle, folder / NAME):
                _sign(handle)
                return handle
            os.close(handle)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            raise ValueError(
                f"out: {folder} is in use by another run ({holder or 'of a process that has just begun'}); wait for it to end, stop it, or choose another --out"
            ) from None
        except BaseException as error:
            os.close(handle)
            if isinstance(error, OSError) and error.errno in UNKNOWN:
                return None
            raise


def _is_named(handle: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`: the holder before removes it as its last act."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def _sign(handle: int) -> None:
    """Who holds it, for the message of those who come later. On a full disk the lock holds without."""
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
