"""Moving words: words of four random letters that stand still or move over a small canvas, and the prompts that name them.

A video is grey (3 equal channels), dark letters on a light ground, 9 frames of 64 x 32 (width x height). A word is drawn in one of four fonts, its capitals
10 to 11 px (small) or 13 to 14 px (large) tall, and travels 12 px (fast) or 6 px (slowly). Words are random, so nearly none stands in a dictionary, and a
tenth of all words, chosen by a hash of their letters, is held out of training.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from instep.bundled.glyphs import CAP_HEIGHT, FONTS, LETTERS, spread
from instep.bundled.motions import DIRECTIONS, MOTIONS, SPEEDS, UNIT, direction_and_speed, motions_that_fit, said
from instep.core.size import Size
from instep.data.prompt import Prompt, texts_of

FRAMES, HEIGHT, WIDTH, LENGTH = 9, 32, 64, 4
VIDEO = Size(HEIGHT, WIDTH, FRAMES)
CAPITALS = {"small": (10.0, 11.0), "large": (13.0, 14.0)}  # height of a capital in pixels, from and to
WIDEST = WIDTH - 4  # a wider word is drawn smaller
OFF_CENTRE = 3.0  # pixels, at most, from the centre of the canvas to that of the word in the middle of a video
TRAVEL = {"slowly": 6.0, "fast": 12.0}  # pixels from the first frame to the last
SIZES = tuple(CAPITALS)
HELD_OUT = 10  # one word in so many
Split = Literal["train", "heldout"]
_GRAMMAR = re.compile(
    rf"the word (?P<word>[A-Z]{{{LENGTH}}})(?: in(?: (?P<size>{'|'.join(SIZES)}))?(?: (?P<font>{'|'.join(FONTS)}))? letters)?"
    rf"(?: (?P<still>standing still)| moving (?P<direction>{'|'.join(DIRECTIONS)})(?: (?P<speed>{'|'.join(SPEEDS)}))?)?"
)


@dataclass(frozen=True)
class Spec:
    """What a prompt says: a word of four letters A-Z, a direction ("still" included), a speed, a size and a font; None is left open."""

    word: str
    direction: str | None = None
    speed: str | None = None
    size: str | None = None
    font: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(f"[A-Z]{{{LENGTH}}}", self.word):
            raise ValueError(f"word: {self.word!r} is not allowed; use {LENGTH} capitals A to Z")
        allowed = {"direction": ("still", *DIRECTIONS), "speed": SPEEDS, "size": SIZES, "font": FONTS}
        for name, values in allowed.items():
            if getattr(self, name) not in (None, *values):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed; use one of {', '.join(values)}, or None to leave it open")
        if self.speed is not None and self.direction not in DIRECTIONS:
            raise ValueError(f"speed: {self.speed!r} needs a direction out of {', '.join(DIRECTIONS)}, got {self.direction!r}")


def describe(spec: Spec) -> str:
    """The prompt that says exactly `spec`; inverse of `parse`."""
    words = ["the word", spec.word]
    if spec.size or spec.font:
        words += ["in", *filter(None, (spec.size, spec.font)), "letters"]
    return " ".join([*words, *said(spec.direction, spec.speed)])


def parse(prompt: Prompt | str) -> Spec:
    """What a prompt's text says; ValueError for a prompt outside the grammar. The word is written in capitals, everything else in small letters."""
    (text,) = texts_of([prompt])
    found = _GRAMMAR.fullmatch(" ".join(text.split()))
    if found is None or " in letters" in text:
        raise ValueError(
            f"prompt: {text!r} is outside the grammar; write for example 'the word KTLB', 'the word KTLB moving left slowly', "
            f"'the word KTLB in large serif letters standing still'; sizes: {', '.join(SIZES)}; fonts: {', '.join(FONTS)}"
        )
    return Spec(found["word"], "still" if found["still"] else found["direction"], found["speed"], found["size"], found["font"])


