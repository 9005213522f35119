"""What each command of the command line does."""

from __future__ import annotations

import os


def default_threads() -> int:
    """Threads where none were asked for: $OMP_NUM_THREADS, or every core."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
