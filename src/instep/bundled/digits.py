"""Moving digits: the embedded default's data. Real handwritten digits (scikit-learn's 8x8 scans) that move over a small canvas.

A video is grey (3 equal channels), 9 frames of 48 x 48; the digit is 24 px tall and travels 16 px (fast) or 8 px (slowly).
Scans are divided once, by sample and stratified by class, into four disjoint splits (`digits_split.json`): *train* (VAE, teacher, training
classifier), *monitor* and *heldout* (the two other classifiers) and *reference* (real videos that generated ones are compared with).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from instep.bundled.motions import DIRECTIONS, MOTIONS, SPEEDS, UNIT, direction_and_speed, motions_that_fit, said
from instep.data.prompt import Prompt, texts_of

FRAMES, SIZE, DIGIT_SIZE = 9, 48, 24
SOURCE_SIZE = 8  # the scans are 8 x 8
TRAVEL = {"slowly": 8.0, "fast": 16.0}  # pixels from the first frame to the last
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
Split = Literal["train", "monitor", "heldout", "reference"]


@dataclass(frozen=True)
class PromptSpec:
    """What a prompt says: a digit 0-9, a direction ("still" included) and a speed; None is left open."""

    digit: int | None = None
    direction: str | None = None
    speed: str | None = None

    def __post_init__(self) -> None:
        if self.digit is not None and self.digit not in range(10):
            raise ValueError(f"digit: {self.digit!r} is not allowed; use 0 to 9, or None to leave it open")
        if self.direction not in (None, "still", *DIRECTIONS):
            raise ValueError(f"direction: {self.direction!r} is not allowed; use one of {', '.join(DIRECTIONS)}, still, or None")
        if self.speed not in (None, *SPEEDS):
            raise ValueError(f"speed: {self.speed!r} is not allowed; use slowly, fast or None")
        if self.speed is not None and self.direction not in DIRECTIONS:
            raise ValueError(f"speed: {self.speed!r} needs a direction out of {', '.join(DIRECTIONS)}, got {self.direction!r}")


def describe(spec: PromptSpec) -> str:
    """The prompt that says exactly `spec`; inverse of `parse`."""
    words = ["a digit" if spec.digit is None else f"{'an' if spec.digit == 8 else 'a'} {WORDS[spec.digit]}"]
    return " ".join([*words, *said(spec.direction, spec.speed)])


def parse(prompt: Prompt | str) -> PromptSpec:
    """What a prompt's text says; ValueError for a prompt outside the grammar."""
    (text,) = texts_of([prompt])
    help_ = f"prompt: {text!r} is outside the grammar; write for example 'a seven moving left fast', 'a digit moving up', 'an eight', 'a two standing still'"
    words = text.lower().split()
    if len(words) < 2 or words[0] not in ("a", "an") or words[1] not in ("digit", *WORDS):
        raise ValueError(help_)
    digit = None if words[1] == "digit" else WORDS.index(words[1])
    match words[2:]:
        case []:
            return PromptSpec(digit)
        case ["standing", "still"]:
            return PromptSpec(digit, "still")
        case ["moving", direction] if direction in DIRECTIONS:
            return PromptSpec(digit, direction)
        case ["moving", direction, speed] if direction in DIRECTIONS and speed in SPEEDS:
            return PromptSpec(digit, direction, speed)
    raise ValueError(help_)


def motion_spec(digit: int | None, motion: int) -> PromptSpec:
    """A spec with the motion of index `motion` in MOTIONS fully said."""
    return PromptSpec(digit, *direction_and_speed(motion))


def motions_allowed(spec: PromptSpec) -> list[int]:
    """Indices into MOTIONS that fit the spec; all nine if it says nothing of motion."""
    return motions_that_fit(spec.direction, spec.speed)


def full_prompts() -> list[str]:
    """The 90 fully specified prompts: 10 digits x 9 motions."""
    return [describe(motion_spec(d, m)) for d in range(10) for m in range(len(MOTIONS))]


def open_prompts() -> list[str]:
    """The 64 prompts that leave digit, motion or speed open."""
    specs = [PromptSpec(d) for d in range(10)]
    specs += [PromptSpec(None, d, s) for d in DIRECTIONS for s in SPEEDS] + [PromptSpec(None, "still")]
    specs += [PromptSpec(None, d) for d in DIRECTIONS]
    specs += [PromptSpec(n, d) for n in range(10) for d in DIRECTIONS]
    return [describe(spec) for spec in (*specs, PromptSpec())]


def training_prompts() -> list[str]:
    """The 195 prompts bundled for distillation, each equally likely: 90 that say everything and 105 that leave something open.

    The ten digit-only prompts stand there four times and those that name a motion only twice, because these leave most open.
    """
    open_ = open_prompts()
    return full_prompts() + open_ + 3 * open_[:10] + open_[10:19] + [open_[-1]] * 2


