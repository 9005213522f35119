"""DiT class-conditional images through diffusers' `DiTPipeline`: a transformer that predicts noise in the latents of a VAE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.data.prompt import Prompt, as_prompts
from instep.diffusion.path import VariancePreserving
from instep.models.class_conditional import ClassConditional, without_dropout
from instep.models.preset import Preset

# DiTPipeline's label for no class, whatever the network
NO_CLASS = 1000

DIT = Preset(
    source="DiT (Peebles and Xie 2023, arXiv 2212.09748): class-conditional ImageNet at 256 x 256, 250 steps, guidance 1.5",
    guidance=1.5,
    sampler_steps=250,
    micro_batch=64,
)


@contextmanager
def _latents_kept(vae: Any) -> Iterator[list[Tensor]]:
    """A list of what the VAE is given to decode meanwhile, which it does not decode."""
    given: list[Tensor] = []

    def keep(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(z)
        return SimpleNamespace(sample=z)

    vae.decode = keep
    try:
        yield given
    finally:
        del vae.decode


class LatentDiTFamily(ClassConditional):
    """A `DiTPipeline` seen as a family; latents [B, C, h, w] are scaled as the transformer sees them, and of learned variances nothing is read.

    Its levels are the training steps of the pipeline's own scheduler, t = k / N for step k - 1. The pipeline's unconditional label is 1000 and it takes no
    negative class.
    """

    pipeline_class = "DiTPipeline"
    prediction_type = "eps"
    flow_scheduler = False
    takes_negative_prompt = False
    preset = DIT

    def __init__(self, pipe: Any, size: Size | Sequence[int] | None = None, name: str = "", source: str = "") -> None:
        self.classes = pipe.transformer.config.num_embeds_ada_norm
        self._names: Mapping[str, int] = dict(pipe.labels)
        self._rows = {str(i): i for i in range(self.classes)} | {word.lower(): i for word, i in self._names.items()}
        super().__init__(pipe, size, name, source)
        self.path = VariancePreserving(alpha_bars=tuple(pipe.scheduler.alphas_cumprod.double().tolist()))
        without_dropout(self._network)

    def check_pipeline(self, pipe: Any) -> None:
        """Raises ValueError for a network of another number of classes than the pipeline's, and for a scheduler that is no table of noise levels."""
        config, scheduler = pipe.transformer.config, pipe.scheduler
        if config.num_embeds_ada_norm != NO_CLASS:
            raise ValueError(
                f"transformer: num_embeds_ada_norm {config.num_embeds_ada_norm} is not allowed; DiTPipeline guides away from label {NO_CLASS}, so that the "
                f"network has {NO_CLASS} classes"
            )
        if config.out_channels not in (None, config.in_channels, 2 * config.in_channels):
            raise ValueError(f"transformer: {config.in_channels} channels in, {config.out_channels} out is not allowed; DiT has as many, or twice as many")
        kind = scheduler.config.get("prediction_type")
        if getattr(scheduler, "alphas_cumprod", None) is None or kind != "epsilon":
            raise ValueError(
                f"scheduler: a {type(scheduler).__name__} with prediction_type {kind!r} is not allowed; DiT's has a table of betas and predicts epsilon: copy "
                "the scheduler folder of facebook/DiT-XL-2-256"
            )

    def native_size(self) -> Size:
        """The one size that the network draws, 256 x 256 or 512 x 512 for the published models."""
        side = self.pipe.transformer.config.sample_size * 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
        return Size(side, side, 1)

    def fit_size(self, size: Size) -> tuple[int, ...]:
        own, config = self.native_size(), self.pipe.transformer.config
        if size != own:
            raise ValueError(f"size: {size} is not allowed; {self.name} draws {own.height} x {own.width} images; leave the size out")
        return (config.in_channels, config.sample_size, config.sample_size)

    def timestep(self, t: Tensor) -> Tensor:
        assert isinstance(self.path, VariancePreserving)
        return self.path.training_step(t)

    def decode_rows(self, x: Tensor) -> Tensor:
        return self.pipe.vae.decode((x / self.pipe.vae.config.scaling_factor).to(self.vae_dtype)).sample.to(x.dtype) / 2 + 0.5

    def encode_rows(self, media: Tensor) -> Tensor:
        """Media [B, 3, H, W] in [0, 1] to latents [B, C, h, w]: the posterior's mean."""
        z = self.pipe.vae.encode((media * 2 - 1).to(self.vae_dtype)).latent_dist.mode()
        return z.to(media.dtype) * self.pipe.vae.config.scaling_factor

    def pipeline(self, parts: Mapping[str, nn.Module], **others: Any) -> Any:
        """The names of classes are part of its configuration."""
        made = super().pipeline(parts, **others)
        made.labels = dict(self._names)
        words: dict[str, list[str]] = {}
        for word, i in self._names.items():
            words.setdefault(str(i), []).append(word)
        made.register_to_config(id2label={i: ", ".join(found) for i, found in words.items()} or None)
        return made

    @torch.no_grad()
    def stock_sample(
        self, pipe: Any, prompts: Sequence[Prompt], *, steps: int, guidance: float, output: Literal["media", "latent"], guidance_2: float | None = None
    ) -> Tensor:
        """The pipeline returns no latents: they are those that it gives the VAE."""
        labels = self.labels([prompt.text for prompt in as_prompts(prompts)]).tolist()
        options = {**self.guidance_arguments(guidance), "num_inference_steps": steps, "output_type": "pt"}
        if output == "media":
            return pipe(labels, **options).images
        with _latents_kept(pipe.vae) as given:
            pipe(labels, **options)
        return given[0] * pipe.vae.config.scaling_factor
