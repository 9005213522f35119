"""The motions of the bundled videos: still, or in one of four directions at one of two speeds."""

from __future__ import annotations

DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slowly", "fast")
MOTIONS: tuple[str, ...] = ("still", *(f"{d} {s}" for d in DIRECTIONS for s in SPEEDS))
UNIT = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


def direction_and_speed(motion: int) -> tuple[str, str | None]:
    """What the motion of index `motion` in MOTIONS is; the speed of "still" is None."""
    direction, _, speed = MOTIONS[motion].partition(" ")
    return direction, speed or None


def motions_that_fit(direction: str | None, speed: str | None) -> list[int]:
    """Indices into MOTIONS that fit a direction ("still" included) and a speed; None is left open, and with it all nine fit."""
    if direction is None:
        return list(range(len(MOTIONS)))
    return [i for i in range(len(MOTIONS)) if direction_and_speed(i)[0] == direction and speed in (None, direction_and_speed(i)[1])]


def said(direction: str | None, speed: str | None) -> list[str]:
    """The words of a prompt that say a motion; none where it is left open."""
    if direction is None:
        return []
    return ["standing still"] if direction == "still" else ["moving", direction, *([speed] if speed else [])]
