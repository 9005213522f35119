"""Figures of generated videos, each with a standard error. Media [N, 3, F, H, W] in [0, 1]; features [N, D]; all in float64.

A *statistic of a set* (Frechet distance, precision, recall, diversity, modes) has its error from a seeded bootstrap, a mean over samples
from their spread. Sets of few samples bias distances upward: compare at equal N, and against the real-against-real floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BOOTSTRAP = 40


@dataclass(frozen=True)
class Value:
    """A figure and its standard error."""

    value: float
    se: float


def of_mean(x: Tensor) -> Value:
    """Mean of per-sample values [N]; standard error from their spread (for zeros and ones: binomial)."""
    x = x.double()
    return Value(float(x.mean()), float(x.std(unbiased=False)) / math.sqrt(len(x)))


def of_set(statistic: Callable[[Tensor], float], n: int, seed: int = 0, resamples: int = BOOTSTRAP) -> Value:
    """A statistic of the set of rows 0..n-1 (called with row indices); standard error from resampling rows with replacement."""
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.tensor([statistic(torch.randint(n, (n,), generator=rng)) for _ in range(resamples)], dtype=torch.float64)
    return Value(statistic(torch.arange(n)), float(drawn.std()))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of Gaussians fitted to features [N, D], [M, D] (Heusel et al. 2017)."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # the eigenvalues of A B are those of a positive semi-definite matrix: real, up to rounding
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root)


def _covered(points: Tensor, by: Tensor, k: int) -> float:
    """Share of `points` inside a ball around some point of `by` whose radius is the distance to its k-th neighbour."""
    radius = torch.cdist(by, by).kthvalue(k + 1, dim=1).values
    return float((torch.cdist(points, by) <= radius).any(1).double().mean())


def precision(generated: Tensor, real: Tensor, k: int = 3) -> float:
    """Share of generated features on the real manifold (Kynkaanniemi et al. 2019), in [0, 1]."""
    return _covered(generated.double(), real.double(), k)


def recall(generated: Tensor, real: Tensor, k: int = 3) -> float:
    """Share of real features on the generated manifold, in [0, 1]."""
    return _covered(real.double(), generated.double(), k)


def vendi(features: Tensor) -> float:
    """Vendi score of features [N, D] under the cosine kernel: 1 (all alike) to N (all different) (Friedman and Dieng 2023)."""
    from vendi_score import vendi as package

    return float(package.score_dual(features.double().numpy(), normalize=True))


def modes_covered(mode: Tensor, group: Tensor) -> Value:
    """Mean over groups of the number of different modes seen in each; mode [N], group [N] integers; error over groups."""
    counts = [len(mode[group == g].unique()) for g in group.unique()]
    return of_mean(torch.tensor(counts))


def ink(media: Tensor) -> Tensor:
    """Mean brightness of each video, [N] in [0, 1]: thicker strokes and over-saturation raise it."""
    return media.clamp(0, 1).flatten(1).mean(1)


def saturation(raw: Tensor, margin: float = 0.05) -> Tensor:
    """Share of each video's *unclamped* pixels more than `margin` outside [0, 1], [N]."""
    return ((raw < -margin) | (raw > 1 + margin)).flatten(1).double().mean(1)


def centre_of_mass(media: Tensor) -> Tensor:
    """Centre of brightness of every frame, [N, F, 2] as (x, y) in pixels."""
    frames = media.clamp(0, 1).mean(1)
    mass = frames.sum((2, 3)).clamp(min=1e-6)
    y, x = (torch.arange(size, dtype=frames.dtype) for size in frames.shape[2:])
    return torch.stack([(frames.sum(2) * x).sum(-1) / mass, (frames.sum(3) * y).sum(-1) / mass], -1)


def dynamic(media: Tensor) -> Tensor:
    """Distance in pixels between the centres of brightness of the first and the last frame, [N]."""
    centre = centre_of_mass(media)
    return (centre[:, -1] - centre[:, 0]).norm(dim=-1)


def flicker(media: Tensor) -> Tensor:
    """Temporal flickering as VBench counts it: (255 - mean |difference of frames|) / 255, [N] in [0, 1], 1 is steady."""
    return 1 - (media[:, :, 1:] - media[:, :, :-1]).abs().flatten(1).mean(1)


def wobble(media: Tensor) -> Tensor:
    """Change of shape from frame to frame once motion is taken out, relative to the ink, [N] >= 0.

    Each frame is shifted (bilinearly) so that its centre of brightness lies in the middle; then the mean absolute difference of
    consecutive frames over the mean brightness. Rigid motion gives almost 0, a new shape every frame about 1.
    """
    n, _, f, h, w = media.shape
    grey = media.clamp(0, 1).mean(1).reshape(n * f, 1, h, w)
    centre = centre_of_mass(media).reshape(n * f, 2)
    offset = (centre - torch.tensor([(w - 1) / 2, (h - 1) / 2])) * 2 / torch.tensor([w, h])
    move = torch.cat([torch.eye(2).expand(n * f, 2, 2), offset[:, :, None]], 2).to(grey)
    grid = torch.nn.functional.affine_grid(move, [n * f, 1, h, w], align_corners=False)
    still = torch.nn.functional.grid_sample(grey, grid, align_corners=False).reshape(n, f, h, w)
    change = (still[:, 1:] - still[:, :-1]).abs().flatten(1).mean(1)
    return change / still.flatten(1).mean(1).clamp(min=1e-6)


def vendi_by_group(features: Tensor, group: Sequence[int]) -> Value:
    """Mean over groups of the Vendi score of each group's features: diversity among samples of the same prompt."""
    ids = torch.tensor(group)
    return of_mean(torch.tensor([vendi(features[ids == g]) for g in ids.unique()]))
