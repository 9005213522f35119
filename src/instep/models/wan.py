"""Wan text-to-video (2.1 and the Wan 2.2 VAE layout) through diffusers' own modules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from instep.core.quiet import quiet
from instep.core.size import VideoSize, as_size
from instep.data.first_frame import FirstFrameReader, read_first_frame
from instep.data.prompt import Prompt, negatives_of, texts_of
from instep.diffusion.path import RectifiedFlow
from instep.diffusion.prediction import Condition
from instep.models.family import skipped
from instep.models.wan_vae import decode_latents, encode_latents

# WanPipeline pads every prompt to this many tokens, without a mask
STOCK_TEXT_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class WanCondition(Condition):
    """Text embeddings [B, L, D] and the additive attention bias of each token [B, L] that stands for the stock padding."""

    text: Tensor
    bias: Tensor

    def tokens(self) -> tuple[Tensor, Tensor]:
        return self.text, self.bias > -math.inf

    def _join(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Batches of unequal text length are padded to the longer one with tokens that weigh nothing."""
        if name in ("text", "bias") and a.shape[1] != b.shape[1]:
            length, fill = max(a.shape[1], b.shape[1]), 0.0 if name == "text" else -math.inf
            a, b = (torch.cat([v, v.new_full((len(v), length - v.shape[1], *v.shape[2:]), fill)], 1) if v.shape[1] < length else v for v in (a, b))
        return torch.cat([a, b])


class PaddedTextProcessor(WanAttnProcessor):
    """Cross-attention over a short text that equals attention over the text padded to the stock length.

    Stock padding repeats one and the same key r times; one such key with log r added to its logit weighs the same.
    """

    def __init__(self, current: Callable[[], Condition | None]) -> None:
        super().__init__()
        self.current = current

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        cond = self.current()
        if isinstance(cond, WanCondition):
            attention_mask = cond.bias[:, None, None].to(hidden_states.dtype)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


