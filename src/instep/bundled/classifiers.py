"""Three classifiers of digit and motion in moving-digits videos: one to train on, one to watch, one to report.

They share nothing: other architecture, other seed, other scans. A reward that only its own classifier believes in has been hacked, and the
other two show it. All read the mean of the three channels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.bundled.digits import MOTIONS, motions_allowed, parse
from instep.data.prompt import Prompt

ClassifierName = Literal["training", "monitor", "heldout"]
FOLDER = Path(__file__).parent / "assets" / "moving-digits" / "classifiers"
FEATURES = 64


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, width)


class Trunk(nn.Module):
    """Grey videos [B, 9, 48, 48] in [0, 1] to (digit features, motion features), each [B, 64], and from there to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.digit = nn.Linear(FEATURES, 10)
        self.motion = nn.Linear(FEATURES, len(MOTIONS))

    def embed(self, grey: Tensor) -> tuple[Tensor, Tensor]:
        """What each architecture defines."""
        raise NotImplementedError

    def forward(self, grey: Tensor) -> tuple[Tensor, Tensor]:
        digit, motion = self.embed(grey)
        return self.digit(digit), self.motion(motion)


class SpaceTime(Trunk):
    """3-D convolutions, strided in space and time, pooled over both (training classifier)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(1, 16, (3, 3, 3), (1, 2, 2), 1),
            _norm(16),
            nn.SiLU(),
            nn.Conv3d(16, 32, (3, 3, 3), (2, 2, 2), 1),
            _norm(32),
            nn.SiLU(),
            nn.Conv3d(32, 64, (3, 3, 3), 1, 1),
            _norm(64),
            nn.SiLU(),
        )
        self.to_digit = nn.Linear(128, FEATURES)
        self.to_motion = nn.Linear(128, FEATURES)

    def embed(self, grey: Tensor) -> tuple[Tensor, Tensor]:
        h = self.layers(F.avg_pool2d(grey, 2)[:, None])
        pooled = torch.cat([h.mean((2, 3, 4)), h.flatten(2).logsumexp(2) - 4], 1)
        return F.silu(self.to_digit(pooled)), F.silu(self.to_motion(pooled))


class FrameByFrame(Trunk):
    """A 2-D net reads each frame; soft positions of its channels over time tell the motion (monitor classifier)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 24, 5, 2, 2),
            _norm(24),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, 1, 1),
            _norm(48),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(48, 64, 3, 1, 1),
            _norm(64),
            nn.SiLU(),
        )
        self.where = nn.Conv2d(64, 8, 1)
        self.to_digit = nn.Sequential(nn.Conv2d(64, FEATURES, 3), nn.SiLU())
        self.to_motion = nn.Sequential(nn.Conv1d(16, 32, 3), nn.SiLU(), nn.Conv1d(32, 32, 3), nn.SiLU(), nn.Flatten(), nn.Linear(160, FEATURES), nn.SiLU())

    def embed(self, grey: Tensor) -> tuple[Tensor, Tensor]:
        b, f = grey.shape[:2]
        h = self.layers(F.avg_pool2d(grey, 2).flatten(0, 1)[:, None])
        weights = self.where(h).flatten(2).softmax(-1).reshape(b, f, 8, *h.shape[-2:])
        axis = torch.linspace(-4, 4, h.shape[-1]).to(grey)
        positions = torch.cat([(weights.sum(3) * axis).sum(-1), (weights.sum(4) * axis).sum(-1)], 2)
        digit = self.to_digit(h).amax((2, 3)).reshape(b, f, -1).mean(1)
        return digit, self.to_motion(positions.mT)


class Residual(nn.Module):
    """A pre-activation residual block that halves the resolution."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(inner, outer, 3, 2, 1), _norm(outer), nn.SiLU(), nn.Conv2d(outer, outer, 3, 1, 1), _norm(outer))
        self.skip = nn.Conv2d(inner, outer, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.body(x) + self.skip(x))


class Recurrent(Trunk):
    """A residual net reads each frame and its change since the frame before; a GRU runs over time (held-out classifier)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 16, 5, 2, 2), _norm(16), nn.SiLU(), Residual(16, 32), Residual(32, 64))
        self.attend = nn.Conv2d(64, 1, 1)
        self.time = nn.GRU(64, FEATURES, batch_first=True)

    def embed(self, grey: Tensor) -> tuple[Tensor, Tensor]:
        b, f = grey.shape[:2]
        change = torch.cat([torch.zeros_like(grey[:, :1]), grey[:, 1:] - grey[:, :-1]], 1)
        h = self.layers(torch.stack([grey, change], 2).flatten(0, 1))
        weight = self.attend(h).flatten(1).softmax(1)[:, None]
        frames = (h.flatten(2) * weight).sum(2).reshape(b, f, -1)
        return frames.mean(1), self.time(frames)[0][:, -1]


ARCHITECTURES: dict[ClassifierName, type[Trunk]] = {"training": SpaceTime, "monitor": FrameByFrame, "heldout": Recurrent}


@dataclass(frozen=True)
class Correct:
    """Per video [B], bool: digit right, motion right, both; what the prompt leaves open counts as right."""

    digit: Tensor
    motion: Tensor
    both: Tensor


