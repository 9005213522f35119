"""FLUX.2-klein text-to-image: two streams, then one, on the rectified flow over patches of 2 x 2 latents; guidance is not embedded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.diffusion.prediction import Condition
from instep.diffusion.transfer import to_device, to_match
from instep.models.family import shown_tokens, skipped
from instep.models.image_family import ImageFamily
from instep.models.preset import Preset
from instep.models.prompt_cache import Encoded

TEXT_LENGTH = 512
# the pipeline's own shift for 4096 tokens (1024 x 1024) and 50 steps
SHIFT = 7.56363

KLEIN_BASE = Preset(source="defaults of diffusers' Flux2KleinPipeline", guidance=4.0, sampler_steps=50, micro_batch=1)
KLEIN = Preset(source="model card of black-forest-labs/FLUX.2-klein-4B, which is distilled: 4 steps, no guidance", guidance=1.0, sampler_steps=4, micro_batch=1)


@dataclass(frozen=True, kw_only=True)
class Flux2Condition(Condition):
    """Text embeddings [B, 512, D] with the stock padding, which is attended to."""

    text: Tensor

    def tokens(self) -> tuple[Tensor, Tensor]:
        """All of them, padding included, as the transformer sees them."""
        return self.text, torch.ones(self.text.shape[:2], dtype=torch.bool, device=self.text.device)


def packed(x: Tensor) -> Tensor:
    """Latents [B, C, h, w] as tokens [B, h w, C]."""
    return x.flatten(2).transpose(1, 2)


def _pass_on(hidden_states: Tensor, encoder_hidden_states: Tensor | None, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
    """A block that is left out: the streams as they came, in the order in which a block of two returns them."""
    return hidden_states if encoder_hidden_states is None else (encoder_hidden_states, hidden_states)


def _show_tokens(block: Any, args: tuple, output: Tensor) -> None:
    block.tokens(output[:, -block.image_tokens :])


class Flux2KleinBaseFamily(ImageFamily):
    """A `Flux2KleinPipeline` of a base model seen as a family; latents [B, 4 C, h, w] are patches of 2 x 2, normalised as the transformer sees them.

    The pipeline takes no negative prompts: its guidance leads away from the empty text.
    """

    pipeline_class = "Flux2KleinPipeline"
    even_sigmas = True
    takes_negative_prompt = False
    distilled = False
    preset = KLEIN_BASE
    text_length = TEXT_LENGTH
    comfyui_reads_lora = True
    lora_targets: tuple[str, ...] = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.linear_in", "ff.linear_out", "to_qkv_mlp_proj"),
    )

    def __init__(self, pipe: Any, size: Size | Sequence[int] | None = None, name: str = "", source: str = "") -> None:
        super().__init__(pipe, size, name, source)
        self.shift = self.shift_of(pipe.scheduler.config)

    @classmethod
    def accepts(cls, parts: Mapping[str, Any]) -> bool:
        return bool(parts.get("is_distilled")) == cls.distilled

    @classmethod
    def shift_of(cls, scheduler: Mapping[str, Any]) -> float:
        """The model's own scheduler shifts by size and number of steps: that of 1024 x 1024 and 50 steps."""
        return SHIFT if scheduler.get("use_dynamic_shifting") else float(scheduler.get("shift", 1.0))

    def check_pipeline(self, pipe: Any) -> None:
        """Raises ValueError for a transformer that is told guidance (FLUX.2-dev)."""
        if pipe.transformer.config.guidance_embeds:
            raise ValueError("transformer: guidance_embeds (FLUX.2-dev) is not built; allowed: FLUX.2-klein, whose transformer is not told guidance")

    @property
    def unit(self) -> int:
        return 2 * self.pipe.vae_scale_factor

    @property
    def stride(self) -> int:
        """A latent is a patch of 2 x 2 of the VAE's."""
        return self.unit

    def encode_text(self, text: str) -> Encoded:
        """`text` [512, D], with the padding."""
        embeddings, _ = self.pipe.encode_prompt([text], device=self.text_device, max_sequence_length=self.text_length)
        return {"text": embeddings[0]}

    def blank(self, n: int) -> tuple[Flux2Condition, Flux2Condition]:
        texts = Flux2Condition(text=torch.zeros(n, TEXT_LENGTH, self.pipe.transformer.config.joint_attention_dim, device=self.device))
        return texts, texts

    def condition_of(self, encoded: Sequence[Encoded]) -> Flux2Condition:
        return Flux2Condition(text=to_device(torch.stack([one["text"] for one in encoded]).float(), self.device))

    def stock_latents(self, x: Tensor) -> Tensor:
        return packed(x)

    def own_latents(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, self.latent_shape[1:])

    def first_noise(self, n: int, rng: torch.Generator) -> Tensor:
        return torch.randn(n, *self.latent_shape, generator=rng, device=rng.device)

    def stepped_latents(self, latents: Tensor) -> Tensor:
        """The pipeline returns them as the VAE takes them."""
        return packed(self._normalised(self.pipe._patchify_latents(latents)))

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's patches, [1, 4 C, 1, 1]."""
        bn, epsilon = self.pipe.vae.bn, self.pipe.vae.config.batch_norm_eps
        mean, std = (to_match(value, like).view(1, -1, 1, 1) for value in (bn.running_mean, (bn.running_var + epsilon).sqrt()))
        return mean, std

    def _normalised(self, patches: Tensor) -> Tensor:
        mean, std = self._statistics(patches)
        return (patches - mean) / std

    def decode_rows(self, x: Tensor) -> Tensor:
        mean, std = self._statistics(x)
        z = self.pipe._unpatchify_latents(x * std + mean)
        return self.pipe.vae.decode(z.to(self.vae_dtype)).sample.to(x.dtype) / 2 + 0.5

    def encode_rows(self, media: Tensor) -> Tensor:
        """Media [B, 3, H, W] in [0, 1] to latents [B, 4 C, h, w]: the posterior's mean."""
        z = self.pipe.vae.encode((media * 2 - 1).to(self.vae_dtype)).latent_dist.mode()
        return self._normalised(self.pipe._patchify_latents(z.to(media.dtype)))

    def forward(self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert isinstance(cond, Flux2Condition)
        (height, width), length = x_t.shape[-2:], cond.text.shape[1]
        one = torch.arange(1)
        image_ids, text_ids = (
            to_device(torch.cartesian_prod(one, *axes), x_t.device)
            for axes in ((torch.arange(height), torch.arange(width), one), (one, one, torch.arange(length)))
        )
        block: Any = self._last_shown(module)
        block.image_tokens = height * width
        v = module(
            hidden_states=packed(x_t),
            encoder_hidden_states=cond.text.to(x_t.dtype),
            timestep=to_device(t.float(), x_t.device),
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        return v.transpose(1, 2).unflatten(2, (height, width))

    def time_embedders(self, module: nn.Module) -> Sequence[nn.Module]:
        return [module.time_guidance_embed.timestep_embedder]  # type: ignore[union-attr, list-item]

    def time_width(self, module: nn.Module) -> int:
        config: Any = module.config
        return config.num_attention_heads * config.attention_head_dim

    def _last_shown(self, module: nn.Module) -> nn.Module:
        blocks: Any = module.single_transformer_blocks
        return blocks[(2 * len(blocks) - 1) // 3]

    def feature_block(self, module: nn.Module) -> nn.Module:
        """At two thirds of the one-stream blocks, which return text tokens, then image tokens; an identity beside it is shown the image's."""
        block: Any = self._last_shown(module)
        return shown_tokens(block, _show_tokens)

    def feature_width(self, module: nn.Module) -> int:
        return self.time_width(module)

    def skip(self, module: nn.Module, blocks: Sequence[int]) -> AbstractContextManager[None]:
        """Blocks of two streams are counted first, then those of one."""
        return skipped([*module.transformer_blocks, *module.single_transformer_blocks], blocks, _pass_on)  # type: ignore[misc]


class Flux2KleinFamily(Flux2KleinBaseFamily):
    """A `Flux2KleinPipeline` whose model is distilled already (`is_distilled`): the pipeline ignores guidance, so its teacher has none."""

    distilled = True
    preset = KLEIN
