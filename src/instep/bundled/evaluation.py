"""How moving digits are measured: fixed prompts, three classifiers, real reference videos, and what the metrics are called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from instep.bundled import digits
from instep.bundled.classifiers import FOLDER, Classifier, ClassifierName, Embedded, load_classifier
from instep.bundled.columns import COLUMNS
from instep.bundled.drawn_frames import drawn_video
from instep.bundled.protocol import PromptSet, generated_row, of_features, of_videos, rank, real_row
from instep.bundled.world import EvalSize
from instep.data.prompt import Prompt
from instep.metrics import figures as m
from instep.metrics.columns import Column
from instep.metrics.compare import Cost, Generate, Kind, Row
from instep.metrics.figures import Value

# raise it whenever a row comes out otherwise than before (other prompts, metrics, keys or seeds): rows that were kept are then measured anew
VERSION = 1
CLASSIFIERS: dict[str, ClassifierName] = {"train": "training", "monitor": "monitor", "heldout": "heldout"}
REFERENCE_DRAWS = 4  # real videos a prompt: the fewer, the more the Frechet distance is biased upward
FIRST_FRAME_SEED = 900_000_000  # seed of the first given frame


@dataclass(frozen=True)
class EvalSet(PromptSet):
    """Prompts of digits. `image_to_video`: each sample begins with a first frame of its own, that of a real video of its prompt."""

    image_to_video: bool = False

    @property
    def asked(self) -> tuple[Prompt, ...]:
        """What a model is asked for: the prompts, with their first frames and the negative prompt."""
        if not self.image_to_video:
            return super().asked
        return tuple(Prompt(prompt, f"reference/{FIRST_FRAME_SEED + i}", self.negative) for i, prompt in enumerate(self.prompts))

    @property
    def order(self) -> Tensor:
        """A number for each prompt [N]; equal ones are equal, near ones have the same motion or else the same digit."""

        def key(prompt: str) -> tuple[bool, list[int], int]:
            spec = digits.parse(prompt)
            return prompt in self.open, digits.motions_allowed(spec), -1 if spec.digit is None else spec.digit

        return rank(self.prompts, key)


def evaluation_set(name: EvalSize = "quick", seed: int = 0, image_to_video: bool = False, negative: str | None = None) -> EvalSet:
    """`quick`: each of the 90 full prompts once and 19 open ones (10 name a digit only, 9 a motion only) 8 times; `full`: 3 times and 18 times."""
    each, many = {"quick": (1, 8), "full": (3, 18)}[name]
    digit_only = [digits.describe(digits.PromptSpec(digit=d)) for d in range(10)]
    motion_only = [digits.describe(digits.motion_spec(None, k)) for k in range(len(digits.MOTIONS))]
    full, open_ = digits.full_prompts() * each, [p for p in digit_only + motion_only for _ in range(many)]
    return EvalSet(tuple(full), tuple(open_), seed, name, negative, image_to_video)


@torch.no_grad()
def measure(raw: Tensor, cost: Cost, eval_set: EvalSet, classifiers: Mapping[str, Classifier]) -> dict[str, Value]:
    """All metrics of unclamped media [N, 3, F, H, W] for the set's prompts, in their order; `classifiers` by short name, "heldout" among them."""
    if len(raw) != len(eval_set.prompts):
        raise ValueError(f"raw: {len(raw)} videos for {len(eval_set.prompts)} prompts; generate returns one video a prompt")
    media, prompts, full, order = raw.clamp(0, 1), list(eval_set.prompts), len(eval_set.full), eval_set.order
    values: dict[str, Value] = {}
    embedded = {name: classifier.embed(media) for name, classifier in classifiers.items()}
    for name, classifier in classifiers.items():
        right = classifier.correct_of(embedded[name], prompts)
        values |= {f"{name}_{part}": m.of_share(ok[:full]) for part, ok in (("digit", right.digit), ("motion", right.motion), ("both", right.both))}
        values[f"{name}_both_open"] = m.of_share(right.both[full:])
        values[f"{name}_score"] = m.of_mean(classifier.score_of(embedded[name], prompts)[:full], order[:full])
    heldout = classifiers["heldout"]
    values |= of_features(embedded["heldout"].features, reference_features(eval_set, heldout), order, full)
    values |= open_prompt_metrics(embedded["heldout"][full:], eval_set.open, heldout)
    values |= of_videos(raw, order, cost)
    if eval_set.image_to_video:
        off = (media[:, :, 0] - given_videos(eval_set)[:, :, 0]).square().mean((1, 2, 3)).sqrt()
        values["first_frame"] = m.of_mean(off, order)
    return values


