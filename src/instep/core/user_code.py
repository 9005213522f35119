"""Functions of the user's own, named as `module:function` on the command line and found from the working folder."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_function(name: str, option: str) -> Callable[..., Any]:
    """Import the object that `module:function` names; the working folder is searched first. `option` is what it was given for.

    Raises ValueError, in one line, for another form, a module that cannot be imported, and a name that the module lacks.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{option}: {name!r} is not of the form module:function, for example my_functions:brightness")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        kind = "" if isinstance(error, ImportError | AttributeError | ValueError) else f"{type(error).__name__}: "
        why = " ".join(f"{kind}{error}".split())
        raise ValueError(f"{option}: {name!r} cannot be imported ({why}); the module lies in the working directory or is installed") from error


def source_identity(function: Callable[..., Any]) -> str:
    """Return the qualified name of a function and the SHA-256 (16 digits) of the file it stands in: another file is another function.

    Of a function without a file (typed into an interpreter) the name alone is returned.
    """
    file = _file_of(function)
    # a script that is run is the same one that others import
    module = file.stem if file is not None and function.__module__ == "__main__" else function.__module__
    name = f"{module}:{function.__qualname__}"
    return name if file is None else f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"


def sources_in(value: Any) -> list[str]:
    """Return the `source_identity` of a user's own functions and classes in an object: itself, and what the fields of a dataclass of this package hold."""
    if isinstance(value, tuple | list):
        return [found for part in value for found in sources_in(part)]
    if isinstance(value, functools.partial):
        return sources_in(value.func)
    if inspect.ismethod(value):
        value = value.__func__
    code = value if inspect.isfunction(value) else type(value)
    file = _file_of(code)
    if file is not None and is_users(file):
        return [source_identity(code)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [found for field in dataclasses.fields(value) for found in sources_in(getattr(value, field.name))]
    return []


def is_users(file: Path) -> bool:
    """Whether a file is the user's own: of neither this package, nor an installed one, nor Python itself."""
    place = file.resolve()
    ours = [Path(__file__).parents[1], Path(sysconfig.get_path("stdlib"))]
    return "site-packages" not in place.parts and not any(place.is_relative_to(folder.resolve()) for folder in ours)


def line_of(error: BaseException) -> str:
    """Return ", at file.py, line 7" of the innermost line of the user's own code that an error passed through; empty where there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(Path(frame.filename))]
    return f", at {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def _file_of(code: Callable[..., Any]) -> Path | None:
    """The file that a function or class stands in; None if there is none."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(code))
    except TypeError:  # built in, or made in an interpreter
        return None
    return Path(file) if file is not None and Path(file).is_file() else None
