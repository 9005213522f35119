"""A folder of its own for each fault, and the ways in which one is tried: a command line, a call, a program."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from instep.cli.main import main

KINDS = {
    1: "Refused after the work instead of before it",
    2: "Success reported over wrong results",
    3: "The identity of a run",
    4: "Options that mean nothing",
    5: "Other people's files",
    6: "A user's files overwritten",
    7: "A reward that fails in the middle",
    8: "Tracebacks",
    9: "Unbounded use of memory, disk or time",
}


@dataclass(frozen=True)
class Outcome:
    """What happened: whether it is what must happen, in words, and the seconds it took."""

    good: bool
    happened: str
    seconds: float


@dataclass(frozen=True)
class Fault:
    """One row: its kind, what is done, what must happen, and the function that does it in an empty working folder."""

    kind: int
    what: str
    must: str
    try_it: Callable[[Path], Outcome]
    slow: bool = False

    @property
    def id(self) -> str:
        return f"{self.kind}-{re.sub(r'[^a-z0-9]+', '-', self.what.lower()).strip('-')[:60]}"


def tried(fault: Fault, folder: Path) -> Outcome:
    """Tries a fault with `folder` as the working folder."""
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        return fault.try_it(folder)
    except Exception as error:
        return Outcome(False, f"unexpected {type(error).__name__}: {_short(str(error), folder)}", 0.0)
    finally:
        os.chdir(before)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, with the digest of its content (of large ones its size)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            big = path.stat().st_size > 10_000_000
            found[str(path.relative_to(folder))] = str(path.stat().st_size) if big else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def command(line: list[str], pattern: str, folder: Path, *, status: int = 2, writes: tuple[str, ...] = ()) -> Outcome:
    """Runs `instep LINE` in this process. Good: the status, one line on stderr that `pattern` is found in, and every file unchanged except `writes`."""
    before, err, out = tree(folder), io.StringIO(), io.StringIO()
    start = time.perf_counter()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            got = main(line)
    except SystemExit as stop:
        got = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        return Outcome(False, f"{type(error).__name__} came through: {_short(str(error), folder)}", time.perf_counter() - start)
    seconds, text = time.perf_counter() - start, err.getvalue().strip()
    after = tree(folder)
    changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name) and not name.startswith(writes or ("\0",))]
    good = got == status and bool(re.search(pattern, text, re.DOTALL)) and not changed and "Traceback" not in text and text.count("\n") == 0
    return Outcome(good, f"status {got}: {_short(text or out.getvalue(), folder)}" + (f"; changed {', '.join(changed[:4])}" if changed else ""), seconds)


def call(do: Callable[[], object], pattern: str, folder: Path, kind: type[BaseException] = ValueError, *, most: float = 60.0) -> Outcome:
    """Calls a function. Good: it raises `kind`, in one line that `pattern` is found in, within `most` seconds, and every file is unchanged."""
    before, start = tree(folder), time.perf_counter()
    try:
        result = do()
    except BaseException as error:
        seconds, text = time.perf_counter() - start, str(error)
        same = tree(folder) == before
        good = isinstance(error, kind) and bool(re.search(pattern, text, re.DOTALL)) and "\n" not in text and same and seconds < most
        return Outcome(good, f"{type(error).__name__}: {_short(text, folder)}{'' if same else '; files changed'}", seconds)
    return Outcome(False, f"accepted: {_short(repr(result), folder)}", time.perf_counter() - start)


def holds(check: Callable[[], bool], yes: str, no: str) -> Outcome:
    """Good where a check is true; in words, what that means."""
    start = time.perf_counter()
    good = check()
    return Outcome(good, yes if good else no, time.perf_counter() - start)


@contextlib.contextmanager
def swapped(owner: object, name: str, value: object) -> Iterator[None]:
    """`owner.name` is `value` inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _short(text: str, folder: Path, most: int = 170) -> str:
    for place, short in ((str(folder), "."), (sys.executable, "python"), (f"{Path(__file__).parents[2]}/", "")):
        text = text.replace(place, short)
    text = re.sub(r"/\S*/(instep-traceback-\S+?\.txt)", r"\1", " ".join(text.split()))
    return text if len(text) <= most else f"{text[: most - 3]}..."
