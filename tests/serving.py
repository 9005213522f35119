"""Servers that tests ask: a fixture's body."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def served(server: Callable[[Any], Any]) -> Iterator[Callable[[Any], Any]]:
    """What starts servers of a kind, each with its own answer; all are closed at the end."""
    started: list[Any] = []

    def start(answer: Any) -> Any:
        started.append(server(answer))
        return started[-1]

    yield start
    for each in started:
        each.close()
