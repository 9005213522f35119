"""FLUX.1 text-to-image (dev and schnell): two streams, then one, on the rectified flow over patches of 2 x 2 latents; dev is told guidance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.diffusion.prediction import Condition
from instep.diffusion.transfer import to_device
from instep.models.image_family import TwoStreamFamily
from instep.models.preset import Preset
from instep.models.prompt_cache import Encoded

TEXT_LENGTH = 512
# what dev is told, in training and sampling alike
EMBEDDED = 3.5

DEV = Preset(source="model card of black-forest-labs/FLUX.1-dev: 50 steps, embedded guidance 3.5 and no other", guidance=1.0, sampler_steps=50, micro_batch=1)
SCHNELL = Preset(
    source="model card of black-forest-labs/FLUX.1-schnell, which is distilled: 4 steps, no guidance", guidance=1.0, sampler_steps=4, micro_batch=1
)


@dataclass(frozen=True, kw_only=True)
class FluxCondition(Condition):
    """T5's text embeddings with the stock padding [B, 512, D], which is attended to, and CLIP's pooled ones [B, P]."""

    text: Tensor
    pooled: Tensor

    def tokens(self) -> tuple[Tensor, Tensor]:
        """All of them, padding included, as the transformer sees them."""
        return self.text, torch.ones(self.text.shape[:2], dtype=torch.bool, device=self.text.device)


def packed(x: Tensor) -> Tensor:
    """Latents [B, C, H, W] as tokens [B, (H / 2) (W / 2), 4 C], one a patch of 2 x 2."""
    patches = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`, for latents of this height and width."""
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class FluxFamily(TwoStreamFamily):
    """A `FluxPipeline` seen as a family; latents [B, C, H, W] are shifted and scaled as the transformer sees them.

    Where the transformer is told guidance (dev), student, teacher and fake are all told 3.5. Guidance beyond that, w of u + w (c - u), is the pipeline's
    `true_cfg_scale`; the model's card uses none.
    """

    pipeline_class = "FluxPipeline"
    even_sigmas = True
    guides_by_negative_prompt = True
    text_length = TEXT_LENGTH
    comfyui_reads_lora = True
    lora_targets: tuple[str, ...] = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "proj_mlp"),
    )

    def __init__(self, pipe: Any, size: Size | Sequence[int] | None = None, name: str = "", source: str = "") -> None:
        super().__init__(pipe, size, name, source)
        self.shift = self.shift_of(pipe.scheduler.config)
        self.preset = self.preset_of(pipe.transformer.config)

    @classmethod
    def preset_of(cls, denoiser: Mapping[str, Any]) -> Preset:
        return DEV if denoiser.get("guidance_embeds") else SCHNELL

    @classmethod
    def shift_of(cls, scheduler: Mapping[str, Any]) -> float:
        """Dev's own scheduler shifts by size, exp(mu): that of 4096 tokens (1024 x 1024)."""
        return math.exp(float(scheduler.get("max_shift", 1.15))) if scheduler.get("use_dynamic_shifting") else float(scheduler.get("shift", 1.0))

    def check_pipeline(self, pipe: Any) -> None:
        """Raises ValueError for a transformer that is given images too (Fill, Depth, Canny)."""
        config = pipe.transformer.config
        if config.out_channels not in (None, config.in_channels):
            raise ValueError(
                f"transformer: {config.in_channels} channels in, {config.out_channels} out is not allowed; a text-to-image transformer has as many (64)"
            )

    @property
    def told(self) -> bool:
        return bool(self.pipe.transformer.config.guidance_embeds)

    def guidance_arguments(self, guidance: float) -> dict[str, float]:
        """The pipeline's `guidance_scale` is what the transformer is told."""
        return {"true_cfg_scale": guidance} | ({"guidance_scale": EMBEDDED} if self.told else {})

    @property
    def unit(self) -> int:
        return 2 * self.pipe.vae_scale_factor

    @property
    def channels(self) -> int:
        return self.pipe.transformer.config.in_channels // 4

    def encode_text(self, text: str) -> Encoded:
        """`text` [512, D], with the padding, and `pooled` [P]."""
        embeddings, pooled, _ = self.pipe.encode_prompt([text], None, device=self.text_device, max_sequence_length=self.text_length)
        return {"text": embeddings[0], "pooled": pooled[0]}

    def blank(self, n: int) -> tuple[FluxCondition, FluxCondition]:
        config = self.pipe.transformer.config
        texts = FluxCondition(
            text=torch.zeros(n, TEXT_LENGTH, config.joint_attention_dim, device=self.device),
            pooled=torch.zeros(n, config.pooled_projection_dim, device=self.device),
        )
        return texts, texts

    def condition_of(self, encoded: Sequence[Encoded]) -> FluxCondition:
        text, pooled = (to_device(torch.stack([one[name] for one in encoded]).float(), self.device) for name in ("text", "pooled"))
        return FluxCondition(text=text, pooled=pooled)

    def stock_latents(self, x: Tensor) -> Tensor:
        return packed(x)

    def own_latents(self, latents: Tensor) -> Tensor:
        return unpacked(latents, *self.latent_shape[1:])

    def first_noise(self, n: int, rng: torch.Generator) -> Tensor:
        return torch.randn(n, *self.latent_shape, generator=rng, device=rng.device)

    def forward(self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert isinstance(cond, FluxCondition)
        height, width = x_t.shape[-2:]
        image_ids = torch.cartesian_prod(torch.arange(1), torch.arange(height // 2), torch.arange(width // 2))
        v = module(
            hidden_states=packed(x_t),
            encoder_hidden_states=cond.text.to(x_t.dtype),
            pooled_projections=cond.pooled.to(x_t.dtype),
            timestep=to_device(t.float(), x_t.device),
            guidance=torch.full((len(x_t),), EMBEDDED, device=x_t.device) if self.told else None,
            img_ids=to_device(image_ids, x_t.device),
            txt_ids=torch.zeros(cond.text.shape[1], 3, device=x_t.device, dtype=image_ids.dtype),
            return_dict=False,
        )[0]
        return unpacked(v, height, width)

    def blocks_of(self, module: Any) -> Sequence[nn.Module]:
        """Blocks of two streams first, then those of one."""
        return [*module.transformer_blocks, *module.single_transformer_blocks]
