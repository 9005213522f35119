"""Media as networks take them, in torch and with a gradient: frames resized with antialiasing, cropped or padded, normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from instep.diffusion.transfer import constants

RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, in processors' files
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preparation:
    """Prepares frames for a network: resized, cropped, normalised.

    `resize`: (height, width), or one number for the shorter side; `longest`: instead, one for the longer side, with black bars to a square. `mode` is
    bilinear or bicubic. Pillow, with which published processors resize, rounds to 8 bits and clips in between; this does not.
    """

    resize: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    mode: str = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    longest: int | None = None

    @classmethod
    def of(cls, settings: dict[str, Any], name: str) -> Preparation:
        """Reads an image processor's settings. Raises ValueError, which begins with `name`, for steps that are not supported here."""
        size, crop, normal = settings.get("size") or {}, settings.get("crop_size") or {}, settings.get("do_normalize")
        resize: Any = size["shortest_edge"] if size.get("shortest_edge") else (size.get("height"), size.get("width"))
        if settings.get("resample", 3) not in RESAMPLE or (settings.get("do_resize") and None in (resize if isinstance(resize, tuple) else ())):
            kind = settings.get("image_processor_type")
            raise ValueError(f"{name} resizes images in a way that is not known ({kind}, {size}); give a model with images of a fixed size")
        return cls(
            resize if settings.get("do_resize") else None,
            (crop["height"], crop["width"]) if settings.get("do_center_crop") else None,
            RESAMPLE[settings.get("resample", 3)],
            tuple(settings["image_mean"]) if normal else (0.0, 0.0, 0.0),
            tuple(settings["image_std"]) if normal else (1.0, 1.0, 1.0),
        )

    def __call__(self, frames: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] to [N, 3, h, w]."""
        height, width = frames.shape[2:]
        if self.longest is not None:
            frames = letterboxed(frames, self.longest, self.mode)
        elif self.resize is not None:
            short = min(height, width)
            to = self.resize if isinstance(self.resize, tuple) else (int(self.resize * height / short), int(self.resize * width / short))
            frames = F.interpolate(frames, to, mode=self.mode, align_corners=False, antialias=True)
        if self.crop is not None:
            top, left = ((have - want) // 2 for have, want in zip(frames.shape[2:], self.crop, strict=True))
            if min(top, left) < 0:
                raise ValueError(f"media: {height} x {width} are too small for a crop of {self.crop[0]} x {self.crop[1]}; give larger ones")
            frames = frames[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        return normalised(frames, self.mean, self.std)


def letterboxed(frames: Tensor, side: int, mode: str) -> Tensor:
    """Frames [N, 3, H, W] with the longer side resized to `side` and black bars at both ends of the shorter one: [N, 3, side, side]."""
    longer = max(frames.shape[2:])
    height, width = (max(1, round(edge * side / longer)) for edge in frames.shape[2:])
    inner = F.interpolate(frames, (height, width), mode=mode, align_corners=False, antialias=True)
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(inner, (left, side - width - left, top, side - height - top))


def normalised(frames: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(frames - mean) / std, channel by channel: frames [N, 3, H, W]."""
    return (frames - constants(mean, frames)[:, None, None]) / constants(std, frames)[:, None, None]


def as_videos(media: Tensor) -> Tensor:
    """Images [B, 3, H, W] or videos [B, 3, F, H, W] as float32 videos [B, 3, F, H, W]; ValueError for other shapes."""
    if media.ndim not in (4, 5) or media.shape[1] != 3:
        raise ValueError(f"media: shape {tuple(media.shape)} is not allowed; give images [B, 3, H, W] or videos [B, 3, F, H, W] in [0, 1]")
    return (media if media.ndim == 5 else media[:, :, None]).float()


def frames_of(media: Tensor) -> Tensor:
    """All frames of images or videos, [B F, 3, H, W] float32, those of a sample next to each other."""
    return as_videos(media).transpose(1, 2).flatten(0, 1)
