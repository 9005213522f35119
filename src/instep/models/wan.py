"""Wan text-to-video (2.1 and the Wan 2.2 VAE layout) through diffusers' own modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from instep.core.size import Size
from instep.diffusion.prediction import Condition
from instep.diffusion.transfer import to_device
from instep.models.family import ComfyUI, skipped
from instep.models.pipeline_family import PipelineFamily, has_part
from instep.models.preset import Distillation, Preset
from instep.models.prompt_cache import Encoded
from instep.models.wan_attention import PaddedTextProcessor, RotaryProcessor
from instep.models.wan_comfyui import WanComfyUI, comfyui_module
from instep.models.wan_vae import decode_latents, encode_latents

# WanPipeline pads every prompt to this many tokens, without a mask
STOCK_TEXT_LENGTH = 512
# WanPipeline takes heights and widths that this divides
STOCK_SIDE = 16


@dataclass(frozen=True, kw_only=True)
class WanCondition(Condition):
    """Text embeddings [B, L, D] and the additive attention bias of each token [B, L] that stands for the stock padding.

    `bias` None means that of zeros, where nothing is padded: cross-attention then needs no mask, which costs time.
    """

    text: Tensor
    bias: Tensor | None = None

    def tokens(self) -> tuple[Tensor, Tensor]:
        text, bias = self.text, self._explicit_bias()
        return text, bias > -math.inf

    def stack(self, other: Self) -> Self:
        """Both batches, one after the other. The bias is made explicit unless neither has one and both texts are equally long."""
        if self.bias is None and other.bias is None and self.text.shape[1] == other.text.shape[1]:
            return super().stack(other)
        return super(WanCondition, replace(self, bias=self._explicit_bias())).stack(replace(other, bias=other._explicit_bias()))

    def _explicit_bias(self) -> Tensor:
        return self.text.new_zeros(self.text.shape[:2]) if self.bias is None else self.bias

    def _join(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Batches of unequal text length are padded to the longer one with tokens that weigh nothing."""
        if name in ("text", "bias") and a.shape[1] != b.shape[1]:
            length, fill = max(a.shape[1], b.shape[1]), 0.0 if name == "text" else -math.inf
            a, b = (torch.cat([v, v.new_full((len(v), length - v.shape[1], *v.shape[2:]), fill)], 1) if v.shape[1] < length else v for v in (a, b))
        return torch.cat([a, b])


def _bias(cond: Condition | None) -> Tensor | None:
    return cond.bias if isinstance(cond, WanCondition) else None


# Self-Forcing writes guidance w as c + w (c - u): its 3 is 4 here
WAN21_DMD = Distillation(
    source="Self-Forcing-Plus (github.com/GoatWu/Self-Forcing-Plus), configs/self_forcing_14b_dmd.yaml: Wan 2.1 14B by DMD in 4 steps; the same values as in "
    "Self-Forcing's configs/self_forcing_dmd.yaml for the 1.3B model",
    guidance=4.0,
    levels=(1.0, 0.9375, 0.8333333, 0.625),
    shift=5.0,
    student_lr=2e-6,
    fake_lr=4e-7,
    betas=(0.0, 0.999),
    student_weight_decay=0.01,
    fake_weight_decay=0.01,
    ema=0.99,
    batch=64,
    critic_updates=5,
)
WAN21 = Preset(
    source="model cards of Wan-AI/Wan2.1-T2V-1.3B-Diffusers and Wan-AI/Wan2.1-T2V-14B-Diffusers; defaults of diffusers' WanPipeline",
    guidance=5.0,
    sampler_steps=50,
    distillation=WAN21_DMD,
    micro_batch=1,
)


