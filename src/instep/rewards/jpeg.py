"""How well samples compress as JPEG: a reward without a gradient (DDPO, Section 5.1; DOLLAR, Sections 3.4 and 4.5)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from instep.rewards.samples import eight_bit, evenly_spaced

QUALITY = 95  # DDPO's
KILOBYTE = 1000


@dataclass(frozen=True)
class JPEG:
    """Size of a frame's JPEG file in kilobytes (1000 bytes, header included), at quality 95, negative where `prefer` is "small".

    For a video, the mean over its frames, or over `frames` evenly spaced ones. Prompts are ignored.
    """

    prefer: Literal["small", "large"] = "small"
    frames: int | None = None
    differentiable = False
    space: ClassVar[Literal["pixel", "latent"]] = "pixel"

    def __post_init__(self) -> None:
        if self.prefer not in ("small", "large"):
            raise ValueError(f"prefer: {self.prefer!r} is not allowed; use small (compressible) or large (incompressible)")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames: {self.frames} is not allowed; it is 1 or more, or None for all")

    @property
    def name(self) -> str:
        """compressible or incompressible."""
        return ("compressible" if self.prefer == "small" else "incompressible") + (f", {self.frames} frames" if self.frames else "")

    def score(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] in kilobytes, of media [B, 3, H, W] or [B, 3, F, H, W] in [0, 1]."""
        if self.frames is not None:
            if media.ndim != 5:
                raise ValueError(f"media: shape {tuple(media.shape)} has no frames to take {self.frames} of; leave out frames for images")
            media = media[:, :, evenly_spaced(media.shape[2], self.frames)]
        sizes = [sum(jpeg_bytes(frame) for frame in frames) / len(frames) for frames in eight_bit(media)]
        sign = -1 if self.prefer == "small" else 1
        return torch.tensor(sizes, device=media.device) * (sign / KILOBYTE)


def jpeg_bytes(frame: Tensor) -> int:
    """Size of the JPEG file of a frame uint8 [H, W, 3] as pillow writes it: colour at half resolution, standard Huffman tables."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame.numpy()).save(buffer, "JPEG", quality=QUALITY)
    return buffer.tell()
