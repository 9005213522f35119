"""Metrics of 2-D mixture samples against the truth. Samples [N, D] with labels [N] go in, floats come out; all of it in float64.

| metric | what | exact samples (N = 4,000, ring of 8) |
|---|---|---|
| quality | share within 3 sigma of a mode of its own class | 0.989 |
| tv | total variation of mass per mode, in [0, 1] | 0.015 to 0.03 |
| energy | squared energy distance to exact samples | below 0.002, either sign |
| rkl | reverse KL in nats, by a kernel estimate that smooths | -0.03 |
| spread | mean squared radius around a mode over its untruncated value; below 0.6 is over-sharp | 0.949 |
| share | rewarded part of the on-mode samples | rewarded share of modes |
| reached | modes that hold a quarter of their due mass or more | all |

*On-mode* is within 3 sigma of a mode of the sample's own class. Share and spread ignore all other samples: read them together with
quality. Where nothing is on-mode they are nan. Metrics that differ with N are compared at equal N, against `measure_exact`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from instep.diffusion.path import RectifiedFlow
from instep.lab.mixture import Mixture

REACH = 3.0  # standard deviations that count as on-mode
BANDWIDTH = 0.08  # of the kernel density estimate, in the units of x
DUE = 0.25  # part of its due mass that a reached mode holds
ROWS = 512  # of a matrix of pairs that are held at once


def measure(x: Tensor, label: Tensor, mixture: Mixture, rng: torch.Generator, rewarded: Tensor | None = None) -> dict[str, float]:
    """All metrics of samples x [N, D] with labels [N] (a class of the mixture, or -1 for all of its modes), balanced or not.

    `rng` draws the exact samples of the energy distance; `rewarded` [M] booleans mark the rewarded modes and add "share". ValueError
    for shapes and labels the mixture does not have, samples that are not finite, and labels with a single sample.
    """
    x, label = _checked(x, label, mixture)
    own, distance = own_mode(x, label, mixture)
    on = distance <= REACH * mixture.sigma
    metrics = {
        "quality": float(on.double().mean()),
        "tv": total_variation(x, label, mixture),
        "energy": _by_label(energy_distance(part, mixture.sample(label[rows], rng).double()) for rows, part in _parts(x, label)),
        "rkl": reverse_kl(x, label, mixture),
        "spread": float(distance[on].square().mean() / (x.shape[1] * mixture.sigma**2)),
        "reached": float(reached(own[on], label, mixture)),
    }
    if rewarded is not None:
        check_rewarded(rewarded, mixture)
        metrics["share"] = float(rewarded.cpu()[own[on]].double().mean())
    return metrics


def measure_exact(mixture: Mixture, n: int, seed: int, rewarded: Tensor | None = None) -> dict[str, float]:
    """The metrics of n exact samples with balanced labels: the best values that a model can reach, and their variation by chance."""
    classes = mixture.classes.unique()
    if n < 2 * len(classes):
        raise ValueError(f"n: {n} is not allowed; use {2 * len(classes)} or more, two samples a class")
    rng = torch.Generator().manual_seed(seed)
    label = classes[torch.arange(n) % len(classes)]
    return measure(mixture.sample(label, rng), label, mixture, rng, rewarded)


def mean_sd(rows: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and sample standard deviation (n - 1) of each metric over seeds. A metric undefined (nan) in one row is so in the mean; the
    deviation of a single row is nan. ValueError for no rows, or rows that hold different metrics."""
    if not rows or any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"rows: {[sorted(row) for row in rows]} is not allowed; give one or more rows with the same metrics")
    table = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}
    return {name: (float(values.mean()), float(values.std()) if len(rows) > 1 else math.nan) for name, values in table.items()}


