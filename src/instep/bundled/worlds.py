"""The bundled models, ready to train: moving digits (the default), the same from a first frame, and class-conditional digits; each with prompts, reward,
monitor and real samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from instep import models
from instep.bundled import DIGITS, MOVING_DIGITS, MOVING_DIGITS_I2V, digits, folder_of, load
from instep.bundled.classifiers import FEATURES, Classifier, load_classifier
from instep.bundled.digit_classifiers import DigitClassifier, Scale, load_digit_classifier
from instep.bundled.drawn_frames import drawn_path, drawn_video
from instep.bundled.evaluation import DigitsEvaluation
from instep.bundled.features import ClassifierFeatures
from instep.bundled.moving_digits_i2v import MovingDigitsImageFamily, bundled_pipeline
from instep.bundled.teacher_probe import known_metrics
from instep.bundled.world import World, as_miniature, encoded, text_to_video_pipeline
from instep.core.size import Size
from instep.data.media import slow_motion
from instep.data.prompt import Prompt, as_prompts
from instep.data.samples import PairSamples, RealSamples
from instep.diffusion.guidance import GuidanceByLevel
from instep.models.dit import DiTFamily
from instep.models.wan import WanFamily
from instep.models.wan_i2v import WanImageFamily
from instep.rewards.base import FunctionReward, Reward
from instep.rewards.features import Features
from instep.training.probe import Probe

VIDEO = Size(digits.SIZE, digits.SIZE, digits.FRAMES)
IMAGE = Size(digits.SOURCE_SIZE, digits.SOURCE_SIZE, 1)
# first frames of each training prompt of the image-to-video model
FIRST_FRAMES = 4
# what `instep sample` draws
SHOWN = ("a seven moving left fast", "a digit standing still", "an eight")


@dataclass(frozen=True)
class ClassifierMonitor:
    """A classifier as the run's monitor: share of samples with the right digit and motion, its mean log-probability, and the motions it sees
    where a prompt names a digit only."""

    classifier: Classifier
    open_prompts: tuple[Prompt, ...] = tuple(Prompt(digits.describe(digits.PromptSpec(digit))) for digit in range(10))
    open_copies: int = 8

    @torch.no_grad()
    def metrics(self, media: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        return {
            "monitor_both": float(self.classifier.correct(media, prompts).both.float().mean()),
            "monitor_score": float(self.classifier.score(media, prompts).mean()),
        }

    @torch.no_grad()
    def modes(self, media: Tensor) -> float:
        """Mean number of different motions among the samples of each open prompt: 5.5 of 8 samples where all nine are equally likely."""
        seen = self.classifier.logits(media)[1].argmax(1).reshape(-1, self.open_copies)
        return sum(len(row.unique()) for row in seen) / len(seen)


@dataclass(frozen=True)
class MovingDigits:
    """Everything a recipe may ask for on the embedded default."""

    family: WanFamily
    prompts: tuple[Prompt, ...]
    reward: Classifier
    monitor: ClassifierMonitor

    @property
    def classifiers(self) -> tuple[Classifier, Classifier]:
        """The training and the monitor classifier."""
        return self.reward, self.monitor.classifier

    def known_teacher(self, probe: Probe, guidance: float | GuidanceByLevel) -> Mapping[str, float] | None:
        """The teacher's metrics on a run's own probe, as they ship; None for a probe with another reward or monitor."""
        return known_metrics(self, folder_of(self.family.name), probe, guidance)

    def real(self, n: int = 1024, seed: int = 77) -> RealSamples:
        """Real videos of the training split through the VAE, each with one of the training prompts: what DM-Align (Pair) prefers."""
        rng = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self.prompts), (n,), generator=rng).tolist()
        names = tuple(self.prompts[i] for i in chosen)
        media = digits.render("train", [digits.parse(name) for name in names], seed)
        return RealSamples(names, encoded(self.family, media))

    def pairs(self, n: int = 512, seed: int = 78) -> PairSamples:
        """Labelled pairs for prompts that say something: a real video of the prompt, and one of another digit, of another motion, or slowed down.

        What is wrong is drawn among what the prompt says; a copy in slow motion is drawn as often where the video moves (Diffusion-APO C.1: the same
        images, so that what is learned is motion).
        """
        rng = torch.Generator().manual_seed(seed)
        specific = [spec for spec in map(digits.parse, self.prompts) if spec.digit is not None or spec.direction is not None]
        specs = [specific[i] for i in torch.randint(len(specific), (n,), generator=rng).tolist()]
        scans, shown, motions = digits.draw("train", specs, rng)
        paths = digits.random_paths(motions, rng)
        good = digits.place(scans, *paths)[:, None].expand(-1, 3, -1, -1, -1)
        wrong = [_wrong(spec, int(motion), rng) for spec, motion in zip(specs, motions, strict=True)]
        bad = digits.render("train", [spec if other is None else other for spec, other in zip(specs, wrong, strict=True)], seed + 1)
        slowed = torch.tensor([other is None for other in wrong])
        bad[slowed] = slow_motion(good[slowed])
        return PairSamples(as_prompts(list(map(digits.describe, specs))), encoded(self.family, good), encoded(self.family, bad))


def _wrong(spec: digits.PromptSpec, motion: int, rng: torch.Generator) -> digits.PromptSpec | None:
    """What a rejected video shows of a prompt whose chosen one has motion `motion`: another digit, another motion, or None: the same in slow motion."""
    kinds = [kind for kind, fits in (("digit", spec.digit is not None), ("motion", spec.direction is not None), ("slow", motion > 0)) if fits]
    u, v = torch.rand(2, generator=rng).tolist()
    kind = kinds[int(u * len(kinds))]
    if kind == "slow":
        return None
    if kind == "digit":
        assert spec.digit is not None
        return replace(spec, digit=(spec.digit + 1 + int(v * 9)) % 10)
    others = [i for i in range(len(digits.MOTIONS)) if i not in digits.motions_allowed(spec)]
    return digits.motion_spec(spec.digit, others[int(v * len(others))])


def moving_digits() -> MovingDigits:
    """Loads the bundled pipeline and classifiers; half a second."""
    family = load(MOVING_DIGITS)
    assert isinstance(family, WanFamily)
    return MovingDigits(family, as_prompts(digits.training_prompts()), load_classifier("training"), ClassifierMonitor(load_classifier("monitor")))


@dataclass(frozen=True)
class MovingDigitsI2V:
    """Everything a recipe may ask for on the embedded image-to-video model: every prompt names a first frame of the training split."""

    family: WanImageFamily
    prompts: tuple[Prompt, ...]
    reward: Classifier
    monitor: ClassifierMonitor

    @property
    def classifiers(self) -> tuple[Classifier, Classifier]:
        """The training and the monitor classifier."""
        return self.reward, self.monitor.classifier

    def known_teacher(self, probe: Probe, guidance: float | GuidanceByLevel) -> Mapping[str, float] | None:
        """The teacher's metrics on a run's own probe, as they ship; None for a probe with another reward or monitor."""
        return known_metrics(self, folder_of(self.family.name), probe, guidance)

    def real(self, n: int = 1024, seed: int = 77) -> RealSamples:
        """Real videos of the training split through the VAE, each with a training prompt and its own first frame."""
        names = self._with_first_frames(n, seed, digits.training_prompts())
        return RealSamples(names, encoded(self.family, torch.stack([drawn_video(name) for name in names])))

    def pairs(self, n: int = 512, seed: int = 78) -> PairSamples:
        """Labelled pairs that begin alike: a real video, and one that goes wrong from its first frame on.

        What is wrong is drawn among what the prompt says: the digit turns into another, or it moves otherwise (as far as the canvas allows); a copy in
        slow motion is drawn as often where the video moves.
        """
        rng = torch.Generator().manual_seed(seed)
        specific = [p for p in digits.training_prompts() if (spec := digits.parse(p)).digit is not None or spec.direction is not None]
        names = self._with_first_frames(n, seed, specific)
        made = [_begun_alike(name, rng) for name in names]
        return PairSamples(names, *(encoded(self.family, torch.stack(media)) for media in zip(*made, strict=True)))

    def _with_first_frames(self, n: int, seed: int, prompts: Sequence[str]) -> tuple[Prompt, ...]:
        rng = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(prompts), (n,), generator=rng).tolist()
        return tuple(Prompt(prompts[i], f"train/{1000 * seed + j}") for j, i in enumerate(chosen))


def _begun_alike(prompt: Prompt, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The real video [3, 9, 48, 48] that the prompt's first frame begins, and a wrong one with the same first frame."""
    spec, shown = digits.parse(prompt), drawn_video(prompt)
    scans, motions, start = drawn_path(prompt)
    motion = int(motions)
    u, v = torch.rand(2, generator=rng).tolist()
    others = [i for i in digits.motions_from(start[0]) if i not in digits.motions_allowed(spec)]
    fits = {"digit": spec.digit is not None, "motion": bool(others), "slow": motion > 0}
    kinds = [kind for kind, possible in fits.items() if possible]
    kind = kinds[int(u * len(kinds))]
    if kind == "slow":
        return shown, slow_motion(shown[None])[0]
    if kind == "motion":
        travel = digits.travels(torch.tensor([others[int(v * len(others))]]))
        return shown, digits.place(scans, start, travel)[0].expand(3, -1, -1, -1)
    assert spec.digit is not None
    other, _, _ = digits.draw("train", [digits.PromptSpec((spec.digit + 1 + int(v * 9)) % 10)], rng)
    turned = digits.place(other, start, digits.travels(motions))[0].expand(3, -1, -1, -1)
    return shown, torch.lerp(shown, turned, torch.linspace(0, 1, digits.FRAMES)[:, None, None])


