"""Class-conditional image transformers (SiT: flow matching on the DiT architecture) through diffusers' `DiTTransformer2DModel`, in pixels or latents."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.models.borrow import borrowed, compute_dtype
from instep.models.class_conditional import ClassConditional, without_dropout
from instep.models.index import read_json
from instep.models.preset import Distillation, Preset

CLASSES = "classes.json"


SIT = Preset(
    source="SiT (Ma et al. 2024, arXiv 2401.08740): class-conditional ImageNet at 256 x 256, guidance 1.5",
    guidance=1.5,
    sampler_steps=50,
    micro_batch=64,
    distillation=Distillation(
        source="DMDR's released code (github.com/vvvvvjdy/dmdr), train_cc/sit/scripts/cold_start_sitxl.sh: SiT-XL/2 in one step without guidance, 64 images on "
        "each of 8 devices; AMD's SiT-XL/2 has the same batch and learning rate",
        guidance=1.0,
        levels=(1.0,),
        shift=1.0,
        student_lr=2e-5,
        fake_lr=2e-5,
        betas=(0.9, 0.999),
        batch=512,
        critic_updates=5,
    ),
)


class DiTFamily(ClassConditional):
    """A `DiTTransformer2DModel` that predicts the rectified flow's velocity, seen as a family (see `models/family.py`).

    With a VAE latents are its, scaled; without one they are pixels: x [B, C, H, W] in [-1, 1] with C = 1 (shown grey) or 3. Media are [B, 3, H, W] in [0, 1].
    Prompts are class names: the number ("7"), or the name if `names` has them. There is no stock pipeline (`pipe` is None): diffusers' `DiTPipeline` expects a
    DDPM's noise prediction, and no scheduler of a flow that re-noises fits it; exports hold the parts.
    """

    pipeline_class = ""
    preset = SIT
    pipe: Any = None

    def __init__(self, transformer: Any, names: Sequence[str] = (), shift: float = 1.0, name: str = "dit", source: str = "", vae: Any = None) -> None:
        """`names`: one a class, or none; `shift` is that of the model's own sampler; `source` is where it was loaded from; `vae`: None for a model of pixels.
        Of learned variances beside the prediction in latents (SiT's) nothing is read. ValueError for a network of another kind.
        """
        config = transformer.config
        if vae is not None and config.in_channels != vae.config.latent_channels:
            raise ValueError(f"in_channels: {config.in_channels} does not fit the VAE's latents, {vae.config.latent_channels}; give the model's own VAE")
        if vae is None and config.in_channels not in (1, 3):
            raise ValueError(f"in_channels: {config.in_channels} is not allowed without a VAE; a model of pixels has 1 or 3: put the model's VAE into vae/")
        if config.out_channels not in (None, config.in_channels, *(() if vae is None else (2 * config.in_channels,))):
            raise ValueError(
                f"out_channels: {config.out_channels} for {config.in_channels} input channels looks like learned variances; a flow predicts the velocity "
                "alone, out_channels equal to in_channels"
            )
        self.classes: int = config.num_embeds_ada_norm
        if names and len(set(names)) != self.classes:
            raise ValueError(f"names: {len(set(names))} different ones for {self.classes} classes; give one a class, or none")
        self.name, self.source, self.shift, self.names = name, source, shift, tuple(names)
        side = config.sample_size
        self.vae = None if vae is None else borrowed(vae)
        pixels = side if vae is None else side * 2 ** (len(vae.config.block_out_channels) - 1)
        self.size, self.latent_shape = Size(pixels, pixels, 1), (config.in_channels, side, side)
        self._network = borrowed(transformer)
        network: Any = self._network
        without_dropout(network)
        self._rows = {str(i): i for i in range(self.classes)} | {word.lower(): i for i, word in enumerate(self.names)}

    @classmethod
    def load(cls, folder: Path, size: Size | None = None, name: str = "dit", dtype: torch.dtype = torch.float32, variant: str | None = None) -> Self:
        """From a folder with `transformer/` and `scheduler/` as save_pretrained writes them (and `vae/` and classes.json with names, if they are there), in
        `dtype` and the VAE in float32, offline. ValueError if the scheduler is not a flow's.
        """
        from diffusers import AutoencoderKL, DiTTransformer2DModel

        file = folder / "scheduler" / "scheduler_config.json"
        scheduler = read_json(file)
        if scheduler.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(
                f"model: {folder} has the scheduler {scheduler.get('_class_name')}; a DiT is taken for a flow's only with FlowMatchEulerDiscreteScheduler in "
                f"{file} (the original DiT weights are a DDPM's)"
            )
        names = json.loads((folder / CLASSES).read_text()) if (folder / CLASSES).is_file() else ()
        transformer = DiTTransformer2DModel.from_pretrained(
            folder / "transformer", torch_dtype=dtype, variant=variant, local_files_only=True, use_safetensors=True
        )
        vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True, use_safetensors=True) if (folder / "vae").is_dir() else None
        return cls(transformer, names, cls.shift_of(scheduler), name, str(folder), vae)

    @classmethod
    def shift_of(cls, scheduler: Mapping[str, Any]) -> float:
        return float(scheduler.get("shift", 1.0))

    def placed(
        self, device: torch.device | str, dtype: torch.dtype | None = None, micro_batch: int | None = None, *, offload: bool = False, decodes: bool = True
    ) -> Self:
        lender = copy.copy(self)
        lender.vae = None if self.vae is None else borrowed(self.vae)
        return super(DiTFamily, lender).placed(device, dtype, micro_batch, offload=offload, decodes=decodes)

    @property
    def vaes(self) -> list[nn.Module]:
        return [] if self.vae is None else [self.vae]

    def decode_rows(self, x: Tensor) -> Tensor:
        if self.vae is not None:
            return self.vae.decode((x / self.vae.config.scaling_factor).to(compute_dtype(self.vae))).sample.to(x.dtype) / 2 + 0.5
        media = (x + 1) / 2
        return media.expand(-1, 3, -1, -1) if media.shape[1] == 1 else media

    def encode_rows(self, media: Tensor) -> Tensor:
        """Media [B, 3, H, W] in [0, 1] to x [B, C, H, W]; of grey models the mean of the channels; in latents the posterior's mean."""
        if self.vae is not None:
            z = self.vae.encode((media * 2 - 1).to(compute_dtype(self.vae))).latent_dist.mode()
            return z.to(media.dtype) * self.vae.config.scaling_factor
        x = media * 2 - 1
        return x.mean(1, keepdim=True) if self.latent_shape[0] == 1 else x

    def pipeline(self, parts: Mapping[str, nn.Module], **others: Any) -> Any:
        """Raises ValueError: there is no stock pipeline that samples this model; see the class."""
        raise ValueError(f"pipeline: diffusers has none for {self.name} (DiTPipeline wants a VAE and a DDPM's variances); export_parts writes the parts")
