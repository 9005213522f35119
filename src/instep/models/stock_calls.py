"""How a family's stock pipeline is called, and how its latents lie; a family overrides what differs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from instep.core.size import Size
from instep.data.prompt import Prompt, as_prompts, negatives_of
from instep.models.family import Task


class StockCalls:
    """The members of a family that speak to its stock pipeline (see `models/family.py`)."""

    pipe: Any
    size: Size
    latent_shape: tuple[int, ...]
    task: Task = "text-to-video"
    takes_first_frame = False
    # our axes in the order of the pipeline's latents, where they are those of ours in another order
    axes: tuple[int, ...] = (0, 1, 2, 3, 4)
    # whether the pipeline's call takes negative prompts, and whether it guides only where it is given some
    takes_negative_prompt = True
    guides_by_negative_prompt = False

    def usual(self) -> tuple[int, float]:
        defaults = inspect.signature(type(self.pipe).__call__).parameters
        return defaults["num_inference_steps"].default, defaults[next(iter(self.guidance_arguments(1.0)))].default

    def guidance_arguments(self, guidance: float) -> dict[str, float]:
        return {"guidance_scale": guidance}

    def stock_latents(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)

    def own_latents(self, latents: Tensor) -> Tensor:
        return latents.permute([self.axes.index(i) for i in range(len(self.axes))])

    def first_noise(self, n: int, rng: torch.Generator) -> Tensor:
        whole = (n, *self.latent_shape)
        return self.own_latents(torch.randn([whole[i] for i in self.axes], generator=rng, device=rng.device))

    def calls(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        return [[prompt] for prompt in prompts] if self.takes_first_frame else [list(prompts)]

    @torch.no_grad()
    def stock_sample(
        self, pipe: Any, prompts: Sequence[Prompt], *, steps: int, guidance: float, output: Literal["media", "latent"], guidance_2: float | None = None
    ) -> Tensor:
        """With guidance (other than 1) the pipeline gets the negative prompts."""
        found, size = as_prompts(prompts), self.size
        call = partial(pipe, height=size.height, width=size.width, num_inference_steps=steps, **self.guidance_arguments(guidance))
        call = partial(call, output_type="pt" if output == "media" else "latent")
        if self.task != "text-to-image":
            call = partial(call, num_frames=size.frames)
        if guidance_2 is not None:
            call = partial(call, guidance_scale_2=guidance_2)
        drawn = []
        for group in self.calls(found):
            guided = guidance != 1 and (self.guides_by_negative_prompt or any(prompt.negative is not None for prompt in group))
            given: dict[str, Any] = {"prompt": [prompt.text for prompt in group]}
            if self.takes_negative_prompt:
                given["negative_prompt"] = negatives_of(group) if guided else None
            result = self._output(call(**given, **self.call_inputs(group)))
            drawn.append(self.stepped_latents(result) if output == "latent" else result)
        samples = torch.cat(drawn)
        return samples.transpose(1, 2) if output == "media" and samples.ndim == 5 else samples

    def stepped_latents(self, latents: Tensor) -> Tensor:
        """The latents that a call of the pipeline returns, in the layout that it steps."""
        return latents

    def call_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What a call of the pipeline takes of these prompts besides their texts."""
        return {}

    def _output(self, result: Any) -> Tensor:
        return result.images if self.task == "text-to-image" else result.frames
