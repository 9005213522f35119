"""Height, width and number of frames of what a model draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class VideoSize:
    """Size of the videos to train on, in pixels and frames; Wan 2.1's own is 480 x 832, 81 frames."""

    height: int = 480
    width: int = 832
    frames: int = 81
