"""Animations without a video codec: tiled videos as animated files, and sprite sheets for the report."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from instep.core.files import write_bytes

FPS = 8
GAP = 2  # pixels between tiles
BACKGROUND = 40  # grey of the gaps
SMALL = 64  # videos up to this size are magnified by whole pixels, and stored without loss
FORMATS = {".webp": "WEBP", ".gif": "GIF", ".png": "PNG"}
SHEET_EDGE, SHEET_FRAMES, SHEET_LIMIT = 192, 24, 16383  # larger videos are reduced for a page; WebP's own limit


def check(videos: Tensor) -> None:
    """ValueError unless `videos` is uint8 [N, F, H, W, 3] with N >= 1."""
    if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[-1] != 3 or not len(videos):
        raise ValueError(f"videos: {videos.dtype} {tuple(videos.shape)} is not allowed; give uint8 [N, F, H, W, 3] with N of 1 or more")


def tile(videos: Tensor, columns: int, scale: int | None = None) -> Tensor:
    """Videos uint8 [N, F, H, W, 3] in a grid, row by row: uint8 [F, H', W', 3].

    `scale` magnifies by whole pixels; by default small videos are shown at about 128 pixels. Missing tiles of the last row stay grey.
    """
    check(videos)
    if columns < 1:
        raise ValueError(f"columns: {columns} is not allowed; use 1 or more")
    n, f, h, w, _ = videos.shape
    scale = scale or (max(1, 128 // h) if h <= SMALL else 1)
    rows = -(-n // columns)
    out = videos.new_full((f, rows * (h * scale + GAP) + GAP, columns * (w * scale + GAP) + GAP, 3), BACKGROUND)
    for i, video in enumerate(videos):
        y, x = GAP + i // columns * (h * scale + GAP), GAP + i % columns * (w * scale + GAP)
        out[:, y : y + h * scale, x : x + w * scale] = video.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return out


def save_animation(path: Path, frames: Tensor, fps: float = FPS) -> None:
    """Frames uint8 [F, H, W, 3] as an endless animation, atomically; .webp and .png keep every pixel, .gif has 256 colours."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"path: {path.name!r} ends in {path.suffix!r}; an animation can be {', '.join(FORMATS)}")
    check(frames[None])
    write_bytes(path, animation(frames, FORMATS[path.suffix.lower()], fps))


def animation(frames: Tensor, format_: str = "WEBP", fps: float = FPS) -> bytes:
    """An endless animation of frames uint8 [F, H, W, 3] in one of Pillow's animated formats."""
    from PIL import Image

    first, *others = [Image.fromarray(frame.numpy()) for frame in frames.cpu()]
    buffer = io.BytesIO()
    extra = {"lossless": True, "quality": 60, "method": 4} if format_ == "WEBP" else {}
    first.save(buffer, format_, save_all=True, append_images=others, duration=round(1000 / fps), loop=0, **extra)
    return buffer.getvalue()


def sprite_sheet(videos: Tensor) -> tuple[str, int]:
    """Videos uint8 [N, F, H, W, 3] as one still WebP, a row a video and a column a frame; returns a data URI and the number of frames.

    A page moves them all by shifting one background image, so they stay in step and can be stopped. Videos larger than 192 pixels or longer
    than 24 frames are reduced first; those up to 64 pixels keep every pixel.
    """
    from PIL import Image

    check(videos)
    n, f, h, w, _ = videos.shape
    if f > SHEET_FRAMES:
        videos = videos[:, torch.linspace(0, f - 1, SHEET_FRAMES).round().long()]
    f = videos.shape[1]
    edge = min(SHEET_EDGE, SHEET_LIMIT // max(n, f))
    if max(h, w) > edge:
        size = (max(1, h * edge // max(h, w)), max(1, w * edge // max(h, w)))
        small = F.interpolate(videos.flatten(0, 1).permute(0, 3, 1, 2).float(), size=size, mode="area")
        videos = small.round().to(torch.uint8).permute(0, 2, 3, 1).reshape(n, f, *size, 3)
    sheet = videos.permute(0, 2, 1, 3, 4).reshape(n * videos.shape[2], f * videos.shape[3], 3)
    buffer = io.BytesIO()
    lossless = max(h, w) <= SMALL
    Image.fromarray(sheet.cpu().numpy()).save(buffer, "WEBP", lossless=lossless, quality=80, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"), f
