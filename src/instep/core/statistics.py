"""Rates and means with 95 % intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z = 1.959963984540054  # 95%, two-sided


@dataclass(frozen=True)
class Interval:
    """A rate or mean and its 95% interval; low and high are None where one prompt alone leaves nothing to resample."""

    value: float
    low: float | None
    high: float | None
    n: int  # answers, or items, behind it


def wilson(k: float, n: float) -> Interval:
    """k of n as a rate with Wilson's 95% interval: (k + z^2/2 +- z sqrt(k (n - k) / n + z^2/4)) / (n + z^2). ValueError unless 0 <= k <= n, n >= 1.

    Answers that depend on each other may be given as fewer than there are, and as parts of one; the interval's n is then rounded.
    """
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"k: {k} of {n} is not allowed; a rate needs 0 <= k <= n with n of 1 or more")
    middle, reach = k + Z * Z / 2, Z * math.sqrt(k * (n - k) / n + Z * Z / 4)
    return Interval(k / n, max(0.0, (middle - reach) / (n + Z * Z)), min(1.0, (middle + reach) / (n + Z * Z)), round(n))
