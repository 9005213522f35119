"""The first frames that prompts of image-to-video models name: read from files, or drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from instep.bundled import digits
from instep.core.size import VideoSize
from instep.data.prompt import DRAWN, first_frame_of, text_of, with_first_frame


def read_first_frame(prompt: str, size: VideoSize) -> Tensor:
    """A prompt's first frame [3, H, W] in [0, 1] at `size`: an image file, or the first frame of an animation or video.

    `train/17` (monitor, heldout, reference) is drawn: the first frame of the moving-digits video that `drawn_video` draws of the prompt's text from
    that split with seed 17. ValueError where the prompt names none, and for a file that is missing, cannot be read or has another shape.
    """
    from instep.data.media import fitted, read_media

    name = first_frame_of(prompt)
    if name is None:
        raise ValueError(
            f"prompt: {prompt!r} names no first frame, and this model begins its videos with one; write {with_first_frame(prompt, 'FILE')!r}, or in a prompt "
            'file of JSON lines {"prompt": ..., "image": FILE}'
        )
    if DRAWN.fullmatch(name):
        frame = drawn_video(prompt)[:, 0]
        if frame.shape[1:] != (size.height, size.width):
            frame = F.interpolate(frame[None], (size.height, size.width), mode="bilinear", align_corners=False)[0]
        return frame
    if not Path(name).is_file():
        raise ValueError(f"image: {name} of prompt {prompt!r} is not a file that exists; give an image or a video, or split/seed for a drawn digit")
    return fitted(read_media(Path(name))[:, :1], VideoSize(size.height, size.width, 1), name)[:, 0]


def drawn_video(prompt: str) -> Tensor:
    """The moving-digits video [3, 9, 48, 48] whose first frame a prompt like `a seven [image: train/17]` names; ValueError for any other."""
    scans, motions, start = drawn_path(prompt)
    return digits.place(scans, start, digits.travels(motions))[0].expand(3, -1, -1, -1)


def drawn_path(prompt: str) -> tuple[Tensor, Tensor, Tensor]:
    """What that video shows: scan [1, 8, 8], motion [1] and the digit's first corner [1, 2]; ValueError for a prompt that names no drawn first frame.

    An empty text leaves everything open.
    """
    found = DRAWN.fullmatch(first_frame_of(prompt) or "")
    if not found:
        raise ValueError(f"image: {prompt!r} names no drawn first frame; write for example {with_first_frame(text_of(prompt), 'train/17')!r}")
    split: digits.Split = found[1]  # type: ignore[assignment]
    rng = torch.Generator().manual_seed(int(found[2]))
    scans, _, motions = digits.draw(split, [digits.parse(text_of(prompt) or "a digit")], rng)
    return scans, motions, digits.random_paths(motions, rng)[0]


def source_of(prompt: str) -> str:
    """What a first frame depends on: the name of its file, or where it is drawn the whole prompt."""
    name = first_frame_of(prompt)
    return prompt if name is None or DRAWN.fullmatch(name) else name


def check_first_frames(prompts: Sequence[str], size: VideoSize) -> None:
    """ValueError for the first prompt that names no first frame, or one that cannot be read; every file is read once."""
    seen: dict[str, str] = {}
    for prompt in prompts:
        seen.setdefault(source_of(prompt), prompt)
    for prompt in seen.values():
        name = first_frame_of(prompt)
        if name and DRAWN.fullmatch(name):
            digits.parse(text_of(prompt) or "a digit")  # drawing it takes longer and says no more
        else:
            read_first_frame(prompt, size)


def digest(prompts: Sequence[str]) -> str | None:
    """Of what the files show that prompts name, in their order; None where none names a file."""
    files = [name for name in dict.fromkeys(map(first_frame_of, prompts)) if name is not None and not DRAWN.fullmatch(name)]
    return hashlib.sha256(b"".join(hashlib.sha256(Path(name).read_bytes()).digest() for name in files)).hexdigest()[:16] if files else None
