"""Images and animations: a file's content type, and all of its frames as one sheet, so that a page can show, stop and restart two of them on one clock."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instep.human_eval.clip import FRAME_MS, SHEET_PIXELS, VIDEOS, Clip

# pixels of all frames of one file, 3 bytes each
MOST_PIXELS = 250_000_000


def inspect(path: Path) -> Clip:
    """Returns the content type of `path`; decodes every frame of an image or animation once. Raises ValueError if the file cannot be read."""
    if path.suffix.lower() in VIDEOS:
        with open(path, "rb") as file:
            head = file.read(12)
        if not (head[4:8] == b"ftyp" if path.suffix.lower() == ".mp4" else head[:4] == b"\x1aE\xdf\xa3"):
            raise ValueError(f"samples: {path} does not begin as a {path.suffix[1:]} file does; make it again")
        return Clip("video", 0, 0, ())
    frames, durations = read(path)
    width, height = frames[0].size
    return Clip("frames" if width * height * len(frames) <= SHEET_PIXELS else "image", width, height, tuple(durations))


def read(path: Path) -> tuple[list[Any], list[int]]:
    """The frames of an image or animation as RGB images, and milliseconds each."""
    from PIL import Image, ImageSequence

    try:
        with Image.open(path, formats=("WEBP", "GIF", "PNG")) as image:
            # the header alone is read so far
            if (pixels := image.width * image.height * getattr(image, "n_frames", 1)) > MOST_PIXELS:
                raise ValueError(f"it holds {pixels:,} pixels in all its frames, more than {MOST_PIXELS:,}; reduce or shorten it")
            frames, durations = [], []
            for frame in ImageSequence.Iterator(image):
                frames.append(frame.convert("RGB"))
                durations.append(max(20, round(frame.info.get("duration") or FRAME_MS)))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"samples: {path} cannot be read as an image ({error}); make it again") from error
    return frames, durations


def sheet(path: Path) -> bytes:
    """All frames in rows of `columns(n)`, from the top left, as one still image that keeps every pixel and nothing of the file's metadata."""
    from PIL import Image

    frames, _ = read(path)
    width, height = frames[0].size
    across = columns(len(frames))
    whole = Image.new("RGB", (across * width, -(-len(frames) // across) * height))
    for i, frame in enumerate(frames):
        whole.paste(frame, (i % across * width, i // across * height))
    buffer = io.BytesIO()
    whole.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def columns(frames: int) -> int:
    return math.ceil(math.sqrt(frames))


def webp(frames: Sequence[Any], durations: Sequence[int]) -> bytes:
    """An endless animation that keeps every pixel; frames that are alike and follow each other become one that lasts longer."""
    buffer = io.BytesIO()
    first, *others = frames
    first.save(buffer, "WEBP", save_all=True, append_images=others, duration=list(durations), loop=0, lossless=True, quality=60, method=4)
    return buffer.getvalue()