def own_mode(x: Tensor, label: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """The nearest mode of each sample's own class [N] and the distance to it [N]."""
    distance = _distances(x, mixture.means.to(x)).masked_fill(~mixture.member(label), math.inf)
    nearest = distance.min(1)
    return nearest.indices, nearest.values


def total_variation(x: Tensor, label: Tensor, mixture: Mixture) -> float:
    """Half the sum over modes of |mass - due mass|, for each label and averaged over labels; in [0, 1].

    *All* samples count, each for the nearest of *all* modes, so mass in another class's modes is misplaced. Over this partition of the
    plane it is a lower bound of the total variation between the distributions, up to the true mass outside a mode's own cell (3e-7 in the
    ring). Off-mode samples are not an error by themselves: that is quality.
    """
    return _by_label(_mass_error(part, label[rows][:1], mixture) for rows, part in _parts(x, label))


def _mass_error(x: Tensor, label: Tensor, mixture: Mixture) -> float:
    """Total variation of mass per mode of samples x [N, D] that share one label [1]."""
    mass = torch.bincount(_distances(x, mixture.means.to(x)).argmin(1), minlength=len(mixture.means)) / len(x)
    return float((mass.double() - _due(label, mixture)).abs().sum() / 2)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Squared energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| of samples [N, D] and [M, D], N and M of 2 or more (Szekely and Rizzo 2013).

    Means over different pairs only (U-statistics), hence unbiased: around 0, of either sign, for two samples of one distribution.
    """
    n, m = len(x), len(y)
    return 2 * _sum_distances(x, y) / (n * m) - _sum_distances(x, x) / (n * (n - 1)) - _sum_distances(y, y) / (m * (m - 1))


def reverse_kl(x: Tensor, label: Tensor, mixture: Mixture) -> float:
    """Mean of log q(x | label) - log p(x | label) in nats, averaged over labels: p exact, q a leave-one-out kernel estimate (`log_kde`).

    The kernel h widens every mode, so exact samples do not give 0 but, with r = (h / sigma)^2 and D = 2, r / (1 + r) - log(1 + r), -0.029 in
    the ring, and some thousandths less from the estimate's own noise.
    """
    clean = torch.zeros(len(x), dtype=x.dtype)
    log_p = mixture.log_density(RectifiedFlow(), x, clean, label)  # the path is the identity at t = 0
    return _by_label(float((log_kde(part) - log_p[rows]).mean()) for rows, part in _parts(x, label))


def log_kde(x: Tensor, bandwidth: float = BANDWIDTH) -> Tensor:
    """Log of a Gaussian kernel density estimate at each of its points x [N, D] from the other N - 1: [N].

    Never below what the point's own kernel gives, 1 / N of its peak. Leave-one-out alone sends isolated points to minus infinity faster than
    any p with a deviation above the bandwidth, so a few strays would make the reverse KL look better than perfect. What is left is
    +0.02 nats for 4,000 samples of a Gaussian a dozen bandwidths wide, where leave-one-out alone is at -0.14.
    """
    n, dim = x.shape
    parts = []
    for start in range(0, n, ROWS):
        log_kernel = _distances(x[start : start + ROWS], x).square_().mul_(-0.5 / bandwidth**2)
        rows = torch.arange(len(log_kernel))
        log_kernel[rows, start + rows] = -math.inf
        parts.append(log_kernel.logsumexp(1))
    others = torch.cat(parts) - math.log(n - 1)
    return others.clamp(min=-math.log(n)) - 0.5 * dim * math.log(2 * math.pi * bandwidth**2)


def reached(own: Tensor, label: Tensor, mixture: Mixture) -> int:
    """Number of modes that hold a quarter of their due share, or more, among the modes `own` [K] of on-mode samples.

    What is due follows from the labels [N] of *all* samples: a class that has lost every sample has reached nothing.
    """
    due = _due(label, mixture)
    mass = torch.bincount(own, minlength=len(due)).double() / max(len(own), 1)
    return int(((mass >= DUE * due) & (due > 0)).sum())


def _due(label: Tensor, mixture: Mixture) -> Tensor:
    """The mass [M] each mode should have under these labels [N]."""
    member = mixture.member(label).double()
    return (member / member.sum(1, keepdim=True)).mean(0)


def check_rewarded(rewarded: Tensor, mixture: Mixture) -> None:
    """ValueError unless `rewarded` is a boolean for each mode [M]."""
    modes = len(mixture.means)
    if rewarded.shape != (modes,) or rewarded.dtype != torch.bool:
        raise ValueError(f"rewarded: {rewarded.dtype} {tuple(rewarded.shape)} is not allowed; give booleans [{modes}], one a mode")


def _checked(x: Tensor, label: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Samples in float64 and labels, both on the CPU, or a ValueError."""
    dim = mixture.means.shape[1]
    if x.ndim != 2 or x.shape[1] != dim:
        raise ValueError(f"x: {tuple(x.shape)} is not allowed; give samples [N, {dim}], as the mixture has {dim} dimensions")
    if label.shape != x.shape[:1] or label.dtype.is_floating_point:
        raise ValueError(f"label: {label.dtype} {tuple(label.shape)} is not allowed; give one integer a sample, [{len(x)}]")
    x, label = x.detach().double().cpu(), label.cpu()
    known = mixture.classes.unique().tolist()
    for value, count in zip(*(part.tolist() for part in label.unique(return_counts=True)), strict=True):
        if value not in known and value != -1:
            raise ValueError(f"label: {value} is not allowed; the mixture's classes are {known}, and -1 is all of its modes")
        if count < 2:
            raise ValueError(f"label: {value} has {count} sample; the energy distance and the reverse KL need 2 or more of each label")
    if not len(x):
        raise ValueError("x: no samples; give 2 or more of each label")
    if bad := int((~x.isfinite()).any(1).sum()):
        raise ValueError(f"x: {bad} of {len(x)} samples are not finite; the run has diverged, report that in place of its metrics")
    return x, label


def _parts(x: Tensor, label: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each label the booleans [N] of its samples, and those samples."""
    for value in label.unique():
        rows = label == value
        yield rows, x[rows]


def _by_label(values: Iterator[float]) -> float:
    """The mean over labels, whatever their number of samples."""
    each = list(values)
    return sum(each) / len(each)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """[N, D], [M, D] -> [N, M]; by differences, as the product formula loses half of the digits of near points."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _sum_distances(x: Tensor, y: Tensor) -> float:
    return sum(float(_distances(rows, y).sum()) for rows in x.split(ROWS))
