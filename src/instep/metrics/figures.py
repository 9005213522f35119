"""Metrics of generated videos, each with a standard error. Media [N, 3, F, H, W] in [0, 1]; features [N, D]; all in float64.

Errors are of *the samples drawn for fixed prompts*: what another seed would change, not what other prompts would. A share has its
binomial error, a mean the spread between neighbours (samples of the same or the most similar prompt), a statistic of a set (Frechet
distance, precision, recall) that of random half-samples which keep one of every two neighbours. Against the spread over 12 to 25 draws of real
videos (242 each) these errors are right within a quarter for modes, mean brightness and motion, within .4 for precision; about 2 times too large
for distances, 2 to 4 for recall, 1.7 for shares near 1; and up to a third too small for log-probabilities, whose tails are heavy. Resampling with
replacement repeats points, which breaks nearest neighbours.

Sets of few samples bias distances upward: compare at equal N, and against the real-vs-real row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 50


@dataclass(frozen=True)
class Value:
    """A metric and its standard error."""

    value: float
    se: float


def of_share(right: Tensor) -> Value:
    """Share of true values in [N] bools; binomial standard error, with one success and one failure added so that 0 of N and N of N are not certain."""
    n, k = len(right), float(right.double().sum())
    p = (k + 1) / (n + 2)
    return Value(k / n, math.sqrt(p * (1 - p) / n))


def of_mean(x: Tensor, order: Tensor | None = None) -> Value:
    """Mean of per-sample values [N]; standard error from the spread of all values, or with `order` [N] from that between neighbours in it."""
    x = x.double()
    if order is None:
        return Value(float(x.mean()), float(x.std(unbiased=False)) / math.sqrt(len(x)))
    a, b = _pairs(order).unbind(1)
    return Value(float(x.mean()), float((x[a] - x[b]).square().mean() / 2 / len(x)) ** 0.5)


def of_set(statistic: Callable[[Tensor], float], order: Tensor, seed: int = 0, resamples: int = RESAMPLES) -> Value:
    """A statistic of a set of rows (called with row indices); standard error from half-samples, one of every two neighbours in `order` [N].

    Without replacement, half of the rows vary among themselves exactly as much as all of them do between draws (for a mean).
    """
    pairs, rng = _pairs(order), torch.Generator().manual_seed(seed)
    rows = torch.arange(len(pairs))
    halves = [pairs[rows, torch.randint(2, (len(pairs),), generator=rng)] for _ in range(resamples)]
    drawn = torch.tensor([statistic(half) for half in halves], dtype=torch.float64)
    return Value(statistic(torch.arange(len(order))), float(drawn.std()))


def _pairs(order: Tensor) -> Tensor:
    """Neighbours [N // 2, 2]: row indices sorted by `order`, two by two."""
    if len(order) < 4:
        raise ValueError(f"order: {len(order)} samples are too few for a standard error; measure 4 or more")
    return order.argsort(stable=True)[: len(order) // 2 * 2].reshape(-1, 2)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of Gaussians fitted to features [N, D], [M, D]; >= 0 (Heusel et al. 2017).

    The square root is taken of A^(1/2) B A^(1/2), which has A B's eigenvalues and is symmetric: exact where covariances are singular, as
    they are with N < D. Agrees with scipy's `sqrtm` (a test holds it to that).
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap)


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


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean over samples of KL(p(y | x) || p(y)): probabilities [N, C] of a classifier, to 1 (all alike) to C (Salimans et al. 2016).

    It is of all samples at once. The published mean over ten splits of 5,000 images is lower the smaller the splits are.
    """
    p = probabilities.double()
    return math.exp(float((torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean()))


def vendi_of_kernels(kernels: Tensor) -> float:
    """Mean over kernels [K, N, N] with ones on the diagonal of the Vendi score: exp of the entropy of the eigenvalues of kernel / N, 1 to N."""
    values = torch.linalg.eigvalsh(kernels.double() / kernels.shape[1]).clamp(min=0)
    return float(torch.special.entr(values).sum(1).exp().mean())


def modes_covered(mode: Tensor, group: Tensor, seed: int = 0) -> Value:
    """Mean over groups of the number of different modes seen in each; mode [N], group [N] integers; error from a bootstrap within groups."""
    return _of_groups(lambda rows: float(len(mode[rows].unique())), group, seed, replacement=True)


def vendi_by_group(features: Tensor, group: Tensor, seed: int = 0) -> Value:
    """Mean over groups of the Vendi score of each group's features [N, D]: diversity among samples of the same prompt, 1 to the group's size."""
    return _of_groups(lambda rows: vendi(features[rows]), group, seed, replacement=False)


def _of_groups(statistic: Callable[[Tensor], float], group: Tensor, seed: int, *, replacement: bool) -> Value:
    """Mean of a statistic over groups; error of that mean from resampling inside each group (halves, or as many with replacement)."""
    members = [(group == g).nonzero()[:, 0] for g in group.unique()]

    def of(own: Tensor) -> Callable[[Tensor], float]:
        return lambda rows: statistic(own[rows])

    return _mean_of([(of(own), len(own)) for own in members], seed, replacement=replacement)


def vendi_by_kernels(groups: Sequence[Tensor], seed: int = 0) -> Value:
    """Mean over groups of `vendi_of_kernels`, each [K, N, N]; error from half-samples inside each group."""

    def of(own: Tensor) -> Callable[[Tensor], float]:
        return lambda rows: vendi_of_kernels(own[:, rows][:, :, rows])

    return _mean_of([(of(own), own.shape[1]) for own in groups], seed, replacement=False)


def _mean_of(groups: Sequence[tuple[Callable[[Tensor], float], int]], seed: int, *, replacement: bool) -> Value:
    """Mean over groups of a statistic of some of its rows, of which each has so many; error as in `_of_groups`."""
    rng = torch.Generator().manual_seed(seed)
    values, variance = [], 0.0
    for statistic, n in groups:
        values.append(statistic(torch.arange(n)))
        drawn = [
            statistic(torch.randint(n, (n,), generator=rng) if replacement else torch.randperm(n, generator=rng)[: (n + 1) // 2]) for _ in range(RESAMPLES // 2)
        ]
        variance += float(torch.tensor(drawn, dtype=torch.float64).var())
    return Value(sum(values) / len(values), math.sqrt(variance) / len(values))


def mean_brightness(media: Tensor) -> Tensor:
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
    """Change of shape from frame to frame once motion is taken out, relative to the mean brightness, [N] >= 0.

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
