"""What families of class-conditional image transformers share: diffusers' `DiTTransformer2DModel`, told a class and a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.data.prompt import Prompt, negatives_of, texts_of
from instep.diffusion.prediction import Condition
from instep.diffusion.transfer import to_device
from instep.models.family import Task, skipped
from instep.models.pipeline_family import PipelineFamily


@dataclass(frozen=True, kw_only=True)
class ClassCondition(Condition):
    """Class labels [B]; the number of classes itself is the unconditional one, the extra row of DiT's embedding table."""

    label: Tensor


def without_dropout(network: Any) -> None:
    """Labels are dropped in the teacher's own training and nowhere else, whatever mode a module is put in."""
    for block in network.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0


class ClassConditional(PipelineFamily):
    """A class-conditional transformer seen as a family. Prompts are class names: the number ("7"), or a name.

    A family sets `classes`, their number, which as a label stands for no class, and `_rows`, the class of each number and name.
    """

    task: Task = "class-to-image"
    axes: tuple[int, ...] = (0, 1, 2, 3)
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    classes: int
    _rows: Mapping[str, int]

    def fit_size(self, size: Size) -> tuple[int, ...]:
        if size != self.size:
            raise ValueError(f"size: {size} is not allowed; {self.name} draws {self.size.height} x {self.size.width} images; leave the size out")
        return self.latent_shape

    def smallest(self) -> Size:
        return self.size

    def labels(self, prompts: Sequence[str]) -> Tensor:
        """Class of each prompt, [B] on the host, that of the empty text the one that stands for none; ValueError for one that is no class."""
        unknown = [p for p in prompts if p.strip() and p.strip().lower() not in self._rows]
        if unknown:
            raise ValueError(
                f"prompts: {unknown[0]!r} is no class of {self.name}; allowed: {', '.join([*self._rows][:20])}{', ...' if len(self._rows) > 20 else ''}"
            )
        return torch.tensor([self._rows[p.strip().lower()] if p.strip() else self.classes for p in prompts])

    def encode(self, prompts: Sequence[Prompt | str]) -> ClassCondition:
        return ClassCondition(label=to_device(self.labels(texts_of(prompts)), self.device))

    def unconditional(self, prompts: Sequence[Prompt | str]) -> ClassCondition:
        """The class that a negative prompt names; the class that stands for none where there is no negative prompt."""
        return ClassCondition(label=to_device(self.labels(negatives_of(prompts)), self.device))

    def blank(self, n: int) -> tuple[ClassCondition, ClassCondition]:
        labels = ClassCondition(label=torch.zeros(n, dtype=torch.long, device=self.device))
        return labels, labels

    def forward(self, module: Any, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert isinstance(cond, ClassCondition)
        # of a network that has learned variances they are the second half
        raw = module(x_t, timestep=to_device(self.timestep(t), x_t.device), class_labels=cond.label, return_dict=False)[0]
        return raw[:, : x_t.shape[1]]

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is told of levels t [B] in [0, 1]."""
        return t.float() * 1000

    def time_embedders(self, module: Any) -> Sequence[nn.Module]:
        """One a block: DiT embeds the time anew in each of them (and once more by the first block's for the output layer)."""
        return [block.norm1.emb.timestep_embedder for block in module.transformer_blocks]

    def called_apart(self, module: Any) -> Sequence[nn.Module]:
        """The first block's embedding of time and class, which the output layer is told too."""
        return [module.transformer_blocks[0].norm1.emb]

    def time_width(self, module: Any) -> int:
        return module.config.num_attention_heads * module.config.attention_head_dim

    def feature_block(self, module: Any) -> nn.Module:
        """At two thirds of the depth, as for Wan."""
        return module.transformer_blocks[(2 * len(module.transformer_blocks) - 1) // 3]

    def feature_width(self, module: Any) -> int:
        return self.time_width(module)

    def skip(self, module: Any, blocks: Sequence[int]) -> AbstractContextManager[None]:
        return skipped(module.transformer_blocks, blocks)
