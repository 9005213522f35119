"""Measures of samples of any model on a user's own prompts: rewards, distances to given data, diversity, and steadiness in time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from instep.data.prompt import Prompt
from instep.metrics.columns import Column
from instep.metrics.figures import (
    RESAMPLES,
    Value,
    flicker,
    frechet_distance,
    inception_score,
    mean_brightness,
    of_mean,
    of_set,
    precision,
    recall,
    vendi_by_group,
    vendi_by_kernels,
)
from instep.metrics.image_features import FrameFeatures
from instep.rewards.base import Reward, checked_scores
from instep.rewards.dinov2 import ClassifierReward
from instep.rewards.motion import DynamicDegree
from instep.rewards.prepare import as_videos
from instep.rewards.several import parts_of

KEY_FRAMES = 20  # from one to the next (DOLLAR, Eq. 17)
FEW = 10  # resamples for the error of sFID, whose covariances are large
NEIGHBOURS = 3  # of precision and recall: fewer samples have no k-th neighbour


@dataclass(frozen=True)
class Seen:
    """What is kept of samples while they are drawn, a few at a time: values of each one by key, its features, the mean over its frames [N, D], spatial
    features [N, D'] and a classifier's probabilities [N, C].

    `kernels`: by key, for each prompt the cosines [K, n, n] between its samples at each of K frames.
    """

    values: dict[str, Tensor]
    features: Tensor | None = None
    spatial: Tensor | None = None
    probabilities: Tensor | None = None
    kernels: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Networks:
    """What samples are looked at with: features, and a classifier for the Inception score. `spatial`: whether spatial features are compared too."""

    features: FrameFeatures | None = None
    classifier: ClassifierReward | None = None
    spatial: bool = False


def temporal_consistency(features: Tensor) -> Tensor:
    """VBench's subject and background consistency (Huang et al. 2024): the mean over frames t > 1 of (cos(d_1, d_t) + cos(d_(t-1), d_t)) / 2.

    Features [N, F, D] of two frames or more, to [N] in [0, 1]; 1 for frames that are alike. A negative cosine counts as 0, as in VBench's code. With DINO it
    is their subject, with CLIP their background.
    """
    unit = F.normalize(features.double(), dim=2)
    first, previous = ((part * unit[:, 1:]).sum(2).clamp(min=0) for part in (unit[:, :1], unit[:, :-1]))
    return ((first + previous) / 2).mean(1)


def key_frames(frames: int) -> list[int]:
    """DOLLAR's key frames, 20 apart from the first on; of a shorter video the first and the last."""
    return list(range(0, frames, KEY_FRAMES)) if frames > KEY_FRAMES else sorted({0, frames - 1})


@torch.no_grad()
def observe(media: Tensor, prompts: Sequence[Prompt], reward: Reward | None, networks: Networks = Networks()) -> Seen:
    """Values of each of a few samples: media [N, 3, (F,) H, W] in [0, 1]; those of a prompt follow each other, all of them."""
    video = media.ndim == 5 and media.shape[2] > 1
    values = {"mean_brightness": mean_brightness(media)}
    if video:
        values |= {"flicker": flicker(media), "dynamic_degree": DynamicDegree().score(media, [])}
    for i, part in enumerate(parts_of(reward) if reward is not None else ()):
        values[f"reward_{i}"] = checked_scores(part, media, prompts)
    frames = as_videos(media).transpose(1, 2)
    keys = key_frames(frames.shape[1])
    kernels = {"vendi_pixels": _cosines(frames[:, keys].flatten(2), prompts)}
    features = None if networks.features is None else networks.features(media)
    if features is not None and video:
        values["consistency"] = temporal_consistency(features)
        kernels["vendi_frames"] = _cosines(features[:, keys], prompts)
    return Seen(
        {key: value.double().cpu() for key, value in values.items()},
        None if features is None else features.mean(1),
        networks.features.spatial(frames[:, 0]) if networks.features is not None and networks.spatial and not video else None,
        None if networks.classifier is None else networks.classifier.log_probabilities(media).exp().mean(1).double().cpu(),
        kernels,
    )


def _cosines(features: Tensor, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Of features [N, K, D], for each prompt the cosines [K, n, n] between its samples at each of K frames, on the CPU."""
    # frames without any direction (black ones) are alike, and unlike all others
    blank = (features == 0).all(2, keepdim=True)
    unit = F.normalize(torch.cat([features, blank], 2).double(), dim=2).transpose(0, 1)
    starts = [i for i, prompt in enumerate(prompts) if i == 0 or prompt != prompts[i - 1]]
    return [(part @ part.mT).cpu() for part in unit.split([b - a for a, b in zip(starts, [*starts[1:], len(prompts)], strict=True)], dim=1)]


def gathered(parts: Sequence[Seen]) -> Seen:
    """All samples together."""
    return Seen(
        {key: torch.cat([part.values[key] for part in parts]) for key in parts[0].values},
        _joined([part.features for part in parts]),
        _joined([part.spatial for part in parts]),
        _joined([part.probabilities for part in parts]),
        {key: [kernel for part in parts for kernel in part.kernels[key]] for key in parts[0].kernels},
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


@dataclass(frozen=True)
class Given:
    """Features of the given data: [M, D], and spatial ones [M, D'] of images."""

    features: Tensor
    spatial: Tensor | None = None


def measures(seen: Seen, copies: int, real: Given | None = None) -> dict[str, Value]:
    """Metrics with standard errors of samples in the order of their prompts, `copies` each; `real`: features of given data.

    Distances need features of both. Precision and recall are of the third neighbour; the Vendi score is within each prompt, so it is 1 to `copies`.
    """
    n = len(next(iter(seen.values.values())))
    prompt = torch.arange(n) // copies
    values = {key: of_mean(each, prompt) for key, each in seen.values.items()}
    if copies > 1:
        values |= {key: vendi_by_kernels(kernels) for key, kernels in seen.kernels.items()}
    if seen.probabilities is not None:
        probabilities = seen.probabilities
        values["inception_score"] = of_set(lambda rows: inception_score(probabilities[rows]), prompt)
    if seen.features is None:
        return values
    features = seen.features
    if copies > 1:
        values["vendi"] = vendi_by_group(features, prompt)
    if real is not None:
        statistics: dict[str, Callable[[Tensor, Tensor], float]] = {"fd": frechet_distance, "precision": precision, "recall": recall}
        for key, statistic in statistics.items():
            values[key] = _compared(statistic, features, real.features, prompt)
        if seen.spatial is not None and real.spatial is not None:
            values["sfd"] = _compared(frechet_distance, seen.spatial, real.spatial, prompt, FEW)
    return values


def _compared(statistic: Callable[[Tensor, Tensor], float], features: Tensor, real: Tensor, prompt: Tensor, resamples: int = RESAMPLES) -> Value:
    return of_set(lambda rows: statistic(features[rows], real), prompt, resamples=resamples)


def columns(reward: Reward | None, networks: Networks) -> tuple[Column, ...]:
    """What the keys of `measures` mean."""
    network = networks.features
    classes = f" by {networks.classifier.name}" if networks.classifier is not None else ""
    rewards = parts_of(reward) if reward is not None else ()
    of = f" in features of {network.name}" if network is not None else ""
    return (
        *(Column(f"reward_{i}", part.name, f"score of {part.name}", 3, "main", part.name.split(" ")[0]) for i, part in enumerate(rewards)),
        Column("fd", "Frechet distance", f"between samples and given data{of}", 2, "main", "FD"),
        Column("sfd", "sFID", f"Frechet distance of spatial features{of}", 2, "main", "sFID"),
        Column("inception_score", "Inception score", f"how sure and how varied the classes are{classes}", 2, "main", "IS"),
        Column("precision", "precision", f"share of samples near given data{of}", 2, "main", "prec", largest=1),
        Column("recall", "recall", f"share of given data near samples{of}", 2, "main", "recall", largest=1),
        Column("vendi", "Vendi score", f"different samples of one prompt{of}", 2, "main", "vendi"),
        Column("vendi_frames", "Vendi score of key frames", f"different samples of one prompt, the mean over key frames{of}", 2, "main", "v. frames"),
        Column("vendi_pixels", "Vendi score of pixels", "different samples of one prompt, the mean over key frames, in pixels", 2, "more", "v. pixels"),
        Column("consistency", "consistency in time", f"cosine to the first and the previous frame{of}", 3, "main", "consist.", largest=1),
        Column("flicker", "steadiness", "1 - mean difference of successive frames, VBench's temporal flickering", 3, "main", "steady", largest=1),
        Column("dynamic_degree", "motion", "speed of the fastest 5 % of blocks, in frame diagonals a frame", 4, "main", "motion"),
        Column("mean_brightness", "brightness", "mean of all pixels", 3, "more", "bright", largest=1),
    )
