"""The bundled models, ready to train: moving digits (the default) and class-conditional digits, each with prompts, reward, monitor and real samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instep.data import digits
from instep.models import DIGITS, MOVING_DIGITS, load
from instep.models.dit import DiTFamily
from instep.models.wan import WanFamily
from instep.rewards.class_judges import ClassJudge, Scale, load_class_judge
from instep.rewards.judges import Judge, load_judge
from instep.train.source import RealSamples


@dataclass(frozen=True)
class JudgeMonitor:
    """A judge as the run's monitor: share of samples with the right digit and motion, its mean log-probability, and the motions it sees
    where a prompt names a digit only."""

    judge: Judge
    open_prompts: tuple[str, ...] = tuple(digits.describe(digits.PromptSpec(digit)) for digit in range(10))
    open_copies: int = 8

    @torch.no_grad()
    def figures(self, media: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        return {
            "monitor_both": float(self.judge.correct(media, prompts).both.float().mean()),
            "monitor_score": float(self.judge.score(media, prompts).mean()),
        }

    @torch.no_grad()
    def modes(self, media: Tensor) -> float:
        """Mean number of different motions among the samples of each open prompt: 5.5 of 8 samples where all nine are equally likely."""
        seen = self.judge.logits(media)[1].argmax(1).reshape(-1, self.open_copies)
        return sum(len(row.unique()) for row in seen) / len(seen)


@dataclass(frozen=True)
class MovingDigits:
    """Everything a recipe may ask for on the embedded default."""

    family: WanFamily
    prompts: tuple[str, ...]
    reward: Judge
    monitor: JudgeMonitor

    def real(self, n: int = 1024, seed: int = 77) -> RealSamples:
        """Real videos of the training split through the VAE, each with one of the training prompts: what DM-Align (Pair) prefers."""
        rng = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self.prompts), (n,), generator=rng).tolist()
        names = tuple(self.prompts[i] for i in chosen)
        media = digits.render("train", [digits.parse(name) for name in names], seed)
        with torch.no_grad():
            latents = torch.cat([self.family.encode_media(part) for part in media.split(32)])
        return RealSamples(names, latents)


def moving_digits() -> MovingDigits:
    """Loads the bundled pipeline and judges; half a second."""
    family = load(MOVING_DIGITS)
    assert isinstance(family, WanFamily)
    return MovingDigits(family, tuple(digits.training_prompts()), load_judge("training"), JudgeMonitor(load_judge("monitor")))


@dataclass(frozen=True)
class ClassDigits:
    """Everything a recipe may ask for on the class-conditional digits."""

    family: DiTFamily
    prompts: tuple[str, ...]
    reward: ClassJudge
    monitor: ClassJudge

    def real(self) -> RealSamples:
        """The 800 scans of the training split, each with its class."""
        scans, classes = digits.scans_of("train")
        return RealSamples(tuple(str(int(c)) for c in classes), scans[:, None] * 2 - 1)


def class_digits(scale: Scale = "log") -> ClassDigits:
    """Loads the bundled class-conditional model and judges; `scale` of the reward: log p of the class, or p."""
    family = load(DIGITS)
    assert isinstance(family, DiTFamily)
    reward, monitor = load_class_judge("training", scale=scale), load_class_judge("monitor")
    return ClassDigits(family, tuple(str(i) for i in range(10)), reward, monitor)