def split_of(word: str) -> Split:
    """Whether a word may be trained on: the SHA-256 of its letters holds one word in ten out."""
    return "heldout" if int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") % HELD_OUT == 0 else "train"


def random_words(split: Split, n: int, rng: torch.Generator) -> list[str]:
    """n random words of a split, each equally likely; a word may come twice."""
    if split not in get_args(Split):
        raise ValueError(f"split: {split!r} is not allowed; use one of {', '.join(get_args(Split))}")
    found: list[str] = []
    while len(found) < n:
        drawn = torch.randint(len(LETTERS), (2 * n, LENGTH), generator=rng).tolist()
        found += [word for word in ("".join(LETTERS[i] for i in row) for row in drawn) if split_of(word) == split]
    return found[:n]


def motion_spec(word: str, motion: int) -> Spec:
    """A spec with the motion of index `motion` in MOTIONS fully said."""
    return Spec(word, *direction_and_speed(motion))


def motion_of(spec: Spec) -> int:
    """Index into MOTIONS of a spec that leaves nothing of its motion open."""
    return MOTIONS.index(" ".join(filter(None, (spec.direction, spec.speed))))


def motions_allowed(spec: Spec) -> list[int]:
    """Indices into MOTIONS that fit the spec; all nine if it says nothing of motion."""
    return motions_that_fit(spec.direction, spec.speed)


def complete(spec: Spec, rng: torch.Generator) -> Spec:
    """The spec with everything that it leaves open drawn, each choice equally likely."""
    u, v, w = torch.rand(3, generator=rng).tolist()
    allowed = motions_allowed(spec)
    moving = motion_spec(spec.word, allowed[int(u * len(allowed))])
    return replace(moving, size=spec.size or SIZES[int(v * len(SIZES))], font=spec.font or FONTS[int(w * len(FONTS))])


def partial(spec: Spec, u: Tensor, full: float) -> Spec:
    """A random part of a complete spec; u [2] uniform numbers in [0, 1). All of it with probability `full`; else size, font and direction are each said in
    half of the cases, and the speed in half of those that say a direction. The word is always said."""
    if u[0] < full:
        return spec
    size, font, direction, speed = (bool(int(u[1] * 16) >> k & 1) for k in range(4))
    said = Spec(spec.word, size=spec.size if size else None, font=spec.font if font else None)
    return replace(said, direction=spec.direction, speed=spec.speed if speed else None) if direction else said


def prompts_of(split: Split, n: int, seed: int, full: float = 0.5) -> list[str]:
    """n prompts with random words of a split; a share `full` says everything, the rest a random part."""
    rng = torch.Generator().manual_seed(seed)
    words = random_words(split, n, rng)
    return [describe(partial(complete(Spec(word), rng), torch.rand(2, generator=rng), full)) for word in words]


def training_prompts() -> list[str]:
    """The 512 prompts bundled for distillation, each equally likely: random words of the training split, half of the prompts leave something open."""
    return prompts_of("train", 512, seed=0)


@dataclass(frozen=True)
class Drawn:
    """Videos that show `shown` (complete specs): media [N, 3, 9, 32, 64] in [0, 1], the ink's box in each frame [N, 9, 4] (left, top, right, bottom in pixels;
    the canvas spans 0 to 64 and 0 to 32), where each letter's ink begins and ends [N, 9, 4, 2] (left, right), and whether the word lies wholly on the
    canvas [N, 9]."""

    media: Tensor
    boxes: Tensor
    letters: Tensor
    whole: Tensor
    shown: tuple[Spec, ...]


def render(specs: Sequence[Spec], seed: int) -> Drawn:
    """Real videos that fit the specs; what a spec leaves open is uniform, and the same seed gives the same videos on every machine."""
    return draw(specs, torch.Generator().manual_seed(seed))


