"""The amount of motion in a video, by block matching: a substitute for VBench's dynamic degree that needs no download.

VBench (Huang et al. 2024) runs RAFT between frames, averages the largest 5 % of the flow's magnitudes, and decides for each video whether enough frames
pass a threshold. This reward averages the same 5 % of a much coarser flow, and returns the number instead of a decision. It is not VBench's score and
must not be reported as one: it misses thin or fast objects, does not follow rotation or growth, and has no threshold.
Like VBench's score it counts flicker and flowing noise as motion, which is how such a reward is hacked (DOLLAR, Section 4.5, Fig. 9): pure noise scores like a
shift of 4 pixels of 48 a frame, a flicker of a fifth of the brightness like one of 5, of a tenth like one of 0.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SHARE = 0.05  # of the blocks: what moves most
EDGE = 48  # longer sides are reduced to this many pixels
BLOCK, STRIDE, REACH = 8, 4, 6  # pixels of the reduced frame
SIDE = BLOCK + 2  # of a patch: a block and the margin that its gradient needs
# squared grey levels a pixel, as of noise of a hundredth of the range: smaller changes are no motion
FLAT = 1e-4
PAIRS_AT_ONCE = 8  # bounds memory; more are no faster


@dataclass(frozen=True)
class DynamicDegree:
    """Speed of the fastest 5 % of blocks, in frame diagonals per frame, averaged over successive frames; 0 for a still video.

    An object that crosses a square frame from side to side in f frames scores about 0.7 / f. Beyond an eighth of the longer side a frame, motion is not
    followed and scores less. Black-box: computed without a gradient; about 1 ms a frame on one core whatever its size.
    """

    name = "dynamic-degree"
    differentiable = False
    space: ClassVar[Literal["pixel", "latent"]] = "pixel"

    @torch.no_grad()
    def score(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] >= 0 of videos [B, 3, F, H, W] in [0, 1] with two frames or more."""
        if media.ndim != 5 or media.shape[1] != 3 or media.shape[2] < 2 or min(media.shape[3:]) < BLOCK:
            raise ValueError(
                f"media: shape {tuple(media.shape)} has no motion to be seen; give videos [B, 3, F, H, W] of two frames or more, {BLOCK} pixels or more a side"
            )
        grey = media.float().mean(1)
        b, f, h, w = grey.shape
        if max(h, w) > EDGE:
            grey = F.interpolate(grey, size=[max(BLOCK, round(side * EDGE / max(h, w))) for side in (h, w)], mode="area")
        pairs = zip(grey[:, :-1].flatten(0, 1).split(PAIRS_AT_ONCE), grey[:, 1:].flatten(0, 1).split(PAIRS_AT_ONCE), strict=True)
        speed = torch.cat([_largest(block_motion(first, second)) for first, second in pairs])
        return speed.reshape(b, f - 1).mean(1) / math.hypot(*grey.shape[2:])


def _largest(displacement: Tensor) -> Tensor:
    """Mean of the largest 5 % of lengths of [N, blocks, 2], in pixels: [N]."""
    length = displacement.square().sum(2).sqrt()
    return length.topk(max(1, round(SHARE * length.shape[1])), 1).values.mean(1)


def block_motion(first: Tensor, second: Tensor) -> Tensor:
    """Displacement [N, blocks, 2] in pixels (x, then y) of 8 x 8 blocks of grey frames [N, H, W] in [0, 1], times the share of change that it explains.

    Whole pixels by exhaustive search (least squared difference, the shorter of equals), then one Lucas-Kanade step for the fraction. The share is
    1 - (what differs after the motion) / (what differs without): 1 for a thing that shifts; part of noise and
    of flicker is explained by chance.
    """
    n, h, w = first.shape
    margin = REACH + 1
    wide = F.pad(second[:, None], [margin] * 4, mode="replicate")[:, 0]
    shifts = [(dy, dx) for dy in range(-REACH, REACH + 1) for dx in range(-REACH, REACH + 1)]
    shifted = wide[:, 1:-1, 1:-1].unfold(1, h, 1).unfold(2, w, 1)
    # into a tensor of its own: in the order of the view's strides the pooling would have to copy it
    differ = torch.sub(shifted, first[:, None, None], out=first.new_empty(shifted.shape))
    # blocks overlap by half: quarters are summed once
    cost = F.avg_pool2d(F.avg_pool2d(differ.square_().flatten(1, 2), STRIDE), BLOCK // STRIDE, 1)
    table = torch.tensor(shifts, device=first.device)
    # a block without a face stays where it is, and of equal matches the nearest is taken
    best = (cost + FLAT * table.square().sum(1).to(cost)[:, None, None] / REACH**2).flatten(2).argmin(1)
    still = cost[:, shifts.index((0, 0))].flatten(1)
    moved = table[best]

    rows, columns = cost.shape[2:]
    own = F.pad(first[:, None], [1] * 4, mode="replicate")[:, 0]
    before, after = _patches(own, rows, columns, None), _patches(wide, rows, columns, moved + REACH)
    middle, change = (before + after) / 2, (after - before)[..., 1:-1, 1:-1]
    gx, gy = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2, (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    mean = lambda x: x.mean((2, 3))  # noqa: E731
    xx, yy, xy, ex, ey = mean(gx * gx) + FLAT, mean(gy * gy) + FLAT, mean(gx * gy), mean(gx * change), mean(gy * change)
    determinant = xx * yy - xy * xy
    step = torch.stack([xy * ey - yy * ex, xy * ex - xx * ey], 2) / determinant[..., None]
    left = mean(change.square()) + step[..., 0] * ex + step[..., 1] * ey
    explained = 1 - (left / (still + FLAT)).clamp(0, 1)
    return (moved.flip(2) + step.clamp(-1, 1)) * (explained * still / (still + FLAT))[..., None]


def _patches(frames: Tensor, rows: int, columns: int, moved: Tensor | None) -> Tensor:
    """The patch of each block in padded frames [N, H, W], shifted by whole pixels [N, blocks, 2] (y, then x): [N, blocks, 10, 10]."""
    width, device = frames.shape[2], frames.device
    corner = (torch.arange(rows, device=device)[:, None] * STRIDE * width + torch.arange(columns, device=device) * STRIDE).flatten()
    inside = (torch.arange(SIDE, device=device)[:, None] * width + torch.arange(SIDE, device=device)).flatten()
    at = (corner[None] if moved is None else corner + moved[..., 0] * width + moved[..., 1])[..., None] + inside
    return frames.flatten(1).gather(1, at.expand(len(frames), -1, -1).flatten(1)).reshape(len(frames), rows * columns, SIDE, SIDE)