@dataclass(frozen=True)
class Embedded:
    """Penultimate features of videos by what they tell of: digit and motion, each [B, 64]."""

    digit: Tensor
    motion: Tensor

    @property
    def features(self) -> Tensor:
        """[B, 128]: 64 of the digit, then 64 of the motion."""
        return torch.cat([self.digit, self.motion], 1)

    def __getitem__(self, rows: slice) -> Embedded:
        return Embedded(self.digit[rows], self.motion[rows])


@dataclass(frozen=True)
class _Wanted:
    """Prompts as masks over classes: digits [B, 10], motions [B, 9]; True where the prompt allows the class."""

    digits: Tensor
    motions: Tensor


def _wanted(prompts: Sequence[Prompt | str], device: torch.device) -> _Wanted:
    digits = torch.zeros(len(prompts), 10, dtype=torch.bool)
    motions = torch.zeros(len(prompts), len(MOTIONS), dtype=torch.bool)
    for i, spec in enumerate(map(parse, prompts)):
        digits[i, slice(None) if spec.digit is None else spec.digit] = True
        motions[i, motions_allowed(spec)] = True
    return _Wanted(digits.to(device), motions.to(device))


class Classifier:
    """A frozen classifier of digit and motion; its score is differentiable with respect to the video's pixels."""

    differentiable = True
    space: ClassVar[Literal["pixel", "latent"]] = "pixel"

    def __init__(self, name: str, net: Trunk, accuracy: dict[str, float]) -> None:
        self.name, self.net, self.accuracy = name, net.eval().requires_grad_(False), accuracy

    def embed(self, media: Tensor) -> Embedded:
        """Penultimate features of media [B, 3, 9, 48, 48], from which everything else follows; whoever needs several figures embeds once."""
        if media.ndim != 5 or media.shape[1:] != (3, 9, 48, 48):
            raise ValueError(f"media: shape {tuple(media.shape)} is not allowed; this classifier reads [B, 3, 9, 48, 48] in [0, 1]")
        return Embedded(*self.net.embed(media.float().mean(1)))

    def logits(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """Digit [B, 10] and motion [B, 9] logits of media [B, 3, 9, 48, 48]."""
        return self.logits_of(self.embed(media))

    def logits_of(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """Digit [B, 10] and motion [B, 9] logits of embedded videos."""
        return self.net.digit(embedded.digit), self.net.motion(embedded.motion)

    def features(self, media: Tensor) -> Tensor:
        """Penultimate features [B, 128]: 64 of the digit, then 64 of the motion."""
        return self.embed(media).features

    def asked(self, prompts: Sequence[Prompt | str]) -> Tensor:
        """What prompts ask for, in the space of `features` [B, 128]: the last layers' weights, mean over the classes allowed less the mean over all.

        Its scalar product with `features` is the logits' mean over what was asked, above their mean (without biases); zeros for what is left open.
        """
        wanted = _wanted(prompts, self.net.digit.weight.device)
        parts = zip((wanted.digits, wanted.motions), (self.net.digit.weight, self.net.motion.weight), strict=True)
        return torch.cat([mask.float() / mask.sum(1, keepdim=True) @ weight - weight.mean(0) for mask, weight in parts], 1)

    def score(self, media: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
        """log p of what the prompts say, [B] <= 0, higher is better: digit plus motion; what is left open adds 0.

        A motion of open speed has the summed probability of both speeds.
        """
        return self.score_of(self.embed(media), prompts)

    def score_of(self, embedded: Embedded, prompts: Sequence[Prompt | str]) -> Tensor:
        """The score of embedded videos, [B]."""
        wanted = _wanted(prompts, embedded.digit.device)
        parts = zip(self.logits_of(embedded), (wanted.digits, wanted.motions), strict=True)
        zeros = embedded.digit.new_zeros(len(embedded.digit))
        return sum((logits.log_softmax(1).masked_fill(~mask, -torch.inf).logsumexp(1) for logits, mask in parts), zeros)

    @torch.no_grad()
    def correct(self, media: Tensor, prompts: Sequence[Prompt | str]) -> Correct:
        """Whether the most probable digit and motion are ones the prompts allow."""
        return self.correct_of(self.embed(media), prompts)

    @torch.no_grad()
    def correct_of(self, embedded: Embedded, prompts: Sequence[Prompt | str]) -> Correct:
        """`correct` of embedded videos."""
        wanted = _wanted(prompts, embedded.digit.device)
        digit, motion = (logits.argmax(1, keepdim=True) for logits in self.logits_of(embedded))
        digit_right, motion_right = wanted.digits.gather(1, digit)[:, 0], wanted.motions.gather(1, motion)[:, 0]
        return Correct(digit_right, motion_right, digit_right & motion_right)


def load_classifier(name: ClassifierName, folder: Path = FOLDER) -> Classifier:
    """A bundled classifier, float32, frozen; each call with the same arguments gives the same object."""
    return _load(name, Path(folder))


@cache
def _load(name: ClassifierName, folder: Path) -> Classifier:
    from safetensors.torch import load_file

    if name not in get_args(ClassifierName):
        raise ValueError(f"name: {name!r} is not allowed; use one of {', '.join(get_args(ClassifierName))}")
    net = ARCHITECTURES[name]()
    net.load_state_dict({k: v.float() for k, v in load_file(folder / f"{name}.safetensors").items()})
    return Classifier(name, net, json.loads((folder / f"{name}.json").read_text())["accuracy"])
