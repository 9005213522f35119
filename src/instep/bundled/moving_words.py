"""The moving-words world: a miniature Wan pipeline that writes a word of random letters and moves it, with prompts, readers, real videos and labelled pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from instep import models
from instep.bundled import MOVING_WORDS, folder_of, presets, word_readers, words
from instep.bundled.glyphs import LETTERS
from instep.bundled.teacher_probe import known_metrics
from instep.bundled.word_readers import WordReader
from instep.bundled.words_evaluation import WordsEvaluation
from instep.bundled.world import World, as_miniature, encoded, text_to_video_pipeline
from instep.core.size import Size
from instep.data.media import slow_motion
from instep.data.prompt import Prompt, as_prompts
from instep.data.samples import PairSamples, RealSamples
from instep.diffusion.guidance import GuidanceByLevel
from instep.models.family import Family
from instep.models.wan import WanFamily
from instep.rewards.base import Reward
from instep.training.probe import Monitor, Probe

# what `instep sample` draws; the words are held out of training
SHOWN = ("the word CQSL moving left slowly", "the word RMAF in large serif letters standing still", "the word OJAL in spartan letters")


@dataclass(frozen=True)
class MovingWords:
    """Everything a recipe may need on moving words."""

    family: WanFamily
    prompts: tuple[Prompt, ...]
    reward: Reward
    monitor: Monitor

    @property
    def classifiers(self) -> tuple[WordReader, WordReader]:
        """The training and the monitor reader."""
        return word_readers.reader("training"), word_readers.reader("monitor")

    def known_teacher(self, probe: Probe, guidance: float | GuidanceByLevel) -> Mapping[str, float] | None:
        """The teacher's metrics on a run's own probe, as they ship; None for a probe with another reward or monitor."""
        return known_metrics(self, Path(self.family.source), probe, guidance)

    def real(self, n: int = 1024, seed: int = 77) -> RealSamples:
        """Real videos through the VAE, each with one of the training prompts: what DM-Align (Pair) prefers."""
        rng = torch.Generator().manual_seed(seed)
        names = tuple(self.prompts[i] for i in torch.randint(len(self.prompts), (n,), generator=rng).tolist())
        return RealSamples(names, encoded(self.family, words.render([words.parse(name) for name in names], seed).media))

    def pairs(self, n: int = 512, seed: int = 78) -> PairSamples:
        """Labelled pairs of training prompts: a real video, and one with another letter, of another motion, or the same slowed down.

        What is wrong is drawn among what the prompt says; a copy in slow motion is drawn as often where the video moves.
        """
        good, bad, names = real_and_wrong(self.prompts, n, seed)
        return PairSamples(names, encoded(self.family, good), encoded(self.family, bad))


def real_and_wrong(prompts: tuple[Prompt, ...], n: int, seed: int) -> tuple[Tensor, Tensor, tuple[Prompt, ...]]:
    """n real videos of random prompts, as many wrong ones [n, 3, 9, 32, 64] that keep size, font and place, and their prompts."""
    rng = torch.Generator().manual_seed(seed)
    names = tuple(prompts[i] for i in torch.randint(len(prompts), (n,), generator=rng).tolist())
    specs = [words.parse(name) for name in names]
    shown = [words.complete(spec, rng) for spec in specs]
    at = torch.rand(n, 3, generator=rng, dtype=torch.float64)
    wrong = [_wrong(spec, complete, rng) for spec, complete in zip(specs, shown, strict=True)]
    good = words.place(shown, at).media
    bad = words.place([complete if other is None else other for complete, other in zip(shown, wrong, strict=True)], at).media
    slowed = torch.tensor([other is None for other in wrong])
    bad[slowed] = slow_motion(good[slowed])
    return good, bad, names


def _wrong(spec: words.Spec, shown: words.Spec, rng: torch.Generator) -> words.Spec | None:
    """What a rejected video shows where the chosen one shows `shown` for the prompt `spec`: another letter, another motion, or None: the same slowed down."""
    kinds = ["letter", *(["motion"] if spec.direction is not None else []), *(["slow"] if shown.direction != "still" else [])]
    u, v, w = torch.rand(3, generator=rng).tolist()
    kind = kinds[int(u * len(kinds))]
    if kind == "slow":
        return None
    if kind == "letter":
        place = int(v * words.LENGTH)
        other = LETTERS[(LETTERS.index(shown.word[place]) + 1 + int(w * (len(LETTERS) - 1))) % len(LETTERS)]
        return replace(shown, word=shown.word[:place] + other + shown.word[place + 1 :])
    others = [i for i in range(len(words.MOTIONS)) if i not in words.motions_allowed(spec)]
    moving = words.motion_spec(shown.word, others[int(v * len(others))])
    return replace(moving, size=shown.size, font=shown.font)


def words_world(folder: Path) -> World:
    """The world of a moving-words pipeline in `folder`."""

    def load(size: Size | None = None) -> Family:
        return as_miniature(models.load(folder, size or words.VIDEO, name=MOVING_WORDS), presets.WORDS)

    def ready() -> MovingWords:
        family = load()
        assert isinstance(family, WanFamily)
        return MovingWords(family, as_prompts(words.training_prompts()), word_readers.reward(), word_readers.monitor())

    return World(
        name=MOVING_WORDS,
        folder=folder,
        size=words.VIDEO,
        ready=ready,
        load=load,
        pipeline=lambda: text_to_video_pipeline(folder),
        shown=as_prompts(SHOWN),
        features=word_readers.features,
        evaluation=WordsEvaluation(),
        adopt=lambda family: as_miniature(family, presets.WORDS),
        rewards={"exact": word_readers.exact_match},
    )


MOVING_WORDS_WORLD = words_world(folder_of(MOVING_WORDS))
