"""Files that are never half written: a temporary name in the same folder, flushed to disk, then renamed. Rows are appended whole."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instep.core.lock import holding, is_abandoned

if TYPE_CHECKING:  # what only writes text (the human-evaluation page, pairs) starts without torch
    from torch import Tensor

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def no_room(error: BaseException) -> OSError | None:
    """The OSError in an error of a full disk or a limit on sizes; safetensors' own writer has it in words alone. None for other errors."""
    if isinstance(error, OSError):
        return error if error.errno in NO_ROOM else None
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found and int(found[1]) in NO_ROOM else None


def write_error(error: OSError, what: str, intact: str) -> OSError:
    """`error` again in one line: why and what was not written, what is intact, and what to do."""
    reason, fix = error.strerror or str(error), "see to it"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason, fix = "the disk is full", "free some space"
    elif error.errno == errno.EFBIG:
        fix = "raise the limit on the size of files (ulimit -f)"
    return OSError(error.errno, f"{reason}: {what} was not written and {intact}; {fix} and repeat the same command")


def write_bytes(path: Path, data: bytes) -> None:
    """Atomic: after a crash `path` holds either the old content or all of the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise write_error(error, str(path), "what was there before is unchanged") from error


def append_text(path: Path, text: str) -> None:
    """`text` at the end of a file, all of it or, if the disk is full, none. A kill can leave part of it: readers pass over a torn last line."""
    try:
        with open(path, "ab", buffering=0) as file:  # no buffer: what failed must not be written again when the file is closed
            before, left = os.fstat(file.fileno()).st_size, memoryview(text.encode("utf-8"))
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), before)
                raise
    except OSError as error:
        raise write_error(error, f"a row of {path}", "the checkpoints are intact") from error


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, with `metadata` in its header."""
    from safetensors.torch import save

    write_bytes(path, save({key: value.contiguous() for key, value in tensors.items()}, None if metadata is None else dict(metadata)))


def atomic_dir(out: Path, what: str) -> contextlib.AbstractContextManager[Path]:
    """A folder to write into that becomes `out` at the end, or disappears; `what` it is called where the disk is full."""
    return _atomic(out, what, Path.mkdir)


def atomic_file(out: Path, what: str) -> contextlib.AbstractContextManager[Path]:
    """`atomic_dir` of a file that is too large to be in memory at once (`write_bytes`)."""
    return _atomic(out, what, Path.touch)


@contextlib.contextmanager
def _atomic(out: Path, what: str, make: Callable[[Path], None]) -> Iterator[Path]:
    temporary = out.parent / f".{out.name}.writing-{os.getpid()}"
    out.parent.mkdir(parents=True, exist_ok=True)
    recover(out)
    _remove(temporary)
    try:
        make(temporary)
        with holding(temporary):
            yield temporary
            _swap(temporary, out)
    except BaseException as error:
        _remove(temporary)
        if full := no_room(error):
            raise write_error(full, f"the {what} {out}", "what was there before is unchanged") from error
        raise


def recover(out: Path) -> None:
    """Removes what writers of `out` (`atomic_dir`, `atomic_file`) left that were killed, and puts back what one of them had moved aside. What a living process
    writes stays.
    """
    name = glob.escape(out.name)
    for aside in filter(is_abandoned, out.parent.glob(f".{name}.old-*")):
        if out.exists():
            _remove(aside)
        else:
            os.replace(aside, out)
    for torn in filter(is_abandoned, out.parent.glob(f".{name}.writing-*")):
        _remove(torn)


def _swap(temporary: Path, out: Path) -> None:
    """`temporary` in place of `out`; an earlier folder is moved aside first and comes back if the rename fails."""
    if not out.is_dir():
        os.replace(temporary, out)
        return
    aside = out.parent / f".{out.name}.old-{os.getpid()}"
    with holding(out):
        os.replace(out, aside)
        try:
            os.replace(temporary, out)
        except BaseException:
            os.replace(aside, out)
            raise
        shutil.rmtree(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
