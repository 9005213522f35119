"""Stable Diffusion XL text-to-image: a UNet that predicts noise, with two CLIPs and the image's size as conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.data.prompt import Prompt, as_prompts, negatives_of
from instep.diffusion.path import VariancePreserving
from instep.diffusion.prediction import Condition, PredictionType
from instep.diffusion.transfer import constants, to_device
from instep.models.family import shown_tokens, skipped
from instep.models.image_family import ImageFamily
from instep.models.preset import Distillation, Preset
from instep.models.prompt_cache import Encoded

CLIP_TOKENS = 77
# what a scheduler calls its model's output
KINDS: Mapping[str, PredictionType] = {"epsilon": "eps", "v_prediction": "v_prediction"}

# DMD2's training steps 999, 749, 499, 249 are the levels
SDXL = Preset(
    source="defaults of diffusers' StableDiffusionXLPipeline, which the card of stabilityai/stable-diffusion-xl-base-1.0 samples with",
    guidance=5.0,
    sampler_steps=50,
    micro_batch=1,
    distillation=Distillation(
        source="DMD2's released code (github.com/tianweiy/DMD2), experiments/sdxl/sdxl_cond999_8node_lr5e-7_denoising4step_..._backsim_scratch.sh and "
        "main/train_sd.py: 2 images on each of 64 devices",
        guidance=8.0,
        levels=(1.0, 0.75, 0.5, 0.25),
        shift=1.0,
        student_lr=5e-7,
        fake_lr=5e-7,
        fake_target="eps",
        betas=(0.9, 0.999),
        student_weight_decay=0.01,
        fake_weight_decay=0.01,
        batch=128,
        critic_updates=5,
    ),
)


@dataclass(frozen=True, kw_only=True)
class SDXLCondition(Condition):
    """Text embeddings of both CLIPs with the stock padding [B, 77, D], and the pooled ones of the second [B, P]."""

    text: Tensor
    pooled: Tensor

    def tokens(self) -> tuple[Tensor, Tensor]:
        """All of them, padding included, as the UNet sees them."""
        return self.text, torch.ones(self.text.shape[:2], dtype=torch.bool, device=self.text.device)


def _show_tokens(block: Any, args: tuple, output: Tensor) -> None:
    block.tokens(output.flatten(2).transpose(1, 2))


class SDXLFamily(ImageFamily):
    """A `StableDiffusionXLPipeline` seen as a family; latents [B, C, H, W] are scaled as the UNet sees them.

    Its levels are the training steps of the pipeline's own scheduler, t = k / N for step k - 1: 1, 0.75, 0.5, 0.25 are the steps 999, 749, 499, 249.
    """

    pipeline_class = "StableDiffusionXLPipeline"
    denoisers: tuple[str, ...] = ("unet",)
    passes_generator = True
    flow_scheduler = False
    preset = SDXL
    text_length = CLIP_TOKENS
    comfyui_reads_lora = True
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")

    def __init__(self, pipe: Any, size: Size | Sequence[int] | None = None, name: str = "", source: str = "") -> None:
        super().__init__(pipe, size, name, source)
        self.path = VariancePreserving(alpha_bars=tuple(pipe.scheduler.alphas_cumprod.double().tolist()))
        self.prediction_type = KINDS[pipe.scheduler.config.prediction_type]

    def check_pipeline(self, pipe: Any) -> None:
        """Raises ValueError for relatives that are conditioned otherwise, and for a scheduler without a table of noise levels."""
        config, scheduler = pipe.unet.config, pipe.scheduler
        kind = scheduler.config.get("prediction_type")
        if getattr(scheduler, "alphas_cumprod", None) is None or kind not in KINDS:
            raise ValueError(
                f"scheduler: a {type(scheduler).__name__} with prediction_type {kind!r} is not allowed; SDXL's has a table of betas and predicts "
                f"{' or '.join(KINDS)}: copy the scheduler folder of stable-diffusion-xl-base-1.0"
            )
        if config.addition_embed_type != "text_time" or config.time_cond_proj_dim is not None:
            raise ValueError(
                f"unet: addition_embed_type {config.addition_embed_type!r}, time_cond_proj_dim {config.time_cond_proj_dim} is not allowed; SDXL's are "
                "'text_time' and None (a UNet that is told guidance is a distilled one already)"
            )
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"unet: {config.in_channels} channels in, {config.out_channels} out is not allowed; a text-to-image UNet has as many (inpainting has more)"
            )
        if pipe.vae.config.get("latents_mean") is not None:
            raise ValueError("vae: latents_mean is not allowed; SDXL's VAE has a scaling_factor alone: copy the vae folder of stable-diffusion-xl-base-1.0")

    @property
    def unit(self) -> int:
        """Pixels that the VAE and the UNet's halvings make one."""
        return self.pipe.vae_scale_factor * 2 ** (len(self.pipe.unet.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        return self.pipe.unet.config.in_channels

    def encode_text(self, text: str) -> Encoded:
        """`text` [77, D] and `pooled` [P]."""
        embeddings, _, pooled, _ = self.pipe.encode_prompt(text, device=self.text_device, do_classifier_free_guidance=False)
        return {"text": embeddings[0], "pooled": pooled[0]}

    def unconditional(self, prompts: Sequence[Prompt | str]) -> SDXLCondition:
        """The negative prompts; without one zeros, as the pipeline has them (`force_zeros_for_empty_prompt`)."""
        found = as_prompts(prompts)
        encoded = self.encoded(negatives_of(found))
        if self.pipe.config.force_zeros_for_empty_prompt:
            encoded = [
                one if prompt.negative is not None else {name: torch.zeros_like(value) for name, value in one.items()}
                for prompt, one in zip(found, encoded, strict=True)
            ]
        return self.condition_of(encoded)

    def blank(self, n: int) -> tuple[SDXLCondition, SDXLCondition]:
        config = self.pipe.unet.config
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        texts = SDXLCondition(
            text=torch.zeros(n, CLIP_TOKENS, config.cross_attention_dim, device=self.device), pooled=torch.zeros(n, width, device=self.device)
        )
        return texts, texts

    def condition_of(self, encoded: Sequence[Encoded]) -> SDXLCondition:
        text, pooled = (to_device(torch.stack([one[name] for one in encoded]).float(), self.device) for name in ("text", "pooled"))
        return SDXLCondition(text=text, pooled=pooled)

    def forward(self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Micro-conditioning is the pipeline's default: the original and the target size are that of the image, which is not cropped."""
        assert isinstance(cond, SDXLCondition) and isinstance(self.path, VariancePreserving)
        height, width = (side * self.pipe.vae_scale_factor for side in x_t.shape[-2:])
        time_ids = constants([[height, width, 0, 0, height, width]], cond.pooled).expand(len(x_t), 6)
        return module(
            x_t,
            to_device(self.path.training_step(t), x_t.device),
            encoder_hidden_states=cond.text.to(x_t.dtype),
            added_cond_kwargs={"text_embeds": cond.pooled.to(x_t.dtype), "time_ids": time_ids},
            return_dict=False,
        )[0]

    def time_embedders(self, module: nn.Module) -> Sequence[nn.Module]:
        return [module.time_embedding]  # type: ignore[list-item]

    def time_width(self, module: nn.Module) -> int:
        embedder: Any = module.time_embedding
        return embedder.linear_2.out_features

    def feature_block(self, module: nn.Module) -> nn.Module:
        """The UNet's middle, where DMD2's discriminator reads it too; an identity beside it is shown its pixels as tokens."""
        block: Any = module.mid_block
        return shown_tokens(block, _show_tokens)

    def feature_width(self, module: nn.Module) -> int:
        config: Any = module.config
        return config.block_out_channels[-1]

    def skip(self, module: nn.Module, blocks: Sequence[int]) -> AbstractContextManager[None]:
        """The transformer blocks are counted, on the way down, in the middle, then on the way up."""
        sides: Any = (*module.down_blocks, module.mid_block, *module.up_blocks)  # type: ignore[misc]
        attended = [attention for side in sides for attention in getattr(side, "attentions", ())]
        return skipped([block for attention in attended for block in attention.transformer_blocks], blocks)

    def lora_keys(self, part: str, layer: str) -> tuple[str, str]:
        """The names of kohya's trainer, which diffusers converts. Of PEFT's names ComfyUI leaves a UNet's attention out."""
        name = f"lora_unet_{layer.replace('.', '_')}"
        return f"{name}.lora_down.weight", f"{name}.lora_up.weight"

    def calls(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        """A call has negative prompts, or zeros in their place: neighbours that agree share one."""
        return [list(group) for _, group in groupby(prompts, key=lambda prompt: prompt.negative is None)]
