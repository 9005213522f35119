"""Wan 2.1 image-to-video (14B): the first frame is joined along channels, and its CLIP tokens are attended to beside the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.data.prompt import Prompt
from instep.diffusion.prediction import Condition
from instep.diffusion.transfer import to_match
from instep.models.borrow import visiting
from instep.models.prompt_cache import Encoded
from instep.models.wan import STOCK_TEXT_LENGTH
from instep.models.wan_i2v import WanImageCondition, WanImageFamily

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Wan21ImageCondition(WanImageCondition):
    """Text, what is known of the video, and the first frame's CLIP tokens [B, 257, 1280]."""

    image: Tensor | None = None
    GIVEN: ClassVar[tuple[str, ...]] = ("first_frame", "image")


class Wan21ImageFamily(WanImageFamily):
    """A `WanImageToVideoPipeline` with an image encoder seen as a family; a prompt names its first frame, a file (see `data/prompt.py`).

    The encoder reads the first frame at the size of the video: give a stock pipeline an image of that size, as the model's card does.
    """

    has_image_encoder = True
    # as the model's card loads them
    wide_parts: ClassVar[tuple[str, ...]] = ("vae", "image_encoder")
    condition: ClassVar[type[WanImageCondition]] = Wan21ImageCondition

    def check_pipeline(self, pipe: Any) -> None:
        """Raises ValueError for a model of first and last frames."""
        super().check_pipeline(pipe)
        if (length := pipe.transformer.config.pos_embed_seq_len) is not None:
            raise ValueError(f"pos_embed_seq_len: {length} (Wan 2.1 FLF2V, first and last frame) is not built; allowed: None, as in Wan 2.1 I2V")

    def first_frame(self, prompt: Prompt, size: Size) -> Tensor:
        """The first frame in whole steps of 1 / 255, as the image is that stock diffusers is given."""
        return (super().first_frame(prompt, size).clamp(0, 1) * 255).round() / 255

    def known_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.pipe.image_encoder.config
        return {**super().known_shapes(), "image": ((config.image_size // config.patch_size) ** 2 + 1, config.hidden_size)}

    @torch.no_grad()
    def encode_first_frame(self, prompt: Prompt) -> Encoded:
        """The image encoder comes to the device while it is used."""
        image = _as_image(self.first_frame(prompt, self.size))
        with visiting([self.pipe.image_encoder], self.device):
            tokens = self.pipe.encode_image(image, self.device)[0]
        return {**super().encode_first_frame(prompt), "image": tokens}

    def prepare(self, module: nn.Module, current: Callable[[], Condition | None]) -> None:
        """Nothing: the stock attention tells image from text tokens by the text's stock length, to which `forward` pads."""

    def forward(self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert isinstance(cond, Wan21ImageCondition) and cond.first_frame is not None and cond.image is not None, (
            "a first frame is needed; an unconditional prompt is stacked on one"
        )
        text = cond.text[:, :STOCK_TEXT_LENGTH]
        text = torch.cat([text, text.new_zeros(len(text), STOCK_TEXT_LENGTH - text.shape[1], text.shape[2])], 1)
        seen = torch.cat([x_t, to_match(cond.first_frame, x_t)], 1)
        return module(seen, self.timesteps(t, x_t), to_match(text, x_t), to_match(cond.image, x_t), return_dict=False)[0]

    def call_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """An image: the pipeline's image processor takes tensors for values up to 255."""
        (prompt,) = prompts
        return {"image": _as_image(self.first_frame(prompt, self.size))}


def _as_image(frame: Tensor) -> Image:
    """A frame [3, H, W] in [0, 1] as an image of 8 bits."""
    from PIL import Image

    return Image.fromarray((frame * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy())
