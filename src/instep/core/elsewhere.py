"""Errors of a run in several processes, of which one reports them."""

from __future__ import annotations

import os
import time

# seconds: torchrun ends all processes soon after the first that fails, so the one that knows the reason speaks before the others
LATER, LAST = 1.5, 6.0


class Elsewhere(Exception):
    """Rank 0 has raised an error, and reports it."""


class Lost(ConnectionError):
    """Another process of the run has ended or does not answer; the same command goes on from the newest checkpoint."""


def wait_to_speak(error: BaseException) -> None:
    """Waits for this process's turn to report an error: none in rank 0 and in a run of one process; a later one in the others; the last for `Lost`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        rank = int(os.environ.get("RANK", "0"))
        time.sleep((LAST if isinstance(error, Lost) else 0.0) + (LATER + 0.1 * rank if rank else 0.0))
