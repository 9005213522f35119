"""The networks of the two word readers: a convolutional one to train on and a recurrent one to watch.

They share nothing but their task: other trunk, other width, other view of the motion, other seed. Each reads every frame by itself, uncropped, column by
column, and tells size and font from the same columns; a small second network watches the whole video for its motion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.bundled.glyphs import FONTS, LETTERS
from instep.bundled.motions import MOTIONS
from instep.bundled.words import SIZES

ReaderName = Literal["training", "monitor"]
WORD, LOOK, MOTION = 64, 32, 32  # widths of the features


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, width)


@dataclass(frozen=True)
class Seen:
    """What a network makes of videos: log_p [B, F, T, 27] of a column's symbols (blank, A to Z), and features of the letters [B, 64], the look [B, 32]
    (size and font) and the motion [B, 32]."""

    log_p: Tensor
    word: Tensor
    look: Tensor
    motion: Tensor


class Trunk(nn.Module):
    """Grey videos [B, F, 32, 64] in [0, 1], dark on light, to `Seen`. A subclass makes the columns and watches the motion."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_word = nn.Linear(width, WORD)
        self.letters = nn.Linear(WORD, 1 + len(LETTERS))
        self.to_look = nn.Linear(2 * width, LOOK)
        self.size = nn.Linear(LOOK, len(SIZES))
        self.font = nn.Linear(LOOK, len(FONTS))
        self.moved = nn.Linear(MOTION, len(MOTIONS))

    def columns(self, frames: Tensor) -> Tensor:
        """Frames [N, 1, 32, 64], ink is 1, to columns [N, T, width]."""
        raise NotImplementedError

    def watch(self, videos: Tensor) -> Tensor:
        """Videos [B, 9, 32, 64], ink is 1, to motion features [B, 32]."""
        raise NotImplementedError

    def read(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frames [N, 32, 64] to log-probabilities of symbols [N, T, 27], letter features [N, 64] and look features [N, 32].

        The features of a frame are the mean over its columns, weighted by the probability that a letter is there.
        """
        h = self.columns((1 - frames)[:, None])
        word = F.silu(self.to_word(h))
        log_p = self.letters(word).log_softmax(2)
        ink = 1 - log_p[..., :1].exp() + 1e-3
        weight = ink / ink.sum(1, keepdim=True)
        return log_p, (weight * word).sum(1), F.silu(self.to_look(torch.cat([h.mean(1), h.amax(1)], 1)))

    def forward(self, videos: Tensor) -> Seen:
        b, f = videos.shape[:2]
        log_p, word, look = (part.unflatten(0, (b, f)) for part in self.read(videos.flatten(0, 1)))
        return Seen(log_p, word.mean(1), look.mean(1), self.watch(1 - videos))


class Along(nn.Module):
    """A residual convolution along the columns [N, width, T], `reach` columns apart."""

    def __init__(self, width: int, reach: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(width, width, 5, padding=2 * reach, dilation=reach), _norm(width), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Convolutional(Trunk):
    """Convolutions alone: the largest value over the rows, then residual convolutions along the columns; 3-D ones for the motion (training reader)."""

    def __init__(self) -> None:
        super().__init__(96)
        self.stem = nn.Sequential(
            nn.Conv2d(1, 24, 5, 2, 2),
            _norm(24),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, (2, 1), 1),
            _norm(48),
            nn.SiLU(),
            nn.Conv2d(48, 96, 3, (2, 1), 1),
            _norm(96),
            nn.SiLU(),
            nn.Conv2d(96, 96, 3, 1, 1),
        )
        self.along = nn.Sequential(_norm(96), nn.SiLU(), Along(96, 1), Along(96, 2))
        self.video = nn.Sequential(
            nn.Conv3d(1, 16, 3, (1, 2, 2), 1),
            _norm(16),
            nn.SiLU(),
            nn.Conv3d(16, 32, 3, 2, 1),
            _norm(32),
            nn.SiLU(),
            nn.Conv3d(32, 32, 3, (2, 1, 1), 1),
            _norm(32),
            nn.SiLU(),
        )
        self.to_motion = nn.Linear(64, MOTION)

    def columns(self, frames: Tensor) -> Tensor:
        return self.along(self.stem(frames).amax(2)).mT

    def watch(self, videos: Tensor) -> Tensor:
        h = self.video(F.avg_pool2d(videos, 2)[:, None])
        return F.silu(self.to_motion(torch.cat([h.mean((2, 3, 4)), h.flatten(2).logsumexp(2) - 4], 1)))


class Recurrent(Trunk):
    """Convolutions and the largest value over the rows, then a bidirectional GRU along the columns; soft positions over time for the motion (monitor)."""

    def __init__(self) -> None:
        super().__init__(112)
        self.stem = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1),
            _norm(16),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 40, 3, 1, 1),
            _norm(40),
            nn.SiLU(),
            nn.MaxPool2d((2, 1)),
            nn.Conv2d(40, 80, 3, (2, 1), 1),
            _norm(80),
            nn.SiLU(),
            nn.Conv2d(80, 112, 3, 1, 1),
        )
        self.start = nn.Sequential(_norm(112), nn.SiLU())
        self.time = nn.GRU(112, 56, batch_first=True, bidirectional=True)
        self.where = nn.Sequential(nn.Conv2d(1, 16, 5, 2, 2), _norm(16), nn.SiLU(), nn.Conv2d(16, 6, 3, 1, 1))
        self.to_motion = nn.Sequential(nn.Conv1d(12, 32, 3), nn.SiLU(), nn.Conv1d(32, 32, 3), nn.SiLU(), nn.Flatten(), nn.Linear(160, MOTION), nn.SiLU())

    def columns(self, frames: Tensor) -> Tensor:
        mixed = self.start(self.stem(frames).amax(2)).mT
        # cuDNN has no backward pass of a GRU in evaluation
        with torch.backends.cudnn.flags(enabled=False):
            return mixed + self.time(mixed)[0]

    def watch(self, videos: Tensor) -> Tensor:
        b, f = videos.shape[:2]
        weights = self.where(F.avg_pool2d(videos, 2).flatten(0, 1)[:, None]).flatten(2).softmax(-1).reshape(b, f, 6, 8, 16)
        x, y = (torch.linspace(-n / 2, n / 2, n).to(videos) for n in (16, 8))
        return self.to_motion(torch.cat([(weights.sum(3) * x).sum(-1), (weights.sum(4) * y).sum(-1)], 2).mT)


ARCHITECTURES: dict[ReaderName, Callable[[], Trunk]] = {"training": Convolutional, "monitor": Recurrent}
