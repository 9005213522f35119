"""The command line: one file a command with its arguments, and what they share. It may import every other room."""

from __future__ import annotations

import os


def default_threads() -> int:
    """The default number of threads: $OMP_NUM_THREADS, or all cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def checked_device(name: str) -> str:
    """A device of torch by its name; ValueError unless this machine has it."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {name!r} is not allowed ({str(error).splitlines()[0]}); cpu, or cuda where torch finds a GPU") from None
    return name
