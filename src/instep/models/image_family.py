"""What the text-to-image families share: the sizes that a model draws, and a VAE whose latents are shifted and scaled."""

from __future__ import annotations

from torch import Tensor

from instep.core.size import Size
from instep.models.family import Task
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
