"""CogVideoX text-to-video (2B, 5B and 1.5-5B) through diffusers' own modules: v-prediction on a variance-preserving path."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.diffusion.path import VariancePreserving
from instep.diffusion.prediction import Condition, PredictionType
from instep.diffusion.transfer import to_device
from instep.models.family import shown_tokens, skipped
from instep.models.pipeline_family import PipelineFamily
from instep.models.preset import Distillation, Preset
from instep.models.prompt_cache import Encoded

# what CogVideoXPipeline pads every prompt to; the padding is attended to, there is no mask
STOCK_TEXT_LENGTH = 226
# ours [B, C, F, H, W] in the order of the pipeline's latents, [B, F, C, H, W]; its own inverse
AXES = (0, 2, 1, 3, 4)


# DOLLAR writes guidance w as c + w (c - u): its 3.5 is 4.5 here. Its training steps 999, 749, 499, 249 are the levels
COGVIDEOX = Preset(
    source="model cards of THUDM/CogVideoX-2b, THUDM/CogVideoX-5b and THUDM/CogVideoX1.5-5B",
    guidance=6.0,
    sampler_steps=50,
    micro_batch=1,
    distillation=Distillation(
        source="DOLLAR (Ding et al. 2024, arXiv 2412.15689), experimental setup: a model of CogVideoX's architecture, not CogVideoX itself, by VSD in 4 steps",
        guidance=4.5,
        levels=(1.0, 0.75, 0.5, 0.25),
        shift=1.0,
        student_lr=2e-5,
        batch=8,
        critic_updates=5,
    ),
)


@dataclass(frozen=True, kw_only=True)
class CogVideoXCondition(Condition):
    """Text embeddings [B, 226, D] with the stock padding."""

    text: Tensor

    def tokens(self) -> tuple[Tensor, Tensor]:
        """All of them, padding included, as the transformer sees them."""
        return self.text, torch.ones(self.text.shape[:2], dtype=torch.bool, device=self.text.device)


def noise_path(scheduler: Any) -> VariancePreserving:
    """The path whose alpha-bar is the scheduler's `alphas_cumprod` (SNR shift and zero-SNR rescaling are in it).

    ValueError if the scheduler reads its model's output as something else than v_prediction.
    """
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(
            f"scheduler: a {type(scheduler).__name__} is not allowed, since CogVideoX's has a table of noise levels (CogVideoXDDIMScheduler); copy the model's "
            "own scheduler folder"
        )
    kind = scheduler.config.get("prediction_type")
    if kind != "v_prediction":
        raise ValueError(f"prediction_type: the scheduler's is {kind!r}; CogVideoX predicts v, allowed: 'v_prediction'; copy the model's own scheduler folder")
    return VariancePreserving(alpha_bars=tuple(scheduler.alphas_cumprod.double().tolist()))


def check_pipeline(pipe: Any) -> None:
    """ValueError for relatives of CogVideoX text-to-video that this family cannot run."""
    config = pipe.transformer.config
    if config.in_channels != config.out_channels or config.ofs_embed_dim:
        raise ValueError(
            f"in_channels: {config.in_channels} for {config.out_channels} output channels looks like an image-to-video or control model; allowed: text-to-video"
        )
    if config.max_text_seq_length != STOCK_TEXT_LENGTH:
        raise ValueError(
            f"max_text_seq_length: {config.max_text_seq_length} is not allowed; CogVideoXPipeline pads prompts to {STOCK_TEXT_LENGTH} by "
            "default, so a student trained at another length would be sampled wrongly"
        )


def call(pipe: Any, path: VariancePreserving, module: Any, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """v [B, C, F, H, W] of `module` as the pipeline calls its transformer; x_t [B, C, F, H, W], t [B] in [0, 1], text [B, 226, D]."""
    height, width = x_t.shape[-2:]
    rotary = None
    if module.config.use_rotary_positional_embeddings:
        spatial = pipe.vae_scale_factor_spatial
        rotary = pipe._prepare_rotary_positional_embeddings(height * spatial, width * spatial, x_t.shape[2], x_t.device)
    seen = x_t.permute(AXES)
    # contiguous, as the tensors that the pipeline draws are
    v = module(seen.contiguous(), text.to(x_t.dtype), to_device(path.training_step(t), x_t.device), image_rotary_emb=rotary, return_dict=False)[0]
    return v.permute(AXES)


def _pass_on(hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """A block that is left out: video and text tokens as they came."""
    return hidden_states, encoder_hidden_states


def _show_tokens(block: Any, args: tuple, output: tuple[Tensor, Tensor]) -> None:
    block.tokens(output[0])


class CogVideoXFamily(PipelineFamily):
    """A `CogVideoXPipeline` seen as a family; latents are scaled as the transformer sees them, [B, C, F, H, W].

    Its levels are the training steps of the pipeline's own scheduler, t = k / N for step k - 1: 1, 0.75, 0.5, 0.25 are the steps 999, 749, 499, 249. No
    timestep shift is added to them (`shift` 1): a shift of the signal-to-noise ratio is in the scheduler's table already.
    """

    pipeline_class = "CogVideoXPipeline"
    prediction_type: PredictionType = "v_prediction"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    axes: tuple[int, ...] = AXES
    passes_generator = True
    flow_scheduler = False
    text_length = STOCK_TEXT_LENGTH
    preset = COGVIDEOX

    def __init__(self, pipe: Any, size: Size | Sequence[int] | None = None, name: str = "", source: str = "") -> None:
        super().__init__(pipe, size, name, source)
        self.path = noise_path(pipe.scheduler)

    def check_pipeline(self, pipe: Any) -> None:
        check_pipeline(pipe)

    def native_size(self) -> Size:
        """480 x 720 and 49 frames for the published models of version 1.0; 768 x 1360 and 81 for 1.5, whose configuration holds the largest grid instead."""
        config, spatial = self.pipe.transformer.config, self.pipe.vae_scale_factor_spatial
        if config.patch_size_t is not None:
            return Size(768, 1360, 81)
        return Size(config.sample_height * spatial, config.sample_width * spatial, config.sample_frames)

    def fit_size(self, size: Size) -> tuple[int, ...]:
        spatial, temporal, config = self.pipe.vae_scale_factor_spatial, self.pipe.vae_scale_factor_temporal, self.pipe.transformer.config
        unit = spatial * config.patch_size
        # an even number of latent frames decodes to 4 more frames than went in: the VAE works on pairs of them after the first
        if size.height % unit or size.width % unit or (size.frames - 1) % (2 * temporal):
            raise ValueError(
                f"size: {size.height} x {size.width}, {size.frames} frames does not fit this model; height and width are multiples of "
                f"{unit}, frames are {2 * temporal} k + 1"
            )
        if config.use_learned_positional_embeddings and size != self.native_size():
            raise ValueError(f"size: {size} is not allowed; this model's positions are learned for {self.native_size()} alone")
        frames = (size.frames - 1) // temporal + 1
        return (config.in_channels, frames + self._padding(frames), size.height // spatial, size.width // spatial)

    def _padding(self, frames: int) -> int:
        """Latent frames that are put before a video's own, which version 1.5 fills its patches over time with; they are not decoded."""
        return -frames % (self.pipe.transformer.config.patch_size_t or 1)

    def smallest(self) -> Size:
        if self.pipe.transformer.config.use_learned_positional_embeddings:
            return self.native_size()
        side = 2 * self.pipe.vae_scale_factor_spatial * self.pipe.transformer.config.patch_size
        return Size(side, side, 2 * self.pipe.vae_scale_factor_temporal + 1)

    def encode_text(self, text: str) -> Encoded:
        """`text` [226, D], with the padding."""
        rows, _ = self.pipe.encode_prompt([text], do_classifier_free_guidance=False, max_sequence_length=self.text_length, device=self.text_device)
        return {"text": rows[0]}

    def blank(self, n: int) -> tuple[CogVideoXCondition, CogVideoXCondition]:
        texts = CogVideoXCondition(text=torch.zeros(n, STOCK_TEXT_LENGTH, self.pipe.transformer.config.text_embed_dim, device=self.device))
        return texts, texts

    def condition_of(self, encoded: Sequence[Encoded]) -> CogVideoXCondition:
        return CogVideoXCondition(text=to_device(torch.stack([one["text"] for one in encoded]).float(), self.device))

    def decode_rows(self, x: Tensor) -> Tensor:
        # AutoencoderKLCogVideoX does not clamp; the pipeline does so afterwards
        z = x[:, :, self._padding((self.size.frames - 1) // self.pipe.vae_scale_factor_temporal + 1) :] / self.pipe.vae.config.scaling_factor
        return self.pipe.vae.decode(z.to(self.vae_dtype)).sample.to(x.dtype) / 2 + 0.5

    def encode_rows(self, media: Tensor) -> Tensor:
        """Media [B, 3, F, H, W] in [0, 1] to latents [B, C, f, h, w]: the posterior's mean. Padding repeats the first latent frame, as CogVideoX 1.5 was
        trained.
        """
        z = self.pipe.vae.encode((media * 2 - 1).to(self.vae_dtype)).latent_dist.mode()
        z = torch.cat([z[:, :, :1].expand(-1, -1, self._padding(z.shape[2]), -1, -1), z], 2)
        return z.to(media.dtype) * self.pipe.vae.config.scaling_factor

    def forward(self, module: Any, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert isinstance(cond, CogVideoXCondition) and isinstance(self.path, VariancePreserving)
        return call(self.pipe, self.path, module, x_t, t, cond.text)

    def time_embedders(self, module: Any) -> Sequence[nn.Module]:
        return [module.time_embedding]

    def time_width(self, module: Any) -> int:
        return module.config.time_embed_dim

    def feature_block(self, module: Any) -> nn.Module:
        """At two thirds of the depth, as for Wan. A block returns video and text tokens; an identity beside it is shown the video's."""
        blocks = module.transformer_blocks
        block = blocks[(2 * len(blocks) - 1) // 3]
        return shown_tokens(block, _show_tokens)

    def feature_width(self, module: Any) -> int:
        return module.config.num_attention_heads * module.config.attention_head_dim

    def skip(self, module: Any, blocks: Sequence[int]) -> AbstractContextManager[None]:
        return skipped(module.transformer_blocks, blocks, _pass_on)
