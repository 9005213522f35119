"""Whether a picture shows the text that its prompt puts between quotes, as a text recognition network reads it: a reward without a gradient.

It is the text-rendering reward of Flow-GRPO (Liu et al. 2025), with PP-OCR through `rapidocr` in place of PaddleOCR: the networks are within its package.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from instep.rewards.base import RewardError
from instep.rewards.samples import eight_bit

EVERY = 4  # frames of a video from one that is read to the next, as in Flow-GRPO
_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


class Recogniser(Protocol):
    """Reads pictures. `name` contains everything that changes what it reads."""

    @property
    def name(self) -> str: ...

    def read(self, frame: Tensor) -> str:
        """The text of a frame uint8 [H, W, 3], its lines in reading order; empty where there is none."""
        ...


@dataclass(frozen=True)
class RapidOCR:
    """PP-OCR's detector and recogniser, as `rapidocr` ships them, on the CPU; a line counts from a confidence of 0.5."""

    name: str
    engine: Any

    def read(self, frame: Tensor) -> str:
        return "".join(self.engine(frame.numpy()[..., ::-1], use_det=True, use_cls=False, use_rec=True).txts or ())


def rapid_ocr(threads: int | None = None) -> RapidOCR:
    """Loads `rapidocr`, to read an image with this many threads (None: torch's number); ValueError where it, or onnxruntime, is not installed."""
    try:
        import onnxruntime  # noqa: F401
        import rapidocr
    except ImportError as error:
        raise ValueError(f"ocr: it needs {error.name}, which is not installed; run: pip install 'instep[ocr]'") from error
    engine = rapidocr.RapidOCR(params={"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": threads or torch.get_num_threads()})
    return RapidOCR(f"rapidocr {version('rapidocr')}", engine)


@dataclass(frozen=True)
class OCR:
    """1 - min(1, edit distance / length) of the text that is read and the text between the first quotes of the prompt, straight or curly: [B] in [0, 1].

    Spaces and case do not count, and text around the wanted one costs nothing. The score of a video is the mean over every fourth frame from the first one;
    Flow-GRPO leaves frames of score 0 out of that mean, so that one legible frame is enough, and this does not.
    """

    recogniser: Recogniser
    differentiable: ClassVar[bool] = False
    space: ClassVar[Literal["pixel", "latent"]] = "pixel"

    @property
    def name(self) -> str:
        return f"ocr ({self.recogniser.name})"

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """RewardError for the first prompt without a quoted text."""
        for prompt in prompts:
            quoted(prompt)

    def score(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] of media [B, 3, H, W] or [B, 3, F, H, W] in [0, 1]."""
        wanted = [quoted(prompt) for prompt in prompts]
        scores = [
            sum(likeness(self.recogniser.read(frame), text) for frame in frames[::EVERY]) / len(frames[::EVERY])
            for frames, text in zip(eight_bit(media), wanted, strict=True)
        ]
        return torch.tensor(scores, device=media.device)


def quoted(prompt: str) -> str:
    """The text between the first quotes of a prompt; RewardError where there is none."""
    found = _QUOTED.search(prompt)
    text = (found[1] or found[2] or "") if found else ""
    if not _plain(text):
        raise RewardError(f'reward ocr: the prompt {prompt!r} has no text between quotes; write for example: a sign that says "OPEN"')
    return text


def likeness(read: str, wanted: str) -> float:
    """1 - min(1, edit distance / length of `wanted`), in [0, 1], without spaces and case; 1 where `read` contains `wanted`."""
    seen, asked = _plain(read), _plain(wanted)
    return 1.0 if asked in seen else 1 - min(1.0, edit_distance(seen, asked) / len(asked))


def edit_distance(a: str, b: str) -> int:
    """The least number of letters to insert, delete or replace that turn a into b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(text.split()).lower()
