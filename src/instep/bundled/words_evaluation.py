"""How moving words are measured: prompts with words that are held out of training, PP-OCR where it is installed, two readers of ours, real reference videos."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from instep.bundled import words
from instep.bundled.glyphs import FONTS
from instep.bundled.outside_reader import MISSING, OutsideReader, installed, outside_reader
from instep.bundled.protocol import PromptSet, generated_row, of_features, of_videos, rank, real_row
from instep.bundled.word_figures import WordFigures, figures_of
from instep.bundled.word_readers import FOLDER, Attributes, WordReader, correct_of, reader
from instep.bundled.words_columns import COLUMNS
from instep.bundled.world import EvalSize
from instep.metrics import figures as m
from instep.metrics.columns import Column
from instep.metrics.compare import Cost, Generate, Kind, Row
from instep.metrics.figures import Value

# raise it whenever a row comes out otherwise than before (other prompts, metrics, keys or seeds): rows that were kept are then measured anew
VERSION = 1
REFERENCE_DRAWS = 4  # real videos a prompt: the fewer, the more the Frechet distance is biased upward
PROMPT_SEED = 910_000  # of the words in the prompts, the same for every model and seed
PROMPTS = {"quick": (144, 6, 16), "full": (420, 12, 16)}  # specified prompts, open ones, samples of each open one
READERS: dict[str, Any] = {"train": "training", "monitor": "monitor"}


@dataclass(frozen=True)
class WordsSet(PromptSet):
    """Prompts of words: the full ones say everything, the open ones the word alone."""

    @property
    def words(self) -> list[str]:
        """The word of each prompt."""
        return [words.parse(prompt).word for prompt in self.prompts]

    @property
    def order(self) -> Tensor:
        """A number for each prompt [N]; equal ones are equal, near ones have the same motion, size and font."""

        def key(prompt: str) -> tuple[Any, ...]:
            spec = words.parse(prompt)
            return prompt in self.open, words.motions_allowed(spec), str(spec.size), str(spec.font), spec.word

        return rank(self.prompts, key)


def evaluation_set(name: EvalSize = "quick", seed: int = 0, negative: str | None = None) -> WordsSet:
    """`quick`: 144 prompts that say everything and 6 that say the word alone, 16 samples of each; `full`: 420, and 12. Every word is held out of training."""
    full, many, copies = PROMPTS[name]
    specified = words.prompts_of("heldout", full, PROMPT_SEED, full=1.0)
    rng = torch.Generator().manual_seed(PROMPT_SEED + 1)
    open_ = [words.describe(words.Spec(word)) for word in words.random_words("heldout", many, rng)]
    return WordsSet(tuple(specified), tuple(prompt for prompt in open_ for _ in range(copies)), seed, name, negative)


@torch.no_grad()
def measure(raw: Tensor, cost: Cost, asked: WordsSet, readers: Mapping[str, WordReader], outside: OutsideReader | None) -> dict[str, Value]:
    """All metrics of unclamped media [N, 3, 9, 32, 64] for the set's prompts, in their order; `readers` by short name, "train" and "monitor"."""
    if len(raw) != len(asked.prompts):
        raise ValueError(f"raw: {len(raw)} videos for {len(asked.prompts)} prompts; generate returns one video a prompt")
    media, wanted, full, order = raw.clamp(0, 1), asked.words, len(asked.full), asked.order
    values: dict[str, Value] = {}
    readings = {name: reader.judge(media) for name, reader in readers.items()}
    seen = readings["monitor"]
    if outside is not None:
        values |= _read("heldout", figures_of(outside.texts(media, seen.counts), seen.counts, wanted), full, order)
    for name in ("monitor", "train"):
        values |= _read(name, figures_of(readings[name].texts, readings[name].counts, wanted), full, order)
    right = correct_of(seen, asked.prompts)
    values |= {"monitor_motion": m.of_share(right.motion[:full]), "monitor_look": m.of_share(right.look[:full])}
    log_p = torch.cat([readers["train"].log_probability(part, wanted[i * 64 : i * 64 + 64]) for i, part in enumerate(media.split(64))])
    values["train_score"] = m.of_mean(log_p[:full], order[:full])
    values |= of_features(seen.features, reference_features(asked, readers["monitor"]), order, full)
    values |= open_prompt_metrics(seen.attributes, seen.features, asked)
    return values | of_videos(raw, order, cost, subject=lambda light: 1 - light)