def open_prompt_metrics(embedded: Embedded, prompts: Sequence[str], classifier: Classifier) -> dict[str, Value]:
    """Diversity on open prompts: motions seen for a digit-only prompt, digits seen for a motion-only one, Vendi score of centred features."""
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    group = torch.tensor([order[prompt] for prompt in prompts])
    names_digit = torch.tensor([digits.parse(prompt).digit is not None for prompt in prompts])
    digit, motion = (logits.argmax(1) for logits in classifier.logits_of(embedded))
    return {
        "modes_motion": m.modes_covered(motion[names_digit], group[names_digit]),
        "modes_digit": m.modes_covered(digit[~names_digit], group[~names_digit]),
        "vendi": m.vendi_by_group(embedded.features, group),
    }


def reference_features(eval_set: EvalSet, classifier: Classifier) -> Tensor:
    """Features of real reference videos, `REFERENCE_DRAWS` for each of the set's prompts, [N, draws, D]."""
    if classifier.name not in eval_set.reference:
        draws = [classifier.features(real_videos(eval_set, 900_100 + i)) for i in range(REFERENCE_DRAWS)]
        eval_set.reference[classifier.name] = torch.stack(draws, 1)
    return eval_set.reference[classifier.name]


def real_videos(eval_set: EvalSet, seed: int) -> Tensor:
    """Real videos of the reference split that fit the set's prompts."""
    return digits.render("reference", [digits.parse(prompt) for prompt in eval_set.prompts], seed)


def given_videos(eval_set: EvalSet) -> Tensor:
    """The real videos [N, 3, F, H, W] that an image-to-video set's first frames begin; drawn once for all rows."""
    if "given" not in eval_set.reference:
        eval_set.reference["given"] = torch.stack([drawn_video(prompt) for prompt in eval_set.asked])
    return eval_set.reference["given"]


def real_vs_real_row(eval_set: EvalSet, classifiers: Mapping[str, Classifier], seed: int = 900_002, through: Callable[[Tensor], Tensor] | None = None) -> Row:
    """Real-vs-real: another draw of reference videos (of an image-to-video set: those that its first frames begin) measured as if it had been generated, or
    `through` a VAE first."""
    real = given_videos(eval_set) if eval_set.image_to_video else real_videos(eval_set, seed)
    return real_row(real, lambda raw, cost: measure(raw, cost, eval_set, classifiers), through)


def evaluate(
    name: str,
    kind: Kind,
    generate: Generate,
    eval_set: EvalSet,
    classifiers: Mapping[str, Classifier],
    *,
    steps: int,
    guidance: float = 1.0,
    note: str = "",
) -> Row:
    """Generates for every prompt of the set and measures; NFE counts both halves of guidance."""
    of = lambda raw, cost: measure(raw, cost, eval_set, classifiers)  # noqa: E731
    return generated_row(name, kind, generate, eval_set, of, steps=steps, guidance=guidance, note=note)


def load_classifiers() -> dict[str, Classifier]:
    """The three classifiers by their short names in metrics."""
    return {short: load_classifier(name) for short, name in CLASSIFIERS.items()}


@cache
def _classifier_files() -> bytes:
    """The digest of the classifiers' weights."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.safetensors")))).digest()


@dataclass(frozen=True)
class DigitsEvaluation:
    """The protocol of moving digits; `image_to_video`: from first frames, each sample from one of its own."""

    image_to_video: bool = False
    columns: tuple[Column, ...] = COLUMNS

    @property
    def accuracies(self) -> Mapping[str, Mapping[str, float]]:
        return {short: classifier.accuracy for short, classifier in load_classifiers().items()}

    @property
    def notice(self) -> str | None:
        return None

    def complete(self, row: Row) -> bool:
        return True

    def prompts(self, size: EvalSize = "quick", seed: int = 0, negative: str | None = None) -> EvalSet:
        return evaluation_set(size, seed, image_to_video=self.image_to_video, negative=negative)

    def protocol(self, eval_set: EvalSet) -> str:
        return f"{eval_set.name}{', from a first frame' * eval_set.image_to_video}"

    def fingerprint(self, eval_set: EvalSet) -> bytes:
        asked: Any = [VERSION, eval_set.name, eval_set.seed, eval_set.full, eval_set.open, eval_set.image_to_video, eval_set.negative]
        return json.dumps(asked).encode() + _classifier_files()

    def row(self, name: str, kind: Kind, generate: Generate, eval_set: EvalSet, *, steps: int, guidance: float = 1.0) -> Row:
        return evaluate(name, kind, generate, eval_set, load_classifiers(), steps=steps, guidance=guidance)

    def real_row(self, eval_set: EvalSet, through: Callable[[Tensor], Tensor] | None = None) -> Row:
        return real_vs_real_row(eval_set, load_classifiers(), through=through)
