"""Media files as tensors: images and animations through Pillow, videos where a codec is installed; and slowed copies of videos."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from instep.core.size import Size
from instep.data.prompt import Prompt
from instep.data.samples import PairSamples, RealSamples
from instep.data.video_file import video_frames

IMAGES = (".webp", ".gif", ".png", ".jpg", ".jpeg")
VIDEOS = (".mp4", ".webm", ".mov", ".avi", ".mkv")
# images that may be animations; their encoders keep frames that are alike and follow each other once, for as long as all of them last
ANIMATED = (".webp", ".gif", ".png")
# how far the shape of a file may be from the model's, relative
ASPECT = 0.02


class EncodesMedia(Protocol):
    """An encoder of media of one size into latents; every model family is one."""

    size: Size
    takes_first_frame: bool

    @property
    def device(self) -> torch.device:
        """Where the media go to be encoded."""
        ...

    def encode_media(self, media: Tensor) -> Tensor:
        """Media [B, 3, (F,) H, W] in [0, 1] to latents [B, C, (F,) H, W]."""
        ...


class LabelledSample(Protocol):
    """A media file that people prefer for its prompt. `data.pairs.PreferredSample` is one."""

    @property
    def prompt(self) -> str: ...

    @property
    def chosen(self) -> Path: ...


class LabelledPair(LabelledSample, Protocol):
    """Two media files of one prompt, of which people preferred one; a tie carries no preference. `data.pairs.PreferencePair` is one."""

    @property
    def rejected(self) -> Path: ...

    @property
    def tie(self) -> bool: ...


# pixels of all frames of one image file, 3 bytes each: 81 frames of 1280 x 720 have 75 million
MOST_PIXELS = 250_000_000


def read_media(path: Path, frames: int | None = None, shape: Size | None = None) -> Tensor:
    """All frames of an image, an animation or a video: [3, F, H, W] in [0, 1], turned as EXIF or the video's header says. Raises ValueError, with the fix,
    for a file that cannot be read.

    `frames`, where a model takes so many: frames of an animation that last longer than others are repeated, until there are so many, and an image that
    might be an animation of equal frames is repeated that often. Without it every frame is there once, as it is stored. `shape`: frames are reduced or
    enlarged to that height and width before they are repeated, so that a large image costs its memory once, and no more of a video than `frames` are read.
    All frames together have at most `MOST_PIXELS`.
    """
    suffix = path.suffix.lower()
    if suffix in IMAGES:
        stored, durations = _images(path)
        again = repeats(durations, frames) if frames is not None and suffix in ANIMATED else [1] * len(durations)
        rows = torch.arange(len(stored)).repeat_interleave(torch.tensor(again))
        rows = rows if frames is None else rows[: max(frames, len(stored))]
    elif suffix in VIDEOS:
        stored = _video(path, None if shape is None else frames)
        rows = torch.arange(len(stored))
    else:
        raise ValueError(f"media: {path.name!r} ends in {path.suffix!r}; allowed: {', '.join((*IMAGES, *VIDEOS))}")
    if len(stored) > 1 and shape is None and (pixels := len(rows) * stored[0, ..., 0].numel()) > MOST_PIXELS:
        raise ValueError(f"media: {path} {_too_many(pixels)}")
    # one at a time: what is larger than the model's size becomes float for a moment only
    each = (frame.permute(2, 0, 1)[:, None].float().div_(255) for frame in stored)
    media = torch.cat([one if shape is None else _shaped(one, shape, str(path)) for one in each], 1)
    return media.expand(-1, len(rows), -1, -1) if len(stored) == 1 else media[:, rows]


def _too_many(pixels: int) -> str:
    return f"holds {pixels:,} pixels in all its frames, more than {MOST_PIXELS:,}; reduce or shorten it"


def repeats(durations: Sequence[float], frames: int) -> list[int]:
    """How many frames each stored one stands for, from its duration: in units of the shortest.

    Where these are fewer than `frames`, which happens when every frame was kept once for several, in units that make it `frames` in all, if every duration
    is then close to a whole number of them. Once each where a duration is not known.
    """
    if len(durations) == 1:
        return [max(1, frames)]
    if min(durations) <= 0:
        return [1] * len(durations)
    # more are of no use, and a file may claim any duration
    counts = [min(max(1, frames), round(duration / min(durations))) for duration in durations]
    if sum(counts) < frames:
        parts = [duration * frames / sum(durations) for duration in durations]
        if all(round(part) >= 1 and abs(part - round(part)) < 0.1 for part in parts):
            counts = [round(part) for part in parts]
    return counts


def _images(path: Path) -> tuple[Tensor, list[float]]:
    """Frames uint8 [F, H, W, 3], and the duration of each in milliseconds (0: unknown)."""
    import numpy as np
    from PIL import Image, ImageOps, ImageSequence

    frames, durations = [], []
    try:
        with Image.open(path) as image:
            # the header alone is read so far
            if (pixels := image.width * image.height * getattr(image, "n_frames", 1)) > MOST_PIXELS:
                raise ValueError(f"it {_too_many(pixels)}")
            for frame in ImageSequence.Iterator(image):
                frames.append(torch.from_numpy(np.array(ImageOps.exif_transpose(frame).convert("RGB"))))
                durations.append(float(frame.info.get("duration") or 0))  # a WebP's is known once its frame is decoded
            return torch.stack(frames), durations
    except (OSError, ValueError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError) as error:
        raise ValueError(f"media: {path} cannot be read as an image ({error}); make it again") from error


def _video(path: Path, frames: int | None) -> Tensor:
    """The first `frames` frames, or all, uint8 [F, H, W, 3]."""
    kept: list[Tensor] = []
    with contextlib.closing(video_frames(path, f"media: {path}", MOST_PIXELS)) as shown:
        for frame in itertools.islice(shown, frames):
            if (pixels := (len(kept) + 1) * frame.pixels.shape[0] * frame.pixels.shape[1]) > MOST_PIXELS:
                raise ValueError(f"media: {path} {_too_many(pixels)}")
            kept.append(torch.from_numpy(frame.pixels))
            if kept[-1].shape != kept[0].shape:
                raise ValueError(f"media: {path} changes its size after {len(kept) - 1} frames; cut or convert it")
    if not kept:
        raise ValueError(f"media: {path} has no frames; make it again")
    return torch.stack(kept)


def fitted(media: Tensor, size: Size, name: str) -> Tensor:
    """Media [3, F, H, W] as the model takes them: its first frames, reduced or enlarged to its size. ValueError, naming `name`, if they do not fit."""
    frames = media.shape[1]
    if frames < size.frames:
        raise ValueError(f"media: {name} has {frames} frames and the model takes {size.frames}; give longer videos, or train at --size HEIGHT WIDTH {frames}")
    return _shaped(media[:, : size.frames], size, name)


def _shaped(first: Tensor, size: Size, name: str) -> Tensor:
    """Media [3, F, H, W] at the model's height and width. ValueError, naming `name`, for those of another aspect."""
    height, width = first.shape[2:]
    if abs(height / width * size.width / size.height - 1) > ASPECT:
        raise ValueError(f"media: {name} is {height} x {width}, not of the shape of {size.height} x {size.width}; crop it, or train at another --size")
    if (height, width) == (size.height, size.width):
        return first
    smaller = height >= size.height
    return (
        F.interpolate(first.transpose(0, 1), (size.height, size.width), mode="area" if smaller else "bilinear", align_corners=None if smaller else False)
        .transpose(0, 1)
        .clamp(0, 1)
    )


