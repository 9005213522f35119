"""Inputs of rewards outside this process: a batch as single samples of 8-bit frames; and the search for the sample that causes a failure."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instep.rewards.base import RewardError


@dataclass(frozen=True)
class Sample:
    """One sample of a batch: frames uint8 [F, H, W, 3], one for an image."""

    index: int
    prompt: str
    frames: Tensor
    video: bool

    def __str__(self) -> str:
        return f"sample {self.index} of the batch (prompt {self.prompt!r})"


class BatchFailed(Exception):
    """A batch got no scores, and one of its samples may be the cause."""


# (samples, retries): retries on failure, then raises BatchFailed, or RewardError if no sample can be the cause
Attempt = Callable[[Sequence[Sample], int], list[float]]


def eight_bit(media: Tensor) -> Tensor:
    """Media [B, 3, H, W] or [B, 3, F, H, W] in [0, 1] as uint8 [B, F, H, W, 3] on the CPU (F = 1 for images), clamped and rounded to the nearest.

    ValueError for other shapes and for values that are not finite.
    """
    if media.ndim not in (4, 5) or media.shape[1] != 3:
        raise ValueError(f"media: shape {tuple(media.shape)} is not allowed; give images [B, 3, H, W] or videos [B, 3, F, H, W] in [0, 1]")
    media = media.detach().float().cpu()
    if not bool(media.isfinite().all()):
        bad = int((~media.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"media: sample {bad} of the batch has values that are not finite; find out why the model made them")
    frames = media[:, :, None] if media.ndim == 4 else media
    return (frames * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def samples_of(media: Tensor, prompts: Sequence[str]) -> list[Sample]:
    """A batch of media as single samples."""
    return [Sample(i, prompt, frames, media.ndim == 5) for i, (prompt, frames) in enumerate(zip(prompts, eight_bit(media), strict=True))]


def png(frame: Tensor) -> bytes:
    """A frame uint8 [H, W, 3] as PNG, every pixel kept."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame.numpy()).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def evenly_spaced(count: int, k: int) -> list[int]:
    """k of `count` frames from the first to the last, as evenly as whole numbers allow; the middle one for k = 1."""
    if not 1 <= k <= count:
        raise ValueError(f"frames: {k} is not allowed for a video of {count}; use 1 to {count}")
    return [(count - 1) // 2] if k == 1 else [(2 * i * (count - 1) + k - 1) // (2 * (k - 1)) for i in range(k)]


def finite(name: str, samples: Sequence[Sample], values: Sequence[object], what: str) -> list[float]:
    """`values`, one a sample, as numbers; RewardError that names the first sample whose value is none or is not finite, BatchFailed if they are too few
    or too many. `what` gave them: "the command printed"."""
    if len(values) != len(samples):
        raise BatchFailed(f"{what} {len(values)} scores for {len(samples)} samples; it gives one a sample, in their order")
    out = []
    for sample, value in zip(samples, values, strict=True):
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(f"reward {name!r}: {what} {str(value)[:80]!r} for {sample}; every score is a finite number")
        out.append(number)
    return out


def isolated(name: str, attempt: Attempt, samples: Sequence[Sample], retries: int, *, halved: bool = False) -> list[float]:
    """Returns the scores of a batch. A failing batch is split in halves, so that the error names the sample that fails by itself.

    Halves are tried once; only the whole batch and the single sample in the end are retried.
    """
    try:
        return attempt(samples, retries if len(samples) == 1 or not halved else 0)
    except BatchFailed as failure:
        if len(samples) == 1:
            alone = ", scored alone" if halved else ""
            raise RewardError(f"reward {name!r} failed on {samples[0]}{alone}: {failure}") from failure
        middle = len(samples) // 2
        parts = [isolated(name, attempt, part, retries, halved=True) for part in (samples[:middle], samples[middle:])]
        if not halved:
            warnings.warn(
                f"reward {name!r} failed on {len(samples)} samples at once and not on parts of them ({failure}); smaller batches are quicker", stacklevel=2
            )
        return [score for part in parts for score in part]


def span(samples: Sequence[Sample]) -> str:
    """Samples that failed together, in words."""
    return str(samples[0]) if len(samples) == 1 else f"samples {samples[0].index} to {samples[-1].index} of the batch (first prompt {samples[0].prompt!r})"


def tail(text: str, lines: int = 4, characters: int = 400) -> str:
    """Returns the end of a program's output in one line."""
    last = " / ".join(line.strip() for line in text.strip().splitlines()[-lines:])
    return last if len(last) <= characters else "..." + last[-characters:]


def positive(**values: float) -> None:
    """ValueError unless every value is a finite number above zero."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: {value} is not allowed; it is positive")


def count(**values: int) -> None:
    """ValueError unless every value is zero or a positive whole number."""
    for name, value in values.items():
        if value < 0 or value != int(value):
            raise ValueError(f"{name}: {value} is not allowed; it is 0 or a positive whole number")
