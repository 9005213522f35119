"""A stock pipeline seen through what exporting a student needs: unlike a `Family` it changes nothing in the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from instep.core.size import VideoSize
from instep.data.first_frame import FirstFrameReader, read_first_frame
from instep.data.prompt import Prompt, as_prompts, negatives_of
from instep.diffusion.path import Path
from instep.diffusion.prediction import Condition, PredictionType

IMAGE_TO_VIDEO = "WanImageToVideoPipeline"


class Stock(Protocol):
    """How a pipeline calls its transformer, with its own text encoding and attention. Latents x are ours, [B, C, F, H, W].

    `axes`: our axes in the order of the pipeline's latents, which is also the order it draws its noise in. `passes_generator`: whether its call
    hands `generator=` on to the scheduler, which re-noises with it. `size`: what it draws unless told otherwise.
    """

    path: Path
    prediction_type: PredictionType
    axes: tuple[int, ...]
    passes_generator: bool
    size: VideoSize

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        """Of one sample, [C, F, H, W]."""
        ...

    def smallest(self) -> VideoSize:
        """A few tokens' worth of video: the identity of two samplers does not depend on the size, its price does."""
        ...

    def encode(self, prompts: Sequence[Prompt | str], size: VideoSize, first_frame: FirstFrameReader = read_first_frame) -> Condition:
        """Text, and for an image-to-video pipeline the first frames that `first_frame` reads, as the pipeline's call encodes them."""
        ...

    def forward(self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Raw output of `module` (which stands for the pipeline's transformer) in `prediction_type`; t in [0, 1]."""
        ...


def stock(pipe: Any) -> Stock:
    """How `pipe` works; ValueError for a pipeline that no family knows."""
    kind = type(pipe).__name__
    if kind == "WanPipeline":
        from instep.models.wan import WanStock

        return WanStock(pipe)
    if kind == IMAGE_TO_VIDEO:
        from instep.models.wan_i2v import WanImageStock

        return WanImageStock(pipe)
    if kind == "CogVideoXPipeline":
        from instep.models.cogvideox import CogVideoXStock

        return CogVideoXStock(pipe)
    raise ValueError(f"pipeline: {kind} is not known; allowed: WanPipeline, {IMAGE_TO_VIDEO}, CogVideoXPipeline")


def takes_first_frame(pipe: Any) -> bool:
    """Whether a call of the pipeline takes a first frame, one for all of its prompts."""
    return type(pipe).__name__ == IMAGE_TO_VIDEO


def calls(pipe: Any, prompts: Sequence[Prompt | str]) -> list[list[Prompt]]:
    """The prompts of each call that draws them: all at once, or one by one where a call takes one first frame."""
    found = as_prompts(prompts)
    return [[prompt] for prompt in found] if takes_first_frame(pipe) else [list(found)]


def draw(
    pipe: Any,
    prompts: Sequence[Prompt | str],
    size: VideoSize,
    *,
    steps: int,
    guidance: float,
    output: Literal["pt", "latent"],
    first_frame: FirstFrameReader = read_first_frame,
) -> Tensor:
    """What the pipeline's calls give for `prompts`: latents in its own order of axes, or videos [B, F, 3, H, W] in [0, 1] ("pt").

    With guidance (other than 1) the pipeline gets the negative prompts; `first_frame` reads the first frames for an image-to-video pipeline.
    """
    found = as_prompts(prompts)
    call = partial(pipe, height=size.height, width=size.width, num_frames=size.frames, num_inference_steps=steps, guidance_scale=guidance, output_type=output)
    guided_away = guidance != 1 and any(prompt.negative is not None for prompt in found)
    negatives = negatives_of(found) if guided_away else [None] * len(found)
    if not takes_first_frame(pipe):
        return call(prompt=[prompt.text for prompt in found], negative_prompt=negatives if guided_away else None).frames
    given = zip(found, negatives, strict=True)
    return torch.cat([call(prompt=p.text, negative_prompt=negative, image=first_frame(p, size)[None]).frames for p, negative in given])
