"""Functions of the user's own, named as `module:function` on the command line and found from the working folder."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
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
    name = f"{function.__module__}:{function.__qualname__}"
    file = inspect.getsourcefile(inspect.unwrap(function))
    if file is None or not Path(file).is_file():
        return name
    return f"{name} {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}"