def moving_digits_i2v() -> MovingDigitsI2V:
    """Loads the bundled image-to-video pipeline and classifiers; half a second. Each training prompt has `FIRST_FRAMES` first frames."""
    family = load(MOVING_DIGITS_I2V)
    assert isinstance(family, WanImageFamily)
    names = digits.training_prompts()
    prompts = tuple(Prompt(name, f"train/{len(names) * k + i}") for k in range(FIRST_FRAMES) for i, name in enumerate(names))
    monitor = load_classifier("monitor")
    open_prompts = tuple(Prompt(prompt.text, f"monitor/{i}") for i, prompt in enumerate(ClassifierMonitor(monitor).open_prompts))
    return MovingDigitsI2V(family, prompts, load_classifier("training"), ClassifierMonitor(monitor, open_prompts))


@dataclass(frozen=True)
class ClassDigits:
    """Everything a recipe may ask for on the class-conditional digits."""

    family: DiTFamily
    prompts: tuple[Prompt, ...]
    reward: DigitClassifier
    monitor: DigitClassifier

    @property
    def classifiers(self) -> tuple[DigitClassifier, DigitClassifier]:
        """The training and the monitor classifier."""
        return self.reward, self.monitor

    def known_teacher(self, probe: Probe, guidance: float | GuidanceByLevel) -> Mapping[str, float] | None:
        """None: its teacher is measured in a moment."""
        return None

    def real(self) -> RealSamples:
        """The 800 scans of the training split, each with its class."""
        scans, classes = digits.scans_of("train")
        return RealSamples(_names(classes), scans[:, None] * 2 - 1)

    def pairs(self, seed: int = 78) -> PairSamples:
        """Each scan of the training split, preferred to one of another class under its own class."""
        scans, classes = digits.scans_of("train")
        rng = torch.Generator().manual_seed(seed)
        others = [(classes != c).nonzero()[:, 0] for c in range(10)]
        wrong = torch.stack([others[int(c)][torch.randint(len(others[int(c)]), (), generator=rng)] for c in classes])
        return PairSamples(_names(classes), scans[:, None] * 2 - 1, scans[wrong][:, None] * 2 - 1)


