"""A stock pipeline seen through what exporting a student needs: unlike a `Family` it changes nothing in the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from instep.models import VideoSize
from instep.paths import Path
from instep.prediction import Condition, Parameterisation


class Stock(Protocol):
    """How a pipeline calls its transformer, with its own text encoding and attention. Latents x are ours, [B, C, F, H, W].

    `axes`: our axes in the order of the pipeline's latents, which is also the order it draws its noise in. `passes_generator`: whether its call
    hands `generator=` on to the scheduler, which re-noises with it. `size`: what it draws unless told otherwise.
    """

    path: Path
    parameterisation: Parameterisation
    axes: tuple[int, ...]
    passes_generator: bool
    size: VideoSize

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        """Of one sample, [C, F, H, W]."""
        ...

    def smallest(self) -> VideoSize:
        """A few tokens' worth of video: the identity of two samplers does not depend on the size, its price does."""
        ...

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Text as the pipeline's call encodes it."""
        ...

    def forward(self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Raw output of `module` (which stands for the pipeline's transformer) in `parameterisation`; t in [0, 1]."""
        ...


def stock(pipe: Any) -> Stock:
    """How `pipe` works; ValueError for a pipeline that no family knows."""
    kind = type(pipe).__name__
    if kind == "WanPipeline":
        from instep.models.wan import WanStock

        return WanStock(pipe)
    if kind == "CogVideoXPipeline":
        from instep.models.cogvideox import CogVideoXStock

        return CogVideoXStock(pipe)
    raise ValueError(f"pipeline: {kind} is not known; allowed: WanPipeline, CogVideoXPipeline")
