"""The letters of the moving-words world: pictures of the capitals A to Z in four bold fonts, drawn once and shipped (`assets/fonts`, with the licences).

No font file is read and no font renderer is used, so a word looks the same on every machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FONTS = ("sans", "grotesk", "spartan", "serif")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CAP_HEIGHT = 48  # pixels of an H in the pictures
GLYPH_ABOVE, GLYPH_ROWS = 4, 72  # rows above an H, and in all
TRACKING = 3  # columns added between two letters
_FOLDER = Path(__file__).parent / "assets" / "fonts"


@dataclass(frozen=True)
class Spread:
    """A word's picture [rows, columns] in [0, 1], 1 is ink, the box of its ink (left, top, right, bottom) and where each letter's ink begins and ends
    (left, right), in that picture's pixels."""

    pixels: Tensor
    ink: tuple[int, int, int, int]
    letters: tuple[tuple[int, int], ...]


@cache
def _font(name: str) -> tuple[np.ndarray, dict[str, list[int]]]:
    """The strip of a font's letters [72, columns], and each letter's column, width, left bearing and advance."""
    if name not in FONTS:
        raise ValueError(f"font: {name!r} is not allowed; use one of {', '.join(FONTS)}")
    metrics = json.loads((_FOLDER / "glyphs.json").read_text(encoding="utf-8"))[name]
    with Image.open(_FOLDER / f"{name}.png") as picture:
        return np.asarray(picture), metrics


def spread(word: str, font: str) -> Spread:
    """The letters of a word (A to Z) side by side in a font; ValueError for a font that is not there."""
    strip, metrics = _font(font)
    width = sum(metrics[letter][3] + TRACKING for letter in word) + 2 * CAP_HEIGHT
    picture, at = np.zeros((GLYPH_ROWS, width), strip.dtype), CAP_HEIGHT
    ends = []
    for letter in word:
        column, wide, left, advance = metrics[letter]
        to = picture[:, at + left : at + left + wide]
        np.maximum(to, strip[:, column : column + wide], out=to)
        ends.append((at + left, at + left + wide))
        at += advance + TRACKING
    rows, columns = np.flatnonzero(picture.max(1)), np.flatnonzero(picture.max(0))
    first, last = int(columns[0]), int(columns[-1]) + 1
    pixels = torch.from_numpy(picture[:, first:last]).double() / 255
    return Spread(pixels, (0, int(rows[0]), last - first, int(rows[-1]) + 1), tuple((a - first, b - first) for a, b in ends))
