"""What texts read off a video's frames tell of it: whether its word is right, how many letters are, and whether it can be read at all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instep.bundled.words import LENGTH
from instep.rewards.ocr import edit_distance


@dataclass(frozen=True)
class WordFigures:
    """Per video [B]: word right (bool), share of characters right in [0, 1], and legible (bool)."""

    word: Tensor
    letters: Tensor
    legible: Tensor


def figures_of(texts: Sequence[Sequence[str]], counts: Tensor, asked: Sequence[str]) -> WordFigures:
    """Figures of videos from the text of each frame, `texts` [B][F]; the frames that count are true in `counts` [B, F], and `asked` [B] are the words.

    A word is right when it is read exactly in more than half of the frames that count. Characters: 1 - min(1, edit distance / length of the word), mean over
    these frames. A video is legible when more than half of them read as one and the same four capitals, right or wrong; this tells a smear from a misspelling.
    Where no frame counts, all three are 0.
    """
    found = [_of_video(video, row, word) for video, row, word in zip(texts, counts.tolist(), asked, strict=True)]
    word, letters, legible = zip(*found, strict=True)
    return WordFigures(torch.tensor(word), torch.tensor(letters, dtype=torch.float64), torch.tensor(legible))


def _of_video(texts: Sequence[str], counts: Sequence[bool], word: str) -> tuple[bool, float, bool]:
    seen = [text for text, counted in zip(texts, counts, strict=True) if counted]
    if not seen:
        return False, 0.0, False
    letters = sum(1 - min(1.0, edit_distance(text, word) / len(word)) for text in seen) / len(seen)
    text, times = Counter(seen).most_common(1)[0]
    legible = 2 * times > len(seen) and re.fullmatch(f"[A-Z]{{{LENGTH}}}", text) is not None
    return 2 * seen.count(word) > len(seen), letters, legible
