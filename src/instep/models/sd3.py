"""Stable Diffusion 3 and 3.5 text-to-image: an MMDiT with three text encoders on the rectified flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.diffusion.prediction import Condition
from instep.diffusion.transfer import to_device
from instep.models.image_family import TwoStreamFamily
from instep.models.preset import Distillation, Preset
from instep.models.prompt_cache import Encoded

# the pipeline's own limit of T5 tokens; CLIP's come before them, and the padding of both is attended to
CLIP_TOKENS, T5_TOKENS = 77, 256

# DMDR's scripts: adapters on all attention projections (the student's of rank 64, the fake's of 32) on 24 devices
DMDR = "DMDR's released code (github.com/vvvvvjdy/dmdr), train_t2i/sd3/scripts/multi_node/"
SD3 = Preset(
    source="model card of stabilityai/stable-diffusion-3-medium-diffusers",
    guidance=7.0,
    sampler_steps=28,
    micro_batch=8,
    distillation=Distillation(
        source=DMDR + "cold_start_sd3.sh: 8 images on each of 24 devices, without an average",
        guidance=7.0,
        levels=(1.0, 0.9, 0.75, 0.5),
        shift=3.0,
        student_lr=1e-6,
        fake_lr=5e-7,
        betas=(0.9, 0.999),
        student_weight_decay=0.01,
        fake_weight_decay=0.0,
        batch=192,
        critic_updates=5,
        lora_rank=64,
    ),
)
SD35_MEDIUM = Preset(source="model card of stabilityai/stable-diffusion-3.5-medium", guidance=4.5, sampler_steps=40, micro_batch=1)
SD35_LARGE = Preset(
    source="model card of stabilityai/stable-diffusion-3.5-large",
    guidance=3.5,
    sampler_steps=28,
    micro_batch=4,
    distillation=Distillation(
        source=DMDR + "cold_start_sd35.sh: 4 images on each of 24 devices, without an average",
        guidance=4.0,
        levels=(1.0, 0.9375, 0.8333333, 0.625),
        shift=5.0,
        student_lr=1e-6,
        fake_lr=2e-8,
        betas=(0.9, 0.999),
        student_weight_decay=0.01,
        fake_weight_decay=0.0,
        batch=96,
        critic_updates=5,
        lora_rank=64,
    ),
)


@dataclass(frozen=True, kw_only=True)
class SD3Condition(Condition):
    """Text embeddings of all encoders with the stock padding [B, 77 + 256, D], and the pooled ones of the two CLIPs [B, P]."""

    text: Tensor
    pooled: Tensor

    def tokens(self) -> tuple[Tensor, Tensor]:
        """All of them, padding included, as the transformer sees them."""
        return self.text, torch.ones(self.text.shape[:2], dtype=torch.bool, device=self.text.device)


class SD3Family(TwoStreamFamily):
    """A `StableDiffusion3Pipeline` seen as a family; latents [B, C, H, W] are shifted and scaled as the transformer sees them."""

    pipeline_class = "StableDiffusion3Pipeline"
    text_length = T5_TOKENS
    comfyui_reads_lora = True
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def __init__(self, pipe: Any, size: Size | Sequence[int] | None = None, name: str = "", source: str = "") -> None:
        super().__init__(pipe, size, name, source)
        self.shift = self.shift_of(pipe.scheduler.config)
        self.preset = self.preset_of(pipe.transformer.config)

    @classmethod
    def preset_of(cls, denoiser: Mapping[str, Any]) -> Preset:
        """3.5 normalises queries and keys, and 3.5 medium attends to the image twice in its first blocks."""
        return SD3 if denoiser.get("qk_norm") is None else SD35_MEDIUM if denoiser.get("dual_attention_layers") else SD35_LARGE

    @classmethod
    def shift_of(cls, scheduler: Mapping[str, Any]) -> float:
        return float(scheduler.get("shift", 1.0))

    def check_pipeline(self, pipe: Any) -> None:
        """Raises ValueError for a scheduler whose shift depends on the size: a student's levels are one list."""
        if pipe.scheduler.config.get("use_dynamic_shifting"):
            raise ValueError("scheduler: use_dynamic_shifting is not allowed; SD3's own scheduler has one fixed shift (3.0): copy the model's scheduler folder")

    @property
    def unit(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size

    @property
    def largest(self) -> int:
        return self.unit * self.pipe.transformer.config.pos_embed_max_size

    def encode_text(self, text: str) -> Encoded:
        """`text` [77 + 256, D] and `pooled` [P]."""
        embeddings, _, pooled, _ = self.pipe.encode_prompt(
            [text], None, None, do_classifier_free_guidance=False, max_sequence_length=self.text_length, device=self.text_device
        )
        return {"text": embeddings[0], "pooled": pooled[0]}

    def blank(self, n: int) -> tuple[SD3Condition, SD3Condition]:
        config = self.pipe.transformer.config
        texts = SD3Condition(
            text=torch.zeros(n, CLIP_TOKENS + T5_TOKENS, config.joint_attention_dim, device=self.device),
            pooled=torch.zeros(n, config.pooled_projection_dim, device=self.device),
        )
        return texts, texts

    def condition_of(self, encoded: Sequence[Encoded]) -> SD3Condition:
        text, pooled = (to_device(torch.stack([one[name] for one in encoded]).float(), self.device) for name in ("text", "pooled"))
        return SD3Condition(text=text, pooled=pooled)

    def forward(self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert isinstance(cond, SD3Condition)
        text, pooled = cond.text.to(x_t.dtype), cond.pooled.to(x_t.dtype)
        return module(x_t, encoder_hidden_states=text, pooled_projections=pooled, timestep=to_device(t.float() * 1000, x_t.device), return_dict=False)[0]
