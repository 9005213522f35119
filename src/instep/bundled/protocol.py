"""What the evaluations of bundled video models share: the prompts of a set, a row of generated videos, and metrics of the videos alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from instep.data.prompt import Prompt, with_negative
from instep.metrics import figures as m
from instep.metrics.compare import BATCH, Cost, Generate, Kind, Row, generate_all
from instep.metrics.figures import Value

# unclamped media [N, 3, F, H, W] of a set's prompts, and what they cost, to metrics
Measure = Callable[[Tensor, Cost], dict[str, Value]]


@dataclass(frozen=True)
class PromptSet:
    """Prompts of an evaluation: fully specified ones, then open ones with many samples each, so that modes can be counted.

    seed: of the noise. negative: the negative prompt of all. reference: what was computed once for all rows, such as features of real videos.
    """

    full: tuple[str, ...]
    open: tuple[str, ...]
    seed: int = 0
    name: str = "quick"
    negative: str | None = None
    reference: dict[str, Any] = field(default_factory=dict, compare=False, kw_only=True)

    @property
    def prompts(self) -> tuple[str, ...]:
        return self.full + self.open

    @property
    def asked(self) -> tuple[Prompt, ...]:
        """What a model is asked for: the prompts with the negative prompt."""
        return with_negative(self.prompts, self.negative)


def rank(prompts: tuple[str, ...], key: Callable[[str], Any]) -> Tensor:
    """A number for each prompt [N], in the order of `key`; equal prompts have equal numbers."""
    places = {prompt: i for i, prompt in enumerate(sorted(dict.fromkeys(prompts), key=key))}
    return torch.tensor([places[prompt] for prompt in prompts])


def generated_row(name: str, kind: Kind, generate: Generate, asked: PromptSet, measure: Measure, *, steps: int, guidance: float = 1.0, note: str = "") -> Row:
    """Generates a sample for every prompt and measures them; NFE counts both halves of guidance."""
    raw, cost = generate_all(generate, asked.asked, asked.seed, name)
    return Row(name, kind, measure(raw, cost), steps * (1 if guidance == 1 else 2), steps, guidance, len(raw), note)


def real_row(real: Tensor, measure: Measure, through: Callable[[Tensor], Tensor] | None) -> Row:
    """Real videos [N, 3, F, H, W] measured as if they had been generated, or `through` a VAE first."""
    media = real if through is None else torch.cat([through(part) for part in real.split(BATCH)])
    name = "real videos (another draw)" if through is None else "real videos through the VAE"
    return Row(name, "real", measure(media, Cost()), n=len(real))


def of_videos(raw: Tensor, order: Tensor, cost: Cost, subject: Callable[[Tensor], Tensor] = lambda media: media) -> dict[str, Value]:
    """Metrics of unclamped media [N, 3, F, H, W] that need no classifier. `subject` gives what moves as bright on dark, for wobble and travel."""
    media = raw.clamp(0, 1)
    per_sample = {
        "mean_brightness": m.mean_brightness(media),
        "saturation": m.saturation(raw),
        "wobble": m.wobble(subject(media)),
        "flicker": m.flicker(media),
        "dynamic": m.dynamic(subject(media)),
    }
    values = {key: m.of_mean(x, order) for key, x in per_sample.items()}
    return values | {"seconds": Value(cost.cpu, 0.0), "seconds_wall": Value(cost.wall, 0.0)}


def of_features(features: Tensor, drawn: Tensor, order: Tensor, full: int) -> dict[str, Value]:
    """Distances of samples' features [N, D] from those of real videos of the same prompts, [N, draws, D]; the first `full` prompts leave nothing open."""
    reference, one_each = drawn.flatten(0, 1), drawn[:, 0]
    fake, real = features[full:], drawn[full:].flatten(0, 1)
    return {
        "fd": m.of_set(lambda rows: m.frechet_distance(features[rows], reference), order),
        "fd_open": m.of_set(lambda rows: m.frechet_distance(fake[rows], real), order[full:]),
        "precision": m.of_set(lambda rows: m.precision(features[rows], one_each), order),
        "recall": m.of_set(lambda rows: m.recall(features[rows], one_each), order),
    }