class WanFamily(PipelineFamily):
    """A `WanPipeline` of one transformer seen as a family; latents are normalised as the transformer sees them."""

    pipeline_class = "WanPipeline"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    comfyui: ComfyUI | None = WanComfyUI()
    comfyui_reads_lora = True
    preset = WAN21
    text_length = STOCK_TEXT_LENGTH
    divides_tokens = True
    # whether the pipeline gives each token a level of its own (Wan 2.2 TI2V)
    expand_timesteps = False

    def __init__(self, pipe: Any, size: Size | Sequence[int] | None = None, name: str = "", source: str = "") -> None:
        super().__init__(pipe, size, name, source)
        self.shift = self.shift_of(pipe.scheduler.config)

    @classmethod
    def accepts(cls, parts: Mapping[str, Any]) -> bool:
        experts = 2 if has_part(parts, "transformer_2") else 1
        return experts == len(cls.denoisers) and bool(parts.get("expand_timesteps")) == cls.expand_timesteps

    @classmethod
    def shift_of(cls, scheduler: Mapping[str, Any]) -> float:
        return float(scheduler.get("flow_shift") or scheduler.get("shift") or 1.0)

    def check_pipeline(self, pipe: Any) -> None:
        if len(self.denoisers) == 1 and getattr(pipe, "transformer_2", None) is not None:
            raise ValueError("pipeline: it has two transformers (Wan 2.2's experts); load it with instep.load, which chooses the family of two experts")
        if bool(pipe.config.expand_timesteps) != self.expand_timesteps:
            raise ValueError(
                f"pipeline: expand_timesteps {pipe.config.expand_timesteps} (a level for every token: Wan 2.2 TI2V) does not fit {type(self).__name__}; load "
                "it with instep.load, which chooses the family"
            )

    def native_size(self) -> Size:
        return Size(480, 832, 81)

    def fit_size(self, size: Size) -> tuple[int, ...]:
        spatial, temporal = self.pipe.vae_scale_factor_spatial, self.pipe.vae_scale_factor_temporal
        if size.height % (2 * spatial) or size.width % (2 * spatial) or (size.frames - 1) % temporal:
            raise ValueError(
                f"size: {size.height} x {size.width}, {size.frames} frames does not fit this model; height and width are multiples of "
                f"{2 * spatial}, frames are {temporal} k + 1"
            )
        return (self.pipe.vae.config.z_dim, (size.frames - 1) // temporal + 1, size.height // spatial, size.width // spatial)

    def smallest(self) -> Size:
        token = self.pipe.vae_scale_factor_spatial * self.pipe.transformer.config.patch_size[1]
        unit = math.lcm(token, STOCK_SIDE)
        side = math.ceil(3 * token / unit) * unit
        return Size(side, side, 2 * self.pipe.vae_scale_factor_temporal + 1)

    def encode_text(self, text: str) -> Encoded:
        """`text` [L, D], without the padding."""
        padded, _ = self.pipe.encode_prompt([text], do_classifier_free_guidance=False, max_sequence_length=self.text_length, device=self.text_device)
        used = padded[0].abs().sum(-1).nonzero()
        return {"text": padded[0, : int(used.max()) + 1 if len(used) else 0]}

    def blank(self, n: int) -> tuple[WanCondition, WanCondition]:
        """Texts of the stock length."""
        texts = WanCondition(
            text=torch.zeros(n, STOCK_TEXT_LENGTH, self.pipe.transformer.config.text_dim, device=self.device),
            bias=torch.zeros(n, STOCK_TEXT_LENGTH, device=self.device),
        )
        return texts, texts

    def condition_of(self, encoded: Sequence[Encoded]) -> WanCondition:
        """Embeddings up to the longest prompt and one padding token, which carries the weight of all padding."""
        texts = [one["text"] for one in encoded]
        length = max(len(text) for text in texts) + 1
        width = self.pipe.transformer.config.text_dim
        embeddings = torch.zeros(len(texts), length, width)
        bias = torch.full((len(texts), length), -math.inf)
        for i, text in enumerate(texts):
            embeddings[i, : len(text)] = text
            bias[i, : len(text)] = 0
            if len(text) < length:
                bias[i, len(text)] = math.log(STOCK_TEXT_LENGTH - len(text)) if len(text) < STOCK_TEXT_LENGTH else -math.inf
        return WanCondition(text=to_device(embeddings, self.device), bias=to_device(bias, self.device))

    def decode_rows(self, x: Tensor) -> Tensor:
        return decode_latents(self.pipe.vae, x)

    def encode_rows(self, media: Tensor) -> Tensor:
        """Media [B, 3, F, H, W] in [0, 1] to latents [B, C, f, h, w]."""
        return encode_latents(self.pipe.vae, media)

    def prepare(self, module: Any, current: Callable[[], Condition | None]) -> None:
        for block in module.blocks:
            if type(block.attn1.processor) is WanAttnProcessor:
                block.attn1.set_processor(RotaryProcessor(block.attn1.processor))
            block.attn2.set_processor(PaddedTextProcessor(lambda: _bias(current())))

    def forward(self, module: Any, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert isinstance(cond, WanCondition)
        return module(x_t, self.timesteps(t, x_t), cond.text.to(x_t.dtype), return_dict=False)[0]

    def timesteps(self, t: Tensor, x_t: Tensor) -> Tensor:
        """Levels t [B] as the transformer reads them: [B], or [B, N] with one for each token."""
        return to_device(t.float() * 1000, x_t.device)

    def time_embedders(self, module: Any) -> Sequence[nn.Module]:
        return [module.condition_embedder.time_embedder]

    def time_width(self, module: Any) -> int:
        return module.config.num_attention_heads * module.config.attention_head_dim

    def feature_block(self, module: Any) -> nn.Module:
        """At two thirds of the depth: what is shown is known there, and the last third only turns it into a velocity."""
        return module.blocks[(2 * len(module.blocks) - 1) // 3]

    def feature_width(self, module: Any) -> int:
        return self.time_width(module)

    def skip(self, module: Any, blocks: Sequence[int]) -> AbstractContextManager[None]:
        return skipped(module.blocks, blocks)

    def lora_keys(self, part: str, layer: str) -> tuple[str, str]:
        """The names that ComfyUI maps onto Wan and that diffusers converts by itself."""
        name = f"diffusion_model.{comfyui_module(layer)}"
        return f"{name}.lora_A.weight", f"{name}.lora_B.weight"
