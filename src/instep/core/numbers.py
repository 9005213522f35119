"""What a number may be: one rule a field, for options of the command line and arguments of the library alike."""

from __future__ import annotations

import math
from numbers import Real


def check_whole(field: str, value: object, least: int, most: int | None = None, *, what: str = "") -> None:
    """Raises ValueError unless `value` is a whole number from `least` to `most` (None: no bound). `what` it is, for the message, instead of its range."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{field}: {value!r} is not allowed; it is a whole number")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{field}: {value} is not allowed; {what or (f'it is {least} or more' if most is None else f'it is between {least} and {most}')}")


def check_number(
    field: str, value: object, least: float, most: float = math.inf, *, open_below: bool = False, open_above: bool = False, what: str = ""
) -> None:
    """Raises ValueError unless `value` is a finite number from `least` to `most`.

    `open_below` and `open_above`: without that bound itself. `what` it is, for the message, instead of its range.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{field}: {value!r} is not allowed; it is a number")
    number = float(value)
    inside = math.isfinite(number) and (number > least if open_below else number >= least) and (number < most if open_above else number <= most)
    if not inside:
        raise ValueError(f"{field}: {value} is not allowed; {what or _range(least, most, open_below, open_above)}")


def _range(least: float, most: float, open_below: bool, open_above: bool) -> str:
    lower = "positive" if open_below and least == 0 else f"above {least:g}" if open_below else f"{least:g} or more"
    if math.isinf(most):
        return f"it is a finite number, {lower}"
    return f"it is {lower} and {'below' if open_above else 'at most'} {most:g}"
