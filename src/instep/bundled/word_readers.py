"""Two readers of moving-words videos: one to train on, one to watch. What reports results is the recognition network of somebody else.

A reader reads the word of each frame by itself and tells the video's motion, size and font. `reward` is differentiable, `exact_match` is the same reader as
a black box, `monitor` is the other one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from instep.bundled import MOVING_WORDS, folder_of, words
from instep.bundled.ctc import best_path, ctc_log_probability
from instep.bundled.features import ClassifierFeatures
from instep.bundled.glyphs import FONTS, LETTERS
from instep.bundled.word_networks import ARCHITECTURES, LOOK, MOTION, WORD, ReaderName, Seen, Trunk
from instep.data.prompt import Prompt
from instep.rewards.base import Reward
from instep.rewards.features import Features
from instep.training.probe import Monitor

FOLDER = folder_of(MOVING_WORDS) / "readers"
INK = 0.5  # a pixel darker than this is ink
MIDDLE = slice(3, 6)  # the frames in which every real word lies wholly on the canvas
SCORED = slice(0, words.FRAMES, 2)  # the frames whose log-probability is taken: their neighbours look alike
ROWS = 64  # videos judged at a time


@dataclass(frozen=True)
class Attributes:
    """What videos show besides their word, most probable classes [B]: indices into MOTIONS, SIZES and FONTS."""

    motion: Tensor
    size: Tensor
    font: Tensor


@dataclass(frozen=True)
class Reading:
    """All that a reader finds in videos: each frame's text, the frames that count [B, 9] (`whole_frames`), attributes, and features [B, 128]."""

    texts: list[list[str]]
    counts: Tensor
    attributes: Attributes
    features: Tensor


@dataclass(frozen=True)
class Correct:
    """Per video [B], bool: word right, motion right, size and font right, word and motion right; what the prompt leaves open counts as right."""

    word: Tensor
    motion: Tensor
    look: Tensor
    both: Tensor


def whole_frames(grey: Tensor) -> Tensor:
    """Frames that count, bool [B, 9], of grey videos [B, 9, 32, 64]: no ink touches the edge of the canvas. The three in the middle always count."""
    ink = grey < INK
    whole = ~(ink[..., 0, :].any(-1) | ink[..., -1, :].any(-1) | ink[..., 0].any(-1) | ink[..., -1].any(-1))
    whole[:, MIDDLE] = True
    return whole


