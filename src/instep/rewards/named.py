"""The rewards that go by a name on the command line: one table of what each scores, what it needs, and what makes it.

A new one is a file in this folder and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from instep.rewards.aesthetic import AESTHETIC, aesthetic
from instep.rewards.base import Reward
from instep.rewards.clip_score import CLIP, DFN_CLIP, clip_score, dfn_clip
from instep.rewards.dinov2 import DINOV2, dinov2
from instep.rewards.hpsv2 import HPSV2, hpsv2
from instep.rewards.hpsv3 import HPSV3, hpsv3
from instep.rewards.image_reward import IMAGE_REWARD, image_reward
from instep.rewards.jpeg import JPEG
from instep.rewards.located import Needed
from instep.rewards.motion import DynamicDegree
from instep.rewards.ocr import OCR, rapid_ocr
from instep.rewards.pickscore import PICKSCORE, pickscore
from instep.rewards.videoalign import PARTS, VIDEOALIGN, videoalign


@dataclass(frozen=True)
class Choice:
    """What a user may choose of a named reward: the folder of its files, the folder of the network it builds on, the part of its scores, the precision of a
    large network, and the frames a second of the videos."""

    folder: Path | None = None
    base: Path | None = None
    part: str | None = None
    dtype: str = "bfloat16"
    fps: float = 16.0


@dataclass(frozen=True)
class Named:
    """A reward with a name. `settings`: fields of `Choice` that it takes; `parts`: what may stand after its name and a colon; `gradient`: whether its scores
    have one to the pixels; `frames`: whether it can be given some frames of a video alone."""

    scores: str
    make: Callable[[Choice], Reward]
    needs: tuple[Needed, ...] = ()
    settings: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    gradient: bool = True
    frames: bool = True


NAMED: Mapping[str, Named] = {
    "clipscore": Named("100 cos of image and prompt (CLIP ViT-L/14, or any CLIP or SigLIP)", lambda of: clip_score(of.folder), (CLIP,), ("folder",)),
    "dfn-clip": Named("100 cos of image and prompt (DFN-CLIP ViT-H/14)", lambda of: dfn_clip(of.folder), (DFN_CLIP,), ("folder",)),
    "pickscore": Named("people's choices in Pick-a-Pic, about 15 to 25", lambda of: pickscore(of.folder), (PICKSCORE,), ("folder",)),
    "hpsv2": Named("HPSv2.1: people's choices between images, about 0.2 to 0.35", lambda of: hpsv2(of.folder), (HPSV2,), ("folder",)),
    "hpsv3": Named("HPSv3: people's choices between images, Qwen2-VL-7B", lambda of: hpsv3(of.folder, of.dtype), (HPSV3,), ("folder", "dtype")),
    "imagereward": Named("ImageReward: people's rankings, about -2 to 2", lambda of: image_reward(of.folder), (IMAGE_REWARD,), ("folder",)),
    "aesthetic": Named(
        "LAION's aesthetic mark, 1 to 10; the prompt is not read", lambda of: aesthetic(of.folder, of.base), (AESTHETIC, CLIP), ("folder", "base")
    ),
    "dinov2": Named("log p(class) of a classifier; prompts are classes", lambda of: dinov2(of.folder), (DINOV2,), ("folder",)),
    "videoalign": Named(
        "VideoAlign: visual quality, motion quality, text alignment of videos, normalised; their sum without a part",
        lambda of: videoalign(of.part, of.folder, of.dtype, of.fps),
        (VIDEOALIGN,),
        ("folder", "dtype", "fps"),
        PARTS,
        frames=False,
    ),
    "compressible": Named("- kilobytes as JPEG at quality 95", lambda of: JPEG("small"), gradient=False),
    "incompressible": Named("+ kilobytes as JPEG at quality 95", lambda of: JPEG("large"), gradient=False),
    "dynamic-degree": Named("speed of the fastest 5 % of blocks, in diagonals a frame", lambda of: DynamicDegree(), gradient=False, frames=False),
    "ocr": Named(
        "the text between quotes in the prompt, 1 - edit distance / length, in [0, 1]; pip install 'instep[ocr]'", lambda of: OCR(rapid_ocr()), gradient=False
    ),
}


def named(name: str, choice: Choice = Choice()) -> Reward:
    """The reward of a name, `videoalign` or `videoalign:ta`. Raises ValueError for a name that is none, and for files that are missing, with their source."""
    head, colon, part = name.partition(":")
    if head not in NAMED:
        raise ValueError(f"reward: {name!r} is not known; allowed: {', '.join(NAMED)}")
    known = NAMED[head]
    if colon and part not in known.parts:
        allowed = f"allowed: {', '.join(f'{head}:{each}' for each in known.parts)}" if known.parts else f"it has no parts, write {head}"
        raise ValueError(f"reward: {part!r} is no part of {head!r}; {allowed}")
    return known.make(replace(choice, part=part or None))
