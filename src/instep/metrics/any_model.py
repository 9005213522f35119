"""Measures of samples of any model on a user's own prompts: rewards, distances to given data, diversity, and steadiness in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from instep.data.prompt import Prompt
from instep.metrics.columns import Column
from instep.metrics.figures import Value, flicker, frechet_distance, mean_brightness, of_mean, of_set, precision, recall, vendi_by_group
from instep.metrics.image_features import FrameFeatures
from instep.rewards.base import Reward, checked_scores
from instep.rewards.motion import DynamicDegree
from instep.rewards.several import parts_of

NEIGHBOURS = 3  # of precision and recall: fewer samples have no k-th neighbour


@dataclass(frozen=True)
class Seen:
    """What is kept of samples while they are drawn, a few at a time: values of each one by key, and its features, the mean over its frames [N, D]."""

    values: dict[str, Tensor]
    features: Tensor | None = None


def temporal_consistency(features: Tensor) -> Tensor:
    """VBench's subject and background consistency (Huang et al. 2024): the mean over frames t > 1 of (cos(d_1, d_t) + cos(d_(t-1), d_t)) / 2.

    Features [N, F, D] of two frames or more, to [N] in [-1, 1]; 1 for frames that are alike. With DINO it is their subject, with CLIP their background.
    """
    unit = F.normalize(features.double(), dim=2)
    return (((unit[:, :1] * unit[:, 1:]).sum(2) + (unit[:, :-1] * unit[:, 1:]).sum(2)) / 2).mean(1)


@torch.no_grad()
def observe(media: Tensor, prompts: Sequence[Prompt], reward: Reward | None, network: FrameFeatures | None) -> Seen:
    """Values of each of a few samples: media [N, 3, (F,) H, W] in [0, 1]."""
    values = {"mean_brightness": mean_brightness(media)}
    if media.ndim == 5 and media.shape[2] > 1:
        values |= {"flicker": flicker(media), "dynamic_degree": DynamicDegree().score(media, [])}
    for i, part in enumerate(parts_of(reward) if reward is not None else ()):
        values[f"reward_{i}"] = checked_scores(part, media, prompts)
    features = None if network is None else network(media)
    if features is not None and features.shape[1] > 1:
        values["consistency"] = temporal_consistency(features)
    return Seen({key: value.double().cpu() for key, value in values.items()}, None if features is None else features.mean(1))


def gathered(parts: Sequence[Seen]) -> Seen:
    """All samples together."""
    values = {key: torch.cat([part.values[key] for part in parts]) for key in parts[0].values}
    features = [part.features for part in parts if part.features is not None]
    return Seen(values, torch.cat(features) if features else None)


def measures(seen: Seen, copies: int, real: Tensor | None = None) -> dict[str, Value]:
    """Metrics with standard errors of samples in the order of their prompts, `copies` each; `real`: features [M, D] of given data.

    Distances need features of both. Precision and recall are of the third neighbour; the Vendi score is within each prompt, so it is 1 to `copies`.
    """
    n = len(next(iter(seen.values.values())))
    prompt = torch.arange(n) // copies
    values = {key: of_mean(each, prompt) for key, each in seen.values.items()}
    if seen.features is None:
        return values
    features = seen.features
    if copies > 1:
        values["vendi"] = vendi_by_group(features, prompt)
    if real is not None:
        statistics: dict[str, Callable[[Tensor, Tensor], float]] = {"fd": frechet_distance, "precision": precision, "recall": recall}
        for key, statistic in statistics.items():
            values[key] = _compared(statistic, features, real, prompt)
    return values


def _compared(statistic: Callable[[Tensor, Tensor], float], features: Tensor, real: Tensor, prompt: Tensor) -> Value:
    return of_set(lambda rows: statistic(features[rows], real), prompt)


def columns(reward: Reward | None, network: FrameFeatures | None) -> tuple[Column, ...]:
    """What the keys of `measures` mean."""
    rewards = parts_of(reward) if reward is not None else ()
    of = f" in features of {network.name}" if network is not None else ""
    return (
        *(Column(f"reward_{i}", part.name, f"score of {part.name}", 3, "main", part.name.split(" ")[0]) for i, part in enumerate(rewards)),
        Column("fd", "Frechet distance", f"between samples and given data{of}", 2, "main", "FD"),
        Column("precision", "precision", f"share of samples near given data{of}", 2, "main", "prec", largest=1),
        Column("recall", "recall", f"share of given data near samples{of}", 2, "main", "recall", largest=1),
        Column("vendi", "Vendi score", f"different samples of one prompt{of}", 2, "main", "vendi"),
        Column("consistency", "consistency in time", f"cosine to the first and the previous frame{of}", 3, "main", "consist.", largest=1),
        Column("flicker", "steadiness", "1 - mean difference of successive frames, VBench's temporal flickering", 3, "main", "steady", largest=1),
        Column("dynamic_degree", "motion", "speed of the fastest 5 % of blocks, in frame diagonals a frame", 4, "main", "motion"),
        Column("mean_brightness", "brightness", "mean of all pixels", 3, "more", "bright", largest=1),
    )
