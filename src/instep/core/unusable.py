"""The error of a run or an export whose result cannot be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line needs the error before it needs torch
    from torch import Tensor


class Unusable(ValueError):
    """A run or an export went as it was asked, and its result cannot be used: weights or samples that are not finite, or samples that differ.

    The command line ends with exit status 1. (Status 2: an option or an input is wrong.)
    """


def named(names: list[str], most: int = 5) -> str:
    """The first `most` of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def is_finite(x: Tensor) -> bool:
    """Whether all values are finite; those of whole numbers are."""
    return not (x.is_floating_point() or x.is_complex()) or bool(x.isfinite().all())
