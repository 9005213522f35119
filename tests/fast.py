"""Which cases of a long list the fast suite has time for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(fast: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """All cases for `pytest.mark.parametrize`, a value or a tuple of values each; those that are not `fast` are marked `slow`. A fast one that is no case is an
    AssertionError."""
    cases = list(cases)
    assert all(case in cases for case in fast), "no such case"
    return [case if case in fast else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]