def _read(name: str, found: WordFigures, full: int, order: Tensor) -> dict[str, Value]:
    """The figures of one reader: of prompts that say everything, and of all of them whether they can be read."""
    return {
        f"{name}_word": m.of_share(found.word[:full]),
        f"{name}_letters": m.of_mean(found.letters[:full], order[:full]),
        f"{name}_word_open": m.of_share(found.word[full:]),
        f"{name}_legible": m.of_share(found.legible),
    }


def open_prompt_metrics(found: Attributes, features: Tensor, asked: WordsSet) -> dict[str, Value]:
    """Diversity on prompts that say the word alone: motions, sizes and fonts seen, all three together, and the Vendi score of features."""
    full = len(asked.full)
    group = rank(asked.open, key=asked.open.index)
    motion, size, font = (x[full:].cpu() for x in (found.motion, found.size, found.font))
    joint = (motion * len(words.SIZES) + size) * len(FONTS) + font
    modes = {"modes_motion": motion, "modes_size": size, "modes_font": font, "modes": joint}
    return {key: m.modes_covered(mode, group) for key, mode in modes.items()} | {"vendi": m.vendi_by_group(features[full:].cpu(), group)}


def reference_features(asked: WordsSet, monitor: WordReader) -> Tensor:
    """Features of real reference videos, `REFERENCE_DRAWS` for each of the set's prompts, [N, draws, D]."""
    if "monitor" not in asked.reference:
        draws = [monitor.judge(real_videos(asked, 900_100 + i)).features for i in range(REFERENCE_DRAWS)]
        asked.reference["monitor"] = torch.stack(draws, 1)
    return asked.reference["monitor"]


def real_videos(asked: WordsSet, seed: int) -> Tensor:
    """Real videos that fit the set's prompts."""
    return words.render([words.parse(prompt) for prompt in asked.prompts], seed).media


@cache
def _reader_files() -> bytes:
    """The digest of the readers' weights."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.safetensors")))).digest()


@dataclass(frozen=True)
class WordsEvaluation:
    """The protocol of moving words. Its headline is PP-OCR's share of right words, or without PP-OCR the monitor's."""

    columns: tuple[Column, ...] = COLUMNS
    reader: Callable[[Any], WordReader] = reader
    outside: Callable[[], OutsideReader | None] = outside_reader
    has_outside: Callable[[], bool] = installed

    @property
    def accuracies(self) -> Mapping[str, Mapping[str, float]]:
        return {short: self.reader(name).accuracy for short, name in READERS.items()}

    @property
    def notice(self) -> str | None:
        return None if self.has_outside() else MISSING

    def complete(self, row: Row) -> bool:
        return "heldout_word" in row.values or not self.has_outside()

    def prompts(self, size: EvalSize = "quick", seed: int = 0, negative: str | None = None) -> WordsSet:
        return evaluation_set(size, seed, negative)

    def protocol(self, eval_set: WordsSet) -> str:
        return eval_set.name

    def fingerprint(self, eval_set: WordsSet) -> bytes:
        asked = [VERSION, eval_set.name, eval_set.seed, eval_set.full, eval_set.open, eval_set.negative]
        return json.dumps(asked).encode() + _reader_files()

    def row(self, name: str, kind: Kind, generate: Generate, eval_set: WordsSet, *, steps: int, guidance: float = 1.0) -> Row:
        return generated_row(name, kind, generate, eval_set, self._measure(eval_set), steps=steps, guidance=guidance)

    def real_row(self, eval_set: WordsSet, through: Callable[[Tensor], Tensor] | None = None) -> Row:
        return real_row(real_videos(eval_set, 900_002), self._measure(eval_set), through)

    def _measure(self, eval_set: WordsSet) -> Callable[[Tensor, Cost], dict[str, Value]]:
        readers = {short: self.reader(name) for short, name in READERS.items()}
        return lambda raw, cost: measure(raw, cost, eval_set, readers, self.outside())
