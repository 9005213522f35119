"""What the text-to-image families share: the sizes that a model draws, a VAE whose latents are shifted and scaled, and blocks of text and image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from instep.core.size import Size
from instep.models.family import Task, shown_tokens, skipped
from instep.models.pipeline_family import PipelineFamily


class ImageFamily(PipelineFamily):
    """A text-to-image pipeline seen as a family; latents [B, C, H, W] are shifted and scaled as the denoiser sees them.

    A family sets `unit`, the pixels that height and width are multiples of, and `channels`; where they differ `stride` and `largest`.
    """

    task: Task = "text-to-image"
    axes: tuple[int, ...] = (0, 1, 2, 3)

    @property
    def unit(self) -> int:
        """What height and width are multiples of, in pixels."""
        raise NotImplementedError

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.pipe.transformer.config.in_channels

    @property
    def stride(self) -> int:
        """Pixels that make one latent, along height and width."""
        return self.pipe.vae_scale_factor

    @property
    def largest(self) -> int | None:
        """The largest height and width; None: any."""
        return None

    def native_size(self) -> Size:
        """1024 x 1024 for the published models."""
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return Size(side, side, 1)

    def fit_size(self, size: Size) -> tuple[int, ...]:
        too_large = self.largest is not None and max(size.height, size.width) > self.largest
        if size.frames != 1 or size.height % self.unit or size.width % self.unit or too_large:
            raise ValueError(
                f"size: {size.height} x {size.width}, {size.frames} frames does not fit this model; it draws one image, height and width multiples of "
                f"{self.unit}{'' if self.largest is None else f' up to {self.largest}'}"
            )
        return (self.channels, size.height // self.stride, size.width // self.stride)

    def smallest(self) -> Size:
        return Size(2 * self.unit, 2 * self.unit, 1)

    def decode_rows(self, x: Tensor) -> Tensor:
        scale, shift = self._scaling()
        return self.pipe.vae.decode((x / scale + shift).to(self.vae_dtype)).sample.to(x.dtype) / 2 + 0.5

    def encode_rows(self, media: Tensor) -> Tensor:
        """Media [B, 3, H, W] in [0, 1] to latents [B, C, h, w]: the posterior's mean."""
        scale, shift = self._scaling()
        z = self.pipe.vae.encode((media * 2 - 1).to(self.vae_dtype)).latent_dist.mode()
        return (z.to(media.dtype) - shift) * scale

    def _scaling(self) -> tuple[float, float]:
        """Scaling and shift factor of the VAE's latents; some have no shift."""
        config = self.pipe.vae.config
        return config.scaling_factor, config.get("shift_factor") or 0.0


def _pass_on(hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """A block that is left out: text and image tokens as they came, in the order in which a block returns them."""
    return encoder_hidden_states, hidden_states


def _show_tokens(block: Any, args: tuple, output: tuple[Tensor, Tensor]) -> None:
    block.tokens(output[1])


class TwoStreamFamily(ImageFamily):
    """An image family whose transformer's blocks take and return text tokens and image tokens."""

    def blocks_of(self, module: Any) -> Sequence[nn.Module]:
        """The blocks in the order in which they are called."""
        return module.transformer_blocks

    def time_embedders(self, module: nn.Module) -> Sequence[nn.Module]:
        return [module.time_text_embed.timestep_embedder]  # type: ignore[union-attr, list-item]

    def time_width(self, module: nn.Module) -> int:
        config: Any = module.config
        return config.num_attention_heads * config.attention_head_dim

    def feature_block(self, module: nn.Module) -> nn.Module:
        """At two thirds of the depth, as for Wan. A block returns text and image tokens; an identity beside it is shown the image's."""
        blocks = self.blocks_of(module)
        return shown_tokens(blocks[(2 * len(blocks) - 1) // 3], _show_tokens)

    def feature_width(self, module: nn.Module) -> int:
        return self.time_width(module)

    def skip(self, module: nn.Module, blocks: Sequence[int]) -> AbstractContextManager[None]:
        return skipped(self.blocks_of(module), blocks, _pass_on)