def _names(classes: Tensor) -> tuple[Prompt, ...]:
    """Classes [N] as prompts."""
    return tuple(Prompt(str(int(c))) for c in classes)


def class_digits(scale: Scale = "log") -> ClassDigits:
    """Loads the bundled class-conditional model and classifiers; `scale` of the reward: log p of the class, or p."""
    family = load(DIGITS)
    assert isinstance(family, DiTFamily)
    reward, monitor = load_digit_classifier("training", scale=scale), load_digit_classifier("monitor")
    return ClassDigits(family, _names(torch.arange(10)), reward, monitor)


def exact() -> Reward:
    """Whether the training classifier finds digit and motion right, 1 or 0: a black box, without a gradient."""
    classifier = load_classifier("training")
    return FunctionReward(lambda media, prompts: classifier.correct(media, prompts).both.float(), name="digit and motion right")


def _video_features(model: str) -> Callable[[Literal["training", "monitor"]], Features]:
    return lambda name: ClassifierFeatures(model, load_classifier(name), VIDEO, 3 * 2 * FEATURES)


MOVING_DIGITS_WORLD = World(
    name=MOVING_DIGITS,
    folder=folder_of(MOVING_DIGITS),
    size=VIDEO,
    ready=moving_digits,
    load=lambda size: as_miniature(models.load(folder_of(MOVING_DIGITS), size or VIDEO, name=MOVING_DIGITS)),
    pipeline=lambda: text_to_video_pipeline(folder_of(MOVING_DIGITS)),
    shown=as_prompts(SHOWN),
    features=_video_features(MOVING_DIGITS),
    evaluation=DigitsEvaluation(),
    rewards={"exact": exact},
)
MOVING_DIGITS_I2V_WORLD = World(
    name=MOVING_DIGITS_I2V,
    folder=folder_of(MOVING_DIGITS_I2V),
    size=VIDEO,
    ready=moving_digits_i2v,
    load=lambda size: as_miniature(MovingDigitsImageFamily(bundled_pipeline(), size or VIDEO, MOVING_DIGITS_I2V, str(folder_of(MOVING_DIGITS_I2V)))),
    pipeline=bundled_pipeline,
    shown=tuple(Prompt(text, f"reference/{i}") for i, text in enumerate(SHOWN)),
    adopt=lambda family: as_miniature(MovingDigitsImageFamily(family.pipe, family.size, family.name, family.source)),
    features=_video_features(MOVING_DIGITS_I2V),
    evaluation=DigitsEvaluation(image_to_video=True),
    rewards={"exact": exact},
)
DIGITS_WORLD = World(
    name=DIGITS,
    folder=folder_of(DIGITS),
    size=IMAGE,
    ready=class_digits,
    load=lambda size: as_miniature(models.load(folder_of(DIGITS), size, name=DIGITS)),
    pipeline=None,
    shown=as_prompts(digits.WORDS),
    features=lambda name: ClassifierFeatures(DIGITS, load_digit_classifier(name), IMAGE, 3 * FEATURES),
    evaluation=None,
)