@torch.no_grad()
def pair_samples(pairs: Sequence[LabelledPair], family: EncodesMedia) -> PairSamples:
    """Labelled files as latents of `family`, one pair at a time; ties are left out. For an image-to-video family the first frame is the chosen sample's
    first frame, unless the prompt names one. The pairs' prompts are in their written form (`data/prompt.py`).

    ValueError if none is left, a file does not fit, or all are images and the model makes videos.
    """
    decided = [pair for pair in pairs if not pair.tie]
    if not decided:
        raise ValueError(f"pairs: all {len(pairs)} of them are ties, which carry no preference; give at least one with a preferred sample")
    both = _latents([pair.chosen for pair in decided] + [pair.rejected for pair in decided], family)
    chosen, rejected = both.chunk(2)
    return PairSamples(_prompts(decided, family), chosen, rejected)


@torch.no_grad()
def preferred_samples(labelled: Sequence[LabelledSample], family: EncodesMedia) -> RealSamples:
    """Preferred files as latents of `family`, one at a time; otherwise as `pair_samples`."""
    return RealSamples(_prompts(labelled, family), _latents([one.chosen for one in labelled], family))


def _latents(paths: Sequence[Path], family: EncodesMedia) -> Tensor:
    """Files as latents [N, C, (F,) H, W] on the CPU; ValueError if one does not fit, or all are images and the model makes videos."""
    device, moves, latents = family.device, False, []
    for path in paths:
        media = fitted(read_media(path, family.size.frames, family.size), family.size, str(path)).to(device)
        moves = moves or bool((media != media[:, :1]).any())
        latents.append(family.encode_media(media[None] if family.size.frames > 1 else media[None, :, 0])[0].cpu())
    if family.size.frames > 1 and not moves:
        raise ValueError(f"pairs: none of {len(paths)} samples moves, and the model makes videos of {family.size.frames} frames; give videos, not images")
    return torch.stack(latents)


def _prompts(labelled: Sequence[LabelledSample], family: EncodesMedia) -> tuple[Prompt, ...]:
    """The prompts; of an image-to-video family with the chosen sample as the first frame, unless they name one."""
    parsed = [(Prompt.parse(one.prompt), one.chosen) for one in labelled]
    return tuple(replace(prompt, image=chosen) if family.takes_first_frame and prompt.image is None else prompt for prompt, chosen in parsed)


def slow_motion(media: Tensor, factor: float = 2.0) -> Tensor:
    """The first F / factor frames of videos [B, 3, F, H, W], spread over all F by blending neighbours: negatives that keep every frame's quality.

    Without them a ranker, or a preference, rewards videos that hardly move (Diffusion-APO C.1, which drops frames and interpolates).
    """
    if not factor > 1:
        raise ValueError(f"factor: {factor} is not allowed; it slows by more than 1")
    frames = media.shape[2]
    at = torch.arange(frames, device=media.device) / factor
    low = at.floor().long()
    return torch.lerp(media[:, :, low], media[:, :, (low + 1).clamp(max=frames - 1)], (at - low).to(media)[None, None, :, None, None])