def draw(specs: Sequence[Spec], rng: torch.Generator) -> Drawn:
    """Real videos that fit the specs, from a generator that goes on. The word starts anywhere such that it stays on the canvas; one that is too wide for its
    motion is whole in the middle of the video."""
    shown = tuple(complete(spec, rng) for spec in specs)
    return place(shown, torch.rand(len(shown), 3, generator=rng, dtype=torch.float64))


def place(shown: Sequence[Spec], u: Tensor) -> Drawn:
    """Videos of complete specs; u [N, 3] in [0, 1]: the capitals' height within the size, and the start (x, y) within the room there is."""
    u = u.double()
    words = [spread(spec.word, spec.font or "") for spec in shown]
    tall = torch.tensor([CAPITALS[spec.size or ""] for spec in shown], dtype=torch.float64)
    ink = torch.tensor([word.ink for word in words], dtype=torch.float64)  # left, top, right, bottom in the letters' own pixels
    scale = (tall[:, 0] + u[:, 0] * (tall[:, 1] - tall[:, 0])) / CAP_HEIGHT
    scale = torch.minimum(scale, WIDEST / (ink[:, 2] - ink[:, 0]))
    extent = (ink[:, 2:] - ink[:, :2]) * scale[:, None]
    travel = torch.tensor([_travel(spec) for spec in shown], dtype=torch.float64)
    room = torch.tensor([WIDTH, HEIGHT], dtype=torch.float64) - extent - travel.abs()
    start = room / 2 + (u[:, 1:] - 0.5) * room.clamp(0, 2 * OFF_CENTRE) + (-travel).clamp(min=0)
    corner = start[:, None] + torch.linspace(0, 1, FRAMES, dtype=torch.float64)[None, :, None] * travel[:, None]
    boxes = torch.cat([corner, corner + extent[:, None]], -1)
    whole = (boxes[..., :2] >= -1e-9).all(-1) & (boxes[..., 2] <= WIDTH + 1e-9) & (boxes[..., 3] <= HEIGHT + 1e-9)
    origin = corner - (ink[:, :2] * scale[:, None])[:, None]
    ends = torch.tensor([word.letters for word in words], dtype=torch.float64) * scale[:, None, None]
    letters = (origin[:, :, None, None, 0] + ends[:, None]).float()
    frames = torch.stack([_frames(word.pixels, at, float(s)) for word, at, s in zip(words, origin, scale, strict=True)])
    media = (1 - frames).mul(255).round().div(255).float()
    return Drawn(media[:, None].expand(-1, 3, -1, -1, -1).contiguous(), boxes.float(), letters, whole, tuple(shown))


def _travel(spec: Spec) -> tuple[float, float]:
    """Pixels (x, y) from the first frame to the last."""
    x, y = UNIT.get(spec.direction or "", (0.0, 0.0))
    return x * TRAVEL.get(spec.speed or "", 0.0), y * TRAVEL.get(spec.speed or "", 0.0)


def _frames(pixels: Tensor, origin: Tensor, scale: float) -> Tensor:
    """The word's picture [rows, columns] in [0, 1], scaled and put at origin [F, 2] (x, y): frames [F, 32, 64]. A pixel is the mean over its area."""
    across = _overlap(WIDTH, pixels.shape[1], origin[:, 0], scale)
    down = _overlap(HEIGHT, pixels.shape[0], origin[:, 1], scale)
    return (down @ pixels @ across.mT).clamp(0, 1)


def _overlap(n: int, m: int, origin: Tensor, scale: float) -> Tensor:
    """Length of canvas pixel i [i, i + 1] that source pixel j covers, [F, n, m]; source pixel j spans origin + scale [j, j + 1]."""
    i = torch.arange(n, dtype=torch.float64)[None, :, None]
    left = origin[:, None, None] + scale * torch.arange(m, dtype=torch.float64)[None, None]
    return (torch.minimum(i + 1, left + scale) - torch.maximum(i, left)).clamp(min=0)
