"""What rank 0 does alone with tensors that are divided among all processes: it announces each step that needs the others, and they take part in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

END = -1


class Led:
    """Numbered steps, which all processes register alike. `active`: this process leads, and the others wait for the number of the next step."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], Any]] = []
        self.active = False
        self.send: Callable[[int], None] = lambda number: None

    def register(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """`step`, which the others take too where one process leads."""
        number = len(self.steps)
        self.steps.append(step)

        def taken() -> Any:
            self.announce(number)
            return step()

        return taken

    def announce(self, number: int) -> None:
        """Has the others take a step, if this process leads."""
        if self.active:
            self.send(number)
