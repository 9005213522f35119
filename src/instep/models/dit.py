"""Class-conditional image transformers (SiT: flow matching on the DiT architecture) through diffusers' `DiTTransformer2DModel`, in pixel space."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.data.prompt import Prompt, negatives_of, texts_of
from instep.diffusion.prediction import Condition
from instep.diffusion.transfer import to_device
from instep.models.borrow import borrowed
from instep.models.family import Task, skipped
from instep.models.pipeline_family import PipelineFamily
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


@dataclass(frozen=True, kw_only=True)
class ClassCondition(Condition):
    """Class labels [B]; the number of classes itself is the unconditional one, the extra row of DiT's embedding table."""

    label: Tensor


class DiTFamily(PipelineFamily):
    """A `DiTTransformer2DModel` that predicts the rectified flow's velocity, seen as a family (see `models/family.py`).

    Latents are pixels: x [B, C, H, W] in [-1, 1] with C = 1 (shown grey) or 3; media [B, 3, H, W] in [0, 1]. Prompts are class names: the
    number ("7"), or the name if `names` has them. There is no stock pipeline (`pipe` is None): diffusers' `DiTPipeline` decodes through a VAE
    and expects a DDPM's noise prediction, so it cannot sample this model; exports hold transformer and scheduler.
    """

    pipeline_class = ""
    task: Task = "class-to-image"
    axes: tuple[int, ...] = (0, 1, 2, 3)
    preset = SIT
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    pipe: Any = None

    def __init__(self, transformer: Any, names: Sequence[str] = (), shift: float = 1.0, name: str = "dit", source: str = "") -> None:
        """`names`: one a class, or none; `shift` is that of the model's own sampler; `source` is where it was loaded from. ValueError for a network
        of another kind: latents of a VAE, or learned variances beside the prediction.
        """
        config = transformer.config
        if config.in_channels not in (1, 3):
            raise ValueError(f"in_channels: {config.in_channels} is not allowed; this family works on pixels, 1 or 3 channels, and decodes no VAE's latents")
        if config.out_channels not in (None, config.in_channels):
            raise ValueError(
                f"out_channels: {config.out_channels} for {config.in_channels} input channels looks like learned variances; a flow predicts the velocity "
                "alone, out_channels equal to in_channels"
            )
        self.classes: int = config.num_embeds_ada_norm
        if names and len(set(names)) != self.classes:
            raise ValueError(f"names: {len(set(names))} different ones for {self.classes} classes; give one a class, or none")
        self.name, self.source, self.shift, self.names = name, source, shift, tuple(names)
        side = config.sample_size
        self.size, self.latent_shape = Size(side, side, 1), (config.in_channels, side, side)
        self._network = borrowed(transformer)
        network: Any = self._network
        for block in network.transformer_blocks:
            # labels are dropped in the teacher's own training and nowhere else, whatever mode a module is put in
            block.norm1.emb.class_embedder.dropout_prob = 0.0
        self._rows = {str(i): i for i in range(self.classes)} | {word.lower(): i for i, word in enumerate(self.names)}

    @classmethod
    def load(cls, folder: Path, size: Size | None = None, name: str = "dit", dtype: torch.dtype = torch.float32, variant: str | None = None) -> Self:
        """From a folder with `transformer/` and `scheduler/` as save_pretrained writes them (and classes.json with names, if it is there), in
        `dtype`, offline. ValueError if the scheduler is not a flow's.
        """
        from diffusers import DiTTransformer2DModel

        file = folder / "scheduler" / "scheduler_config.json"
        scheduler = json.loads(file.read_text()) if file.is_file() else {}
        if scheduler.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(
                f"model: {folder} has the scheduler {scheduler.get('_class_name')}; a DiT is taken for a flow's only with FlowMatchEulerDiscreteScheduler in "
                f"{file} (the original DiT weights are a DDPM's)"
            )
        names = json.loads((folder / CLASSES).read_text()) if (folder / CLASSES).is_file() else ()
        transformer = DiTTransformer2DModel.from_pretrained(
            folder / "transformer", torch_dtype=dtype, variant=variant, local_files_only=True, use_safetensors=True
        )
        return cls(transformer, names, cls.shift_of(scheduler), name, str(folder))

    @classmethod
    def shift_of(cls, scheduler: Mapping[str, Any]) -> float:
        return float(scheduler.get("shift", 1.0))

    def fit_size(self, size: Size) -> tuple[int, ...]:
        if size != self.size:
            raise ValueError(f"size: {size} is not allowed; {self.name} draws {self.size.height} x {self.size.width} images; leave the size out")
        return self.latent_shape

    def smallest(self) -> Size:
        return self.size

    def labels(self, prompts: Sequence[str]) -> Tensor:
        """Class of each prompt, [B] on the host; ValueError for one that is no class."""
        unknown = [p for p in prompts if p.strip().lower() not in self._rows]
        if unknown:
            raise ValueError(f"prompts: {unknown[0]!r} is no class of {self.name}; allowed: {', '.join(self._rows)}")
        return torch.tensor([self._rows[p.strip().lower()] for p in prompts])

    def encode(self, prompts: Sequence[Prompt | str]) -> ClassCondition:
        return ClassCondition(label=to_device(self.labels(texts_of(prompts)), self.device))

    def unconditional(self, prompts: Sequence[Prompt | str]) -> ClassCondition:
        """The class that a negative prompt names; the class that stands for none where there is no negative prompt."""
        negatives = negatives_of(prompts)
        label = torch.full((len(negatives),), self.classes)
        given = [i for i, negative in enumerate(negatives) if negative.strip()]
        if given:
            label[given] = self.labels([negatives[i] for i in given])
        return ClassCondition(label=to_device(label, self.device))

    def blank(self, n: int) -> tuple[ClassCondition, ClassCondition]:
        labels = ClassCondition(label=torch.zeros(n, dtype=torch.long, device=self.device))
        return labels, labels

    def decode_rows(self, x: Tensor) -> Tensor:
        media = (x + 1) / 2
        return media.expand(-1, 3, -1, -1) if media.shape[1] == 1 else media

    def encode_rows(self, media: Tensor) -> Tensor:
        """Media [B, 3, H, W] in [0, 1] to x [B, C, H, W]; of grey models the mean of the channels."""
        x = media * 2 - 1
        return x.mean(1, keepdim=True) if self.latent_shape[0] == 1 else x

    def forward(self, module: Any, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert isinstance(cond, ClassCondition)
        return module(x_t, timestep=to_device(t.float() * 1000, x_t.device), class_labels=cond.label, return_dict=False)[0]

    def time_embedders(self, module: Any) -> Sequence[nn.Module]:
        """One a block: DiT embeds the time anew in each of them (and once more by the first block's for the output layer)."""
        return [block.norm1.emb.timestep_embedder for block in module.transformer_blocks]

    def time_width(self, module: Any) -> int:
        return module.config.num_attention_heads * module.config.attention_head_dim

    def feature_block(self, module: Any) -> nn.Module:
        """At two thirds of the depth, as for Wan."""
        return module.transformer_blocks[(2 * len(module.transformer_blocks) - 1) // 3]

    def feature_width(self, module: Any) -> int:
        return self.time_width(module)

    def skip(self, module: Any, blocks: Sequence[int]) -> AbstractContextManager[None]:
        return skipped(module.transformer_blocks, blocks)

    def pipeline(self, parts: Mapping[str, nn.Module], **others: Any) -> Any:
        """Raises ValueError: there is no stock pipeline that samples this model; see the class."""
        raise ValueError(f"pipeline: diffusers has none for {self.name} (DiTPipeline wants a VAE and a DDPM's variances); export_parts writes the parts")
