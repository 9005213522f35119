"""instep: few-step diffusion models, distilled and aligned in one training loop.

The names are listed in `__init__.pyi`, where type checkers and editors find them, and each is imported when it is first used: `import instep` costs next to
nothing. `instep.train` runs a recipe on a model.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any


def _listed() -> dict[str, str]:
    """Return the module of each public name, from the stub."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    return {alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) and node.module for alias in node.names}


_WHERE = _listed()
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'instep' has no attribute {name!r}; its names are listed by dir(instep)")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
