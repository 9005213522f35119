"""PP-OCR as the held-out reader of moving words: text recognition networks that others trained for other purposes. Results are reported by it; no training,
no monitor and no choice of settings sees it. It is there where the extra `ocr` is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from instep.rewards.ocr import rapid_ocr

INK = 0.5  # a pixel darker than this is ink
MARGIN = 2  # pixels of white around the ink
MISSING = "PP-OCR is not installed (pip install 'instep[ocr]'), so the held-out figures are left out and the monitor's stand"

# an image [H, W, 3] of uint8 to its text
Recognise = Callable[[Tensor], str]


@dataclass(frozen=True)
class OutsideReader:
    """Reads frames cut to their ink and `MARGIN` px of white around, which is what a recognition network expects.

    As many frames are read at once as torch has threads, so `recognise` is called from several.
    """

    recognise: Recognise

    def texts(self, media: Tensor, counts: Tensor) -> list[list[str]]:
        """Capitals and whatever else is read, without spaces, of the frames `counts` [B, F] (bool) of media [B, 3, F, H, W] in [0, 1], dark on light; "" for
        the others and for a frame without ink."""
        frames, counted = media.float().mean(1).flatten(0, 1), counts.flatten().tolist()
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            found = list(pool.map(lambda frame, read: self._text(frame) if read else "", frames, counted))
        length = counts.shape[1]
        return [found[i : i + length] for i in range(0, len(found), length)]

    def _text(self, frame: Tensor) -> str:
        cut = cropped(frame)
        if cut is None:
            return ""
        image = cut.mul(255).round().to(torch.uint8)[..., None].expand(-1, -1, 3).contiguous()
        return self.recognise(image).replace(" ", "").upper()


def cropped(frame: Tensor) -> Tensor | None:
    """A frame [H, W] cut to its ink, with `MARGIN` px around that are white beyond the canvas; None without ink."""
    ink = frame < INK
    if not ink.any():
        return None
    rows, columns = ink.any(1).nonzero()[:, 0], ink.any(0).nonzero()[:, 0]
    padded = F.pad(frame, (MARGIN, MARGIN, MARGIN, MARGIN), value=1.0)
    return padded[int(rows[0]) : int(rows[-1]) + 1 + 2 * MARGIN, int(columns[0]) : int(columns[-1]) + 1 + 2 * MARGIN]


def installed() -> bool:
    """Whether the extra `ocr` is there."""
    return all(find_spec(package) is not None for package in ("rapidocr", "onnxruntime"))


@cache
def outside_reader() -> OutsideReader | None:
    """PP-OCR with the weights inside its package; None where the extra `ocr` is not installed."""
    if not installed():
        return None
    engine = rapid_ocr(threads=1).engine

    def recognise(image: Tensor) -> str:
        found: Sequence[str] | None = engine(image.numpy(), use_det=False, use_cls=False, use_rec=True).txts
        return found[0] if found else ""

    return OutsideReader(recognise)