@cache
def _scans() -> tuple[Tensor, Tensor]:
    """All scans [1797, 8, 8] in [0, 1] and their classes [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)


@cache
def _split(split: Split) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Scans, classes and, for every class, the positions of its scans, of one split."""
    if split not in get_args(Split):
        raise ValueError(f"split: {split!r} is not allowed; use one of {', '.join(get_args(Split))}")
    chosen = json.loads(Path(__file__).with_name("digits_split.json").read_text())[split]
    scans, classes = (values[chosen] for values in _scans())
    return scans, classes, [(classes == d).nonzero()[:, 0] for d in range(10)]


def scans_of(split: Split) -> tuple[Tensor, Tensor]:
    """The scans of one split [N, 8, 8] in [0, 1] and their classes [N]: 800 in train, 300 in monitor, 400 in heldout, 297 in reference."""
    scans, classes, _ = _split(split)
    return scans, classes


def place(scans: Tensor, start: Tensor, travel: Tensor, deform: Tensor | None = None) -> Tensor:
    """Bicubic rendering at sub-pixel positions: scans [B, 8, 8], start and travel [B, 2] (x, y in pixels) -> [B, F, 48, 48] in [0, 1].

    `start` is the top left corner of the digit's 24-px box in the first frame. `deform` [B, 2, 2] maps box coordinates around the centre.
    """
    n, half, scale = len(scans), (DIGIT_SIZE - 1) / 2, DIGIT_SIZE / SOURCE_SIZE
    step = torch.linspace(0, 1, FRAMES)[None, :, None]
    corner = start[:, None] + step * travel[:, None]
    axis = torch.arange(SIZE, dtype=torch.float32)
    x = axis[None, None, None, :] - corner[:, :, None, None, 0] - half
    y = axis[None, None, :, None] - corner[:, :, None, None, 1] - half
    at = torch.stack(torch.broadcast_tensors(x, y), -1)
    if deform is not None:
        at = torch.einsum("bij,bfhwj->bfhwi", deform, at)
    # grid_sample's [-1, 1] spans the scan from edge to edge: 4 scan pixels either side of its centre
    grid = at / (scale * SOURCE_SIZE / 2)
    frames = F.grid_sample(scans[:, None], grid.reshape(n, FRAMES * SIZE, SIZE, 2), mode="bicubic", padding_mode="zeros", align_corners=False)
    return frames.reshape(n, FRAMES, SIZE, SIZE).clamp(0, 1)


def random_paths(motions: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Starts and travels [B, 2] (x, y in pixels) for motion indices [B]; the digit's box stays on the canvas throughout."""
    travel = travels(motions)
    room = SIZE - DIGIT_SIZE - travel.abs()
    return torch.rand(len(motions), 2, generator=rng) * room + (-travel).clamp(min=0), travel


def travels(motions: Tensor) -> Tensor:
    """Pixels from the first frame to the last [B, 2] (x, y) for motion indices [B]."""
    table = torch.tensor([(0.0, 0.0), *((u * TRAVEL[s], v * TRAVEL[s]) for u, v in UNIT.values() for s in SPEEDS)])
    return table[motions]


def motions_from(start: Tensor) -> list[int]:
    """Indices into MOTIONS that keep the digit's box on the canvas, from its corner `start` [2] (x, y in pixels) in the first frame; still is one."""
    ends = start + travels(torch.arange(len(MOTIONS)))
    return ((ends >= 0) & (ends <= SIZE - DIGIT_SIZE)).all(1).nonzero()[:, 0].tolist()


def draw(split: Split, specs: Sequence[PromptSpec], rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Scans [B, 8, 8], digits [B] and motions [B] that fit the specs; what a spec leaves open is uniform."""
    scans, _, members = _split(split)
    chosen, digits, motions = [], [], []
    for spec in specs:
        u, v, w = torch.rand(3, generator=rng).tolist()
        digit = spec.digit if spec.digit is not None else int(u * 10)
        allowed = motions_allowed(spec)
        digits.append(digit)
        motions.append(allowed[int(v * len(allowed))])
        chosen.append(members[digit][int(w * len(members[digit]))])
    return scans[torch.tensor(chosen)], torch.tensor(digits), torch.tensor(motions)


def render(split: Split, specs: Sequence[PromptSpec], seed: int) -> Tensor:
    """Real videos that fit the specs: media [B, 3, 9, 48, 48] in [0, 1]; the same seed gives the same videos."""
    rng = torch.Generator().manual_seed(seed)
    scans, _, motions = draw(split, specs, rng)
    frames = place(scans, *random_paths(motions, rng))
    return frames[:, None].expand(-1, 3, -1, -1, -1).contiguous()
