"""First frames that the moving-digits world draws: an image named `train/17` is the first frame of a video that is drawn from that split with seed 17."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from instep.bundled import digits
from instep.core.size import Size
from instep.data.first_frame import read_first_frame
from instep.data.prompt import Prompt

_NAME = re.compile(r"(train|monitor|heldout|reference)/(\d+)")


def is_drawn(prompt: Prompt) -> bool:
    """Whether the prompt's image is the name of a drawn first frame: split/seed."""
    return _NAME.fullmatch(str(prompt.image)) is not None


def first_frame(prompt: Prompt, size: Size) -> Tensor:
    """The drawn first frame [3, H, W] in [0, 1] of a prompt at `size`; of a prompt whose image is a file, that file's."""
    if not is_drawn(prompt):
        return read_first_frame(prompt, size)
    frame = drawn_video(prompt)[:, 0]
    if frame.shape[1:] != (size.height, size.width):
        frame = F.interpolate(frame[None], (size.height, size.width), mode="bilinear", align_corners=False)[0]
    return frame


def drawn_video(prompt: Prompt) -> Tensor:
    """The moving-digits video [3, 9, 48, 48] that begins with the drawn first frame of `Prompt("a seven", "train/17")`; ValueError for any other prompt."""
    scans, motions, start = drawn_path(prompt)
    return digits.place(scans, start, digits.travels(motions))[0].expand(3, -1, -1, -1)


def drawn_path(prompt: Prompt) -> tuple[Tensor, Tensor, Tensor]:
    """What that video shows: scan [1, 8, 8], motion [1] and the digit's first corner [1, 2]; ValueError for a prompt without a drawn first frame.

    An empty text leaves everything open.
    """
    found = _NAME.fullmatch(str(prompt.image))
    if not found:
        raise ValueError(f"image: {str(prompt)!r} names no drawn first frame; give for example {str(Prompt(prompt.text, 'train/17'))!r}")
    split: digits.Split = found[1]  # type: ignore[assignment]
    rng = torch.Generator().manual_seed(int(found[2]))
    scans, _, motions = digits.draw(split, [digits.parse(prompt.text or "a digit")], rng)
    return scans, motions, digits.random_paths(motions, rng)[0]