class WordReader(nn.Module):
    """A frozen reader; `log_probability` and `features` are differentiable with respect to the video's pixels.

    Media are [B, 3, 9, 32, 64] in [0, 1], dark on light; ValueError for another shape. `accuracy`: shares right on real videos of held-out words.
    """

    def __init__(self, name: ReaderName, net: Trunk, accuracy: dict[str, float]) -> None:
        super().__init__()
        self.name, self.net, self.accuracy = name, net, accuracy
        self.eval().requires_grad_(False)

    def forward(self, media: Tensor) -> Seen:
        """What the network makes of media; everything else follows from it."""
        return self.net(_grey(media))

    @torch.no_grad()
    def judge(self, media: Tensor) -> Reading:
        """Texts, frames that count, attributes and features of media, in one pass."""
        parts = [self._judge(part) for part in media.split(ROWS)]
        attributes = Attributes(*(torch.cat([getattr(part.attributes, key) for part in parts]) for key in ("motion", "size", "font")))
        counts, features = torch.cat([part.counts for part in parts]), torch.cat([part.features for part in parts])
        return Reading([text for part in parts for text in part.texts], counts, attributes, features)

    def _judge(self, media: Tensor) -> Reading:
        seen = self(media)
        texts = ["".join(LETTERS[symbol - 1] for symbol in path) for path in best_path(seen.log_p.flatten(0, 1))]
        logits = (self.net.moved(seen.motion), self.net.size(seen.look), self.net.font(seen.look))
        frames = seen.log_p.shape[1]
        by_video = [texts[i : i + frames] for i in range(0, len(texts), frames)]
        return Reading(by_video, whole_frames(_grey(media)), Attributes(*(x.argmax(1) for x in logits)), _features(seen))

    def read(self, media: Tensor) -> list[list[str]]:
        """The text of each of the 9 frames of each video: what the most probable path reads, of any length."""
        return self.judge(media).texts

    def attributes(self, media: Tensor) -> Attributes:
        """The most probable motion, size and font of each video."""
        return self.judge(media).attributes

    def log_probability(self, media: Tensor, asked: Sequence[str]) -> Tensor:
        """CTC log-probability of each video's word, divided by its four letters, [B] <= 0.

        The mean over every second frame (0, 2, 4, 6, 8) in which no ink touches the edge of the canvas; frame 4 always counts.
        """
        grey = _grey(media)
        counts, frames = whole_frames(grey)[:, SCORED], grey[:, SCORED]
        symbols = torch.tensor([[1 + LETTERS.index(letter) for letter in word] for word in asked], device=grey.device)
        log_p = ctc_log_probability(self.net.read(frames.flatten(0, 1))[0], symbols.repeat_interleave(frames.shape[1], 0))
        return (log_p.view_as(counts) * counts).sum(1) / (counts.sum(1) * words.LENGTH)

    def features(self, media: Tensor) -> Tensor:
        """Penultimate features [B, 128]: 64 of the letters, mean over columns and frames (so without their order), 32 of size and font, 32 of the motion."""
        return _features(self(media))

    def asked(self, prompts: Sequence[Prompt | str]) -> Tensor:
        """What prompts ask for, in the space of `features` [B, 128]: the last layers' weights, mean over what is asked less the mean over all classes.

        Zeros for what is left open, and no order of the letters.
        """
        specs = list(map(words.parse, prompts))
        letters = self.net.letters.weight[1:]
        word = torch.stack([letters[[LETTERS.index(letter) for letter in spec.word]].mean(0) for spec in specs]) - letters.mean(0)
        size = _chosen(self.net.size.weight, [_all_or(words.SIZES, spec.size) for spec in specs])
        font = _chosen(self.net.font.weight, [_all_or(FONTS, spec.font) for spec in specs])
        return torch.cat([word, size + font, _chosen(self.net.moved.weight, [words.motions_allowed(spec) for spec in specs])], 1)

    def correct(self, media: Tensor, prompts: Sequence[Prompt | str]) -> Correct:
        """What of the prompts is right. A word is right when it is read exactly in more than half of the frames that count."""
        return correct_of(self.judge(media), prompts)


def correct_of(reading: Reading, prompts: Sequence[Prompt | str]) -> Correct:
    """`WordReader.correct` of videos that were judged before."""
    specs = list(map(words.parse, prompts))
    hits = torch.tensor([[text == spec.word for text in texts] for texts, spec in zip(reading.texts, specs, strict=True)])
    counts = reading.counts.cpu()
    word = (hits & counts).sum(1) * 2 > counts.sum(1)
    found = reading.attributes
    motion, size, font = (
        torch.tensor([int(index) in allowed for index, allowed in zip(seen.tolist(), classes, strict=True)])
        for seen, classes in (
            (found.motion, [words.motions_allowed(spec) for spec in specs]),
            (found.size, [_all_or(words.SIZES, spec.size) for spec in specs]),
            (found.font, [_all_or(FONTS, spec.font) for spec in specs]),
        )
    )
    return Correct(word, motion, size & font, word & motion)


def _all_or(names: Sequence[str], said: str | None) -> list[int]:
    """The index of what a prompt says, or all where it leaves it open."""
    return list(range(len(names))) if said is None else [names.index(said)]


def _chosen(weight: Tensor, classes: Sequence[Sequence[int]]) -> Tensor:
    """Rows of a last layer [C, D], mean over the classes that are allowed less the mean over all: [B, D]."""
    return torch.stack([weight[list(allowed)].mean(0) for allowed in classes]) - weight.mean(0)


def _features(seen: Seen) -> Tensor:
    return torch.cat([seen.word, seen.look, seen.motion], 1)


def _grey(media: Tensor) -> Tensor:
    expected = (3, words.FRAMES, words.HEIGHT, words.WIDTH)
    if media.ndim != 5 or media.shape[1:] != expected:
        raise ValueError(f"media: shape {tuple(media.shape)} is not allowed; this reader takes [B, {', '.join(map(str, expected))}] in [0, 1]")
    return media.float().mean(1)