class WanFamily:
    """A `WanPipeline` seen as a family (see `models/family.py`); latents are normalised as the transformer sees them."""

    path = RectifiedFlow()
    prediction_type = "velocity"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def __init__(self, pipe: Any, size: VideoSize | Sequence[int], name: str = "wan", source: str = "") -> None:
        """`source` is where the pipeline was loaded from, for the run's record."""
        size = as_size(size)
        self.pipe, self.size, self.name, self.source = pipe, size, name, source
        self.shift = float(pipe.scheduler.config.get("flow_shift") or pipe.scheduler.config.get("shift") or 1.0)
        spatial, temporal = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
        if size.height % (2 * spatial) or size.width % (2 * spatial) or (size.frames - 1) % temporal:
            raise ValueError(
                f"size: {size.height} x {size.width}, {size.frames} frames does not fit this model; height and width are multiples of "
                f"{2 * spatial}, frames are {temporal} k + 1"
            )
        self.latent_shape = WanStock(pipe).latent_shape(size)
        self._texts: dict[str, Tensor] = {}
        for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
            part.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path, size: VideoSize, name: str = "wan") -> Self:
        """From a diffusers folder, in float32, offline."""
        with quiet():
            from diffusers import WanPipeline

            return cls(WanPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True), size, name, str(folder))

    @property
    def pretrained(self) -> nn.Module:
        return self.pipe.transformer

    def new_backbone(self) -> nn.Module:
        return copy.deepcopy(self.pipe.transformer).eval()

    @torch.no_grad()
    def _text(self, prompts: Sequence[str]) -> list[Tensor]:
        new = [p for p in dict.fromkeys(prompts) if p not in self._texts]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            padded, _ = self.pipe.encode_prompt(part, do_classifier_free_guidance=False, max_sequence_length=STOCK_TEXT_LENGTH)
            for prompt, row in zip(part, padded, strict=True):
                used = row.abs().sum(-1).nonzero()
                self._texts[prompt] = row[: int(used.max()) + 1 if len(used) else 0].float()
        return [self._texts[p] for p in prompts]

    def encode(self, prompts: Sequence[Prompt | str]) -> WanCondition:
        """Embeddings up to the longest prompt and one padding token, which carries the weight of all padding."""
        return self._pad(self._text(texts_of(prompts)))

    def unconditional(self, prompts: Sequence[Prompt | str]) -> WanCondition:
        """The negative prompts, padded likewise; each is encoded alone, so that what it is does not depend on its neighbours."""
        return self._pad([self._text([negative])[0] for negative in negatives_of(prompts)])

    def _pad(self, texts: Sequence[Tensor]) -> WanCondition:
        length = max(len(text) for text in texts) + 1
        device = self.pipe.transformer.device
        width = self.pipe.transformer.config.text_dim
        embeddings = torch.zeros(len(texts), length, width)
        bias = torch.full((len(texts), length), -math.inf)
        for i, text in enumerate(texts):
            embeddings[i, : len(text)] = text
            bias[i, : len(text)] = 0
            if len(text) < length:
                bias[i, len(text)] = math.log(STOCK_TEXT_LENGTH - len(text)) if len(text) < STOCK_TEXT_LENGTH else -math.inf
        return WanCondition(text=embeddings.to(device), bias=bias.to(device))

    def decode(self, x: Tensor) -> Tensor:
        return decode_latents(self.pipe.vae, x)

    def encode_media(self, media: Tensor) -> Tensor:
        """Media [B, 3, F, H, W] in [0, 1] to latents [B, C, f, h, w]."""
        return encode_latents(self.pipe.vae, media)

    def prepare(self, module: nn.Module, current: Callable[[], Condition | None]) -> None:
        for block in module.blocks:
            block.attn2.set_processor(PaddedTextProcessor(current))

    def forward(self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert isinstance(cond, WanCondition)
        dtype = next(module.parameters()).dtype
        return module(x_t.to(dtype), t.float() * 1000, cond.text.to(dtype), return_dict=False)[0]

    def time_embedders(self, module: nn.Module) -> Sequence[nn.Module]:
        return [module.condition_embedder.time_embedder]

    def time_width(self, module: nn.Module) -> int:
        return module.config.num_attention_heads * module.config.attention_head_dim

    def feature_block(self, module: nn.Module) -> nn.Module:
        """At two thirds of the depth: what is shown is known there, and the last third only turns it into a velocity."""
        return module.blocks[(2 * len(module.blocks) - 1) // 3]

    def feature_width(self, module: nn.Module) -> int:
        return self.time_width(module)

    def skip(self, module: nn.Module, blocks: Sequence[int]) -> AbstractContextManager[None]:
        return skipped(module.blocks, blocks)

    def pipeline(self, module: nn.Module) -> Any:
        """A stock WanPipeline around `module`, whose attention processors are the stock ones again."""
        from diffusers import WanPipeline

        return WanPipeline(**{**self.pipe.components, "transformer": stock_attention(module)})


def stock_attention(module: nn.Module) -> nn.Module:
    """A copy of a Wan transformer with the stock attention processors."""
    plain = copy.deepcopy(module)
    for block in plain.blocks:
        block.attn2.set_processor(WanAttnProcessor())
    return plain


@dataclass(frozen=True, kw_only=True)
class _Text(Condition):
    """Text embeddings [B, 512, D] with the stock padding."""

    text: Tensor


class WanStock:
    """A `WanPipeline` as `models/stock.py` asks for it."""

    path = RectifiedFlow()
    prediction_type = "velocity"
    axes = (0, 1, 2, 3, 4)
    passes_generator = False
    size = VideoSize()

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        spatial, temporal = self.pipe.vae_scale_factor_spatial, self.pipe.vae_scale_factor_temporal
        return (self.pipe.vae.config.z_dim, (size.frames - 1) // temporal + 1, size.height // spatial, size.width // spatial)

    def smallest(self) -> VideoSize:
        side = 3 * self.pipe.vae_scale_factor_spatial * self.pipe.transformer.config.patch_size[1]
        return VideoSize(side, side, 2 * self.pipe.vae_scale_factor_temporal + 1)

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt | str], size: VideoSize, first_frame: FirstFrameReader = read_first_frame) -> Condition:
        text, _ = self.pipe.encode_prompt(texts_of(prompts), do_classifier_free_guidance=False, max_sequence_length=STOCK_TEXT_LENGTH)
        return _Text(text=text)

    def forward(self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert isinstance(cond, _Text)
        return module(x_t, t * 1000, cond.text.to(x_t), return_dict=False)[0]
