"""A process that dies at one of its operations on files, inside the test's own process: from then on nothing is written, renamed or removed any more."""

from __future__ import annotations

import builtins
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OPERATIONS = ((os, "replace"), (os, "fsync"), (os, "ftruncate"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"), (shutil, "rmtree"), (shutil, "copy2"))
# where a process that died holds its locks no longer
FREE = (".lock",)


class Died(BaseException):
    """What a process does not live to see; nothing but the test catches it."""


@contextmanager
def death(at: int) -> Iterator[list[int]]:
    """A process that dies at its operation number `at` on files, from 0. The list holds the number of those it did."""
    done = [0]

    def dying(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def operation(*args: Any, **kw: Any) -> Any:
            if name == "open" and not _writes(*args, **kw):
                return real(*args, **kw)
            if isinstance(args[0], str | os.PathLike) and Path(args[0]).name in FREE:
                return real(*args, **kw)
            if done[0] == at and name == "fsync":  # what was written is on its way to the disk
                _halve(args[0])
            if done[0] >= at:
                done[0] = max(done[0], at)
                raise Died(name)
            done[0] += 1
            return real(*args, **kw)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for module, name in OPERATIONS:
            patch.setattr(module, name, dying(getattr(module, name), name))
        patch.setattr(builtins, "open", dying(builtins.open, "open"))
        yield done


_truncate = os.ftruncate


def _halve(handle: int) -> None:
    """Half of a file that was written last: the rest never reached the disk."""
    try:
        _truncate(handle, os.fstat(handle).st_size // 2)
    except OSError:  # a folder
        return


def _writes(file: object, mode: str = "r", *args: Any, **kw: Any) -> bool:
    return any(letter in kw.get("mode", mode) for letter in "wax+")