def reader(which: ReaderName, folder: Path = FOLDER) -> WordReader:
    """A bundled reader, float32, frozen; each call with the same arguments gives the same object."""
    return _load(which, Path(folder))


@cache
def _load(which: ReaderName, folder: Path) -> WordReader:
    from safetensors.torch import load_file

    if which not in get_args(ReaderName):
        raise ValueError(f"which: {which!r} is not allowed; use one of {', '.join(get_args(ReaderName))}")
    net = ARCHITECTURES[which]()
    net.load_state_dict({k: v.float() for k, v in load_file(folder / f"{which}.safetensors").items()})
    return WordReader(which, net, json.loads((folder / f"{which}.json").read_text())["accuracy"])


@dataclass(frozen=True)
class WordLogProbability:
    """`WordReader.log_probability` of the prompts' words as a reward, [B] <= 0; nothing else that a prompt says is looked at."""

    reader: WordReader
    name: str = "word log-probability"
    differentiable: ClassVar[bool] = True
    space: ClassVar[Literal["pixel", "latent"]] = "pixel"

    def score(self, media: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
        return self.reader.log_probability(media, [words.parse(prompt).word for prompt in prompts])


@dataclass(frozen=True)
class WordMatch:
    """1 where a video's word is right (`WordReader.correct`), else 0, as a reward without a gradient."""

    reader: WordReader
    name: str = "word match"
    differentiable: ClassVar[bool] = False
    space: ClassVar[Literal["pixel", "latent"]] = "pixel"

    def score(self, media: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
        return self.reader.correct(media, prompts).word.float().to(media.device)


def _open_prompts() -> tuple[Prompt, ...]:
    """Four words whose motion alone is open, of nine, then four whose size and font are open, of eight together."""
    rng = torch.Generator().manual_seed(12)
    shown = [words.complete(words.Spec(word), rng) for word in words.random_words("train", 8, rng)]
    looks = [words.Spec(spec.word, size=spec.size, font=spec.font) for spec in shown[:4]]
    moves = [words.motion_spec(spec.word, words.motion_of(spec)) for spec in shown[4:]]
    return tuple(Prompt(words.describe(spec)) for spec in looks + moves)


@dataclass(frozen=True)
class ReaderMonitor:
    """A reader as the run's monitor: shares of samples with the right word, and with the right word and motion; the words' mean log-probability; and how many
    motions, or sizes and fonts together, it sees where a prompt leaves them open."""

    reader: WordReader
    open_prompts: tuple[Prompt, ...] = _open_prompts()
    open_copies: int = 8

    @torch.no_grad()
    def metrics(self, media: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        right = self.reader.correct(media, prompts)
        score = self.reader.log_probability(media, [words.parse(prompt).word for prompt in prompts])
        shares = {"monitor_both": right.both, "monitor_word": right.word}
        return {key: float(share.float().mean()) for key, share in shares.items()} | {"monitor_score": float(score.mean())}

    def modes(self, media: Tensor) -> float:
        """Mean over the open prompts of the number of different motions among their samples, or of different looks where there are more: 5.4 of 8 samples
        where all that is open is equally likely."""
        found = self.reader.attributes(media)
        groups = zip(*(x.view(-1, self.open_copies) for x in (found.motion, found.size * len(FONTS) + found.font)), strict=True)
        seen = [max(len(motions.unique()), len(looks.unique())) for motions, looks in groups]
        return sum(seen) / len(seen)


def reward() -> Reward:
    """The training reader's log-probability of the prompt's word, differentiable."""
    return WordLogProbability(reader("training"))


def exact_match() -> Reward:
    """Whether the training reader reads the prompt's word: a black box."""
    return WordMatch(reader("training"))


def monitor() -> Monitor:
    """The reader that no loss uses."""
    return ReaderMonitor(reader("monitor"))


def features(which: ReaderName) -> Features:
    """What a reward learned from preferences reads of moving words."""
    return ClassifierFeatures(MOVING_WORDS, reader(which), words.VIDEO, 3 * (WORD + LOOK + MOTION))
