"""The content type of a sample's file, and how the page shows it."""

from __future__ import annotations

from dataclasses import dataclass

VIDEOS = {".mp4": "video/mp4", ".webm": "video/webm"}


SHEET_PIXELS = 16_000_000  # of all frames of an animation together: what phones decode in one piece


FRAME_MS = 125  # of samples of a run: 8 frames a second, as in the report


@dataclass(frozen=True)
class Clip:
    """How one sample is shown: `video` as it is; `frames` as one sheet of all frames; `image` as it is, where a sheet would be too large."""

    kind: str
    width: int
    height: int
    durations: tuple[int, ...]  # milliseconds a frame; empty for video
