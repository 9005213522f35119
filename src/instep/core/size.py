"""Height, width and number of frames of what a model draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Height, width (pixels) and number of frames of a sample; an image has 1 frame. Wan 2.1 samples 480 x 832, 81 frames."""

    height: int = 480
    width: int = 832
    frames: int = 81


def as_size(given: Size | Sequence[int]) -> Size:
    """Return a size as it is, and one of (height, width) or (height, width, frames); ValueError for anything else."""
    if isinstance(given, Size):
        return given
    whole = isinstance(given, Sequence) and not isinstance(given, str) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in given)
    if not whole or len(given) not in (2, 3):
        raise ValueError(f"size: {given!r} is not allowed; it is (height, width, frames) or (height, width), in pixels and frames")
    height, width, frames = (*given, 1)[:3]
    return Size(height, width, frames)
