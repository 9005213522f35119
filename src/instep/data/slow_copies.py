"""Negatives in slow motion from a user's own videos: without them a ranker, or a preference, rewards videos that hardly move (Diffusion-APO, C.1)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from instep.core.outputs import check_output
from instep.data.animation import save_animation
from instep.data.media import read_media, slow_motion
from instep.data.pairs import PreferencePair, PreferredSample, read_labelled, rows_of
from instep.data.real_files import real_files

MOTION = "motion"  # the question that a slow copy answers
LEAST = 2 / 255  # a video whose slow copy differs less, in no pixel of any frame, hardly moves


@dataclass(frozen=True)
class SlowCopies:
    """Pairs of a video and its slow copy, and how many videos hardly move."""

    pairs: list[PreferencePair]
    still: int


def videos_of(source: Path) -> tuple[list[PreferencePair], list[PreferredSample]]:
    """The pairs of a file of labelled media, and its preferred videos; of a folder or an index of videos (`data/real_files.py`) no pairs, and its videos.

    Raises ValueError for shards, whose videos are no files of their own, and as those readers do.
    """
    if source.suffix.lower() in (".jsonl", ".parquet") and "chosen" in next(rows_of(source))[1]:
        return read_labelled(source)
    files = real_files(source)
    if inside := next((file for file in files if file.member is not None), None):
        raise ValueError(f"source: {inside.name} lies in a shard, and a pair names files; unpack the shards into a folder")
    return [], [PreferredSample(file.prompt, file.path) for file in files]


def slow_copies(videos: Iterable[PreferredSample], folder: Path, factor: float = 2.0, frames: int | None = None) -> SlowCopies:
    """Writes the slow copy of each video into `folder`, as a lossless .webp of as many frames and the same size; the video is preferred.

    `frames`: as in `read_media`, for animations whose frames last differently long. Raises ValueError for a factor of 1 or less, and for a file that cannot
    be read.
    """
    if not factor > 1:
        raise ValueError(f"factor: {factor} is not allowed; it slows by more than 1")
    check_output("out", folder, fills=True)
    pairs, still = [], 0
    for i, video in enumerate(videos):
        media = read_media(video.chosen, frames)
        slow = slow_motion(media[None], factor)[0] if media.shape[1] > 1 else media
        if float((slow - media).abs().max()) < LEAST:
            still += 1
            continue
        path = folder / f"{i:06d}-{video.chosen.stem}.webp"
        if not path.is_file():
            save_animation(path, (slow * 255).round().to(torch.uint8).permute(1, 2, 3, 0))
        pairs.append(PreferencePair(video.prompt, video.chosen, path, MOTION))
    return SlowCopies(pairs, still)


def is_slow_copy(pair: PreferencePair) -> bool:
    """Whether the rejected half of a pair is the slow copy that `slow_copies` made of the other: it has its question and its file's name.

    The question alone would not do: people are asked it too, of two videos that differ in more than their speed.
    """
    return pair.question == MOTION and re.fullmatch(rf"\d{{6,}}-{re.escape(pair.chosen.stem)}\.webp", pair.rejected.name) is not None
