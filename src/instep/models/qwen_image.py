"""Qwen-Image text-to-image: two streams on the rectified flow over patches of 2 x 2 latents; guidance keeps the norm of each patch's velocity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.diffusion.guidance import GuidanceRule, RescaledGuidance
from instep.diffusion.levels import few_step_levels
from instep.diffusion.prediction import Condition
from instep.diffusion.transfer import to_device
from instep.models.flux import packed, unpacked
from instep.models.image_family import TwoStreamFamily
from instep.models.preset import Distillation, Preset
from instep.models.prompt_cache import Encoded
from instep.models.ragged_text import RaggedText
from instep.models.wan_vae import denormalise, normalise

TEXT_LENGTH, PATCH = 512, 2
# the card's square image, and its tokens
SIDE = 1328
TOKENS = (SIDE // 16) ** 2

QWEN_IMAGE = Preset(
    source="model card of Qwen/Qwen-Image: 50 steps, true_cfg_scale 4",
    guidance=4.0,
    sampler_steps=50,
    micro_batch=1,
    distillation=Distillation(
        source="Qwen-Image-Lightning (github.com/ModelTC/Qwen-Image-Lightning), generate_with_diffusers.py: 4 steps at shift 3, the settings of training are "
        "not published",
        levels=few_step_levels(4, 3.0),
        shift=3.0,
    ),
)


class QwenImageFamily(TwoStreamFamily):
    """A `QwenImagePipeline` seen as a family; latents [B, C, H, W] are normalised as the transformer sees them.

    The pipeline guides by `true_cfg_scale`, and rescales the guided velocity of each token to the conditional one's norm.
    """

    pipeline_class = "QwenImagePipeline"
    even_sigmas = True
    guides_by_negative_prompt = True
    guidance_rule: GuidanceRule | None = RescaledGuidance(PATCH)
    preset = QWEN_IMAGE
    text_length = TEXT_LENGTH
    comfyui_reads_lora = True
    lora_targets: tuple[str, ...] = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )

    def __init__(self, pipe: Any, size: Size | Sequence[int] | None = None, name: str = "", source: str = "") -> None:
        super().__init__(pipe, size, name, source)
        self.shift = self.shift_of(pipe.scheduler.config)

    @classmethod
    def shift_of(cls, scheduler: Mapping[str, Any]) -> float:
        """The model's own scheduler shifts by size, exp(mu) with mu linear in the tokens: that of 1328 x 1328."""
        if not scheduler.get("use_dynamic_shifting"):
            return float(scheduler.get("shift", 1.0))
        keys = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        fewest, most, low, high = (float(scheduler.get(key, usual)) for key, usual in keys.items())
        return math.exp(low + (high - low) * (TOKENS - fewest) / (most - fewest))

    def check_pipeline(self, pipe: Any) -> None:
        """Raises ValueError for relatives that are conditioned otherwise: told guidance, given images (Edit-2511), made of layers (Layered)."""
        config = pipe.transformer.config
        if wrong := [key for key in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope") if config.get(key)]:
            raise ValueError(f"transformer: {wrong[0]} is not allowed; Qwen-Image's has none of it: choose a model that draws one image from a text")

    def guidance_arguments(self, guidance: float) -> dict[str, float]:
        return {"true_cfg_scale": guidance}

    def native_size(self) -> Size:
        return Size(SIDE, SIDE, 1)

    @property
    def unit(self) -> int:
        return PATCH * self.pipe.vae_scale_factor

    @property
    def channels(self) -> int:
        return self.pipe.transformer.config.in_channels // PATCH**2

    def encode_text(self, text: str) -> Encoded:
        """`text` [L, D], without padding; the instruction before the text is cut off."""
        embeddings, _ = self.pipe.encode_prompt([text], device=self.text_device, max_sequence_length=self.text_length)
        return {"text": embeddings[0]}

    def blank(self, n: int) -> tuple[RaggedText, RaggedText]:
        texts = RaggedText.blank(n, TEXT_LENGTH, self.pipe.transformer.config.joint_attention_dim, self.device)
        return texts, texts

    def condition_of(self, encoded: Sequence[Encoded]) -> RaggedText:
        return RaggedText.of([one["text"] for one in encoded], self.device)

    def stock_latents(self, x: Tensor) -> Tensor:
        return packed(x)

    def own_latents(self, latents: Tensor) -> Tensor:
        return unpacked(latents, *self.latent_shape[1:])

    def first_noise(self, n: int, rng: torch.Generator) -> Tensor:
        return torch.randn(n, *self.latent_shape, generator=rng, device=rng.device)

    def decode_rows(self, x: Tensor) -> Tensor:
        """The VAE is one of videos, and an image its first frame; its own `decode` clamps, which has no gradient where it saturates."""
        vae = self.pipe.vae
        vae.clear_cache()
        z = vae.post_quant_conv(denormalise(vae, x[:, :, None]).to(self.vae_dtype))
        return vae.decoder(z, feat_cache=list(vae._feat_map), feat_idx=[0])[:, :, 0].to(x.dtype) / 2 + 0.5

    def encode_rows(self, media: Tensor) -> Tensor:
        """Media [B, 3, H, W] in [0, 1] to latents [B, C, h, w]: the posterior's mean."""
        z = self.pipe.vae.encode((media * 2 - 1)[:, :, None].to(self.vae_dtype)).latent_dist.mode()
        return normalise(self.pipe.vae, z.to(media.dtype))[:, :, 0]

    def forward(self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert isinstance(cond, RaggedText)
        height, width = x_t.shape[-2:]
        v = module(
            hidden_states=packed(x_t),
            encoder_hidden_states=cond.text.to(x_t.dtype),
            encoder_hidden_states_mask=cond.present(),
            timestep=to_device(t.float(), x_t.device),
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpacked(v, height, width)
