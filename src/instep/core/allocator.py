"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
import os
import platform

# mallopt's parameters (malloc.h)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# the largest block that glibc may keep: HEAP_MAX_SIZE / 2 of 64-bit systems; larger ones go back to the operating system one by one
BLOCK = 32 * 2**20
# free memory at the end of the heap that is kept
KEPT = 2**31 - 1
# settings of the user's own
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Tells glibc to keep what this process frees, up to 2 GiB and in blocks of up to 32 MiB, for its next allocations; returns whether it did.

    By default it gives large blocks back to the operating system, and gets activations and gradients as new pages in every pass: each page is a fault, and is
    filled with zeros. Another C library, and settings of the user's environment, are left alone.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _SETTINGS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, BLOCK) and mallopt(_M_TRIM_THRESHOLD, KEPT))
