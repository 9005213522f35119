"""Images and videos of any size and frame rate as a model takes them: cropped in the middle, resized and resampled in time while they are read.

A frame is reduced to the model's size as soon as it is known to be needed, so that memory holds two frames of the source at most, whatever its length.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instep.core.size import Size
from instep.data.media import ANIMATED, IMAGES, VIDEOS
from instep.data.real_files import RealFile
from instep.data.video_file import check_pixels, video_frames

# pixels of one frame of a source; one of 144 million takes 1.6 GB while it is decoded, turned and cut out, or 2.6 GB in a video, where the next is there too
MOST_PIXELS = 150_000_000
Shown = Generator[tuple[Callable[[], Any], float], None, None]  # frames, made RGB images when called, and the second at which each ends
ROUNDED = 1e-3  # seconds by which times may be off, which files have in whole milliseconds


def read_clip(path: Path | RealFile, size: Size, fps: float) -> Tensor:
    """The beginning of a file at `fps` frames a second: [3, F, H, W] in [0, 1] of the model's size.

    Aspect is kept: the middle of the frame is cut out in the model's shape, then resized (Lanczos). It is turned as EXIF or the video's header says. A frame
    is what the source shows in the middle of its 1 / fps seconds; one that begins within a millisecond after it counts as shown, because many files have
    their times in whole milliseconds. Where an animation has no durations its frames are taken one by one. Raises ValueError for a file that cannot be read,
    is too large, too short, or an image where the model makes videos.
    """
    file = path if isinstance(path, RealFile) else RealFile(path, "")
    if file.suffix not in (*IMAGES, *VIDEOS):
        raise ValueError(f"real: {file.name} ends in {file.suffix!r}; allowed: {', '.join((*IMAGES, *VIDEOS))}")
    kept: list[Tensor] = []
    try:
        with contextlib.closing(_video(file) if file.suffix in VIDEOS else _images(file, size, fps)) as source:
            for image, end in source:
                due = sum((k + 0.5) / fps < end - ROUNDED for k in range(len(kept), size.frames))
                kept += [_fitted(image(), size)] * due if due else []
                if len(kept) == size.frames:
                    break
    except (OSError, SyntaxError, EOFError, RuntimeError) as error:
        raise ValueError(f"real: {file.name} cannot be read ({type(error).__name__}: {error}); make it again, or take it out") from error
    if len(kept) < size.frames:
        raise ValueError(
            f"real: {file.name} gives {len(kept)} frames at {fps:g} a second and the model takes {size.frames}; take it out, or give another rate or --size"
        )
    return torch.stack(kept).permute(3, 0, 1, 2).float() / 255


def _images(file: RealFile, size: Size, fps: float) -> Shown:
    """Frames of an image or animation; one without a duration stands 1 / fps."""
    import warnings

    from PIL import Image, ImageSequence

    with warnings.catch_warnings():
        # Pillow warns of large images; the bound here is our own
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            source = Image.open(file.path if file.member is None else io.BytesIO(file.member.read(file.path)))
        except Image.DecompressionBombError as error:
            raise ValueError(f"real: {file.name} is too large ({error}); reduce it") from error
    end = 0.0
    with source as image:
        check_pixels(f"real: {file.name}", *image.size, MOST_PIXELS)
        if size.frames > 1 and not (file.suffix in ANIMATED and getattr(image, "is_animated", False)):
            raise ValueError(
                f"real: {file.name} is an image and the model makes videos of {size.frames} frames; take it out, or train at --size HEIGHT WIDTH 1"
            )
        for frame in ImageSequence.Iterator(image):
            frame.load()  # a WebP's duration is known once its frame is decoded
            # one frame is an image whatever its duration says
            seconds = float(frame.info.get("duration") or 0) / 1000 if size.frames > 1 else 0.0
            end += seconds if seconds > 0 else 1 / fps
            yield partial(_upright, frame), end


def _upright(frame: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.exif_transpose(frame).convert("RGB")


def _video(file: RealFile) -> Shown:
    """Frames of a video. The beginning of the next one says when a frame ends, so one is decoded ahead."""
    from PIL import Image

    source: Path | bytes = file.path if file.member is None else file.member.read(file.path)
    with contextlib.closing(video_frames(source, f"real: {file.name}", MOST_PIXELS)) as frames:
        frame = next(frames, None)
        while frame is not None:
            after = next(frames, None)
            yield partial(Image.fromarray, frame.pixels), frame.start + frame.seconds if after is None else after.start
            frame = after


def _fitted(image: Any, size: Size) -> Tensor:
    """The middle of a frame in the model's shape, resized: uint8 [H, W, 3]."""
    import numpy as np
    from PIL import Image

    width, height = image.size
    scale = min(width / size.width, height / size.height)
    across, down = max(1, round(size.width * scale)), max(1, round(size.height * scale))
    left, top = (width - across) // 2, (height - down) // 2
    small = image.crop((left, top, left + across, top + down)).resize((size.width, size.height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small))
