"""Texts of unequal length as a condition: what families share whose text encoders do not pad."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from instep.diffusion.prediction import Condition
from instep.diffusion.transfer import to_device


@dataclass(frozen=True, kw_only=True)
class RaggedText(Condition):
    """Text embeddings [B, L, D], of which the first `length` [B] are there."""

    text: Tensor
    length: Tensor

    @classmethod
    def of(cls, texts: Sequence[Tensor], device: torch.device) -> Self:
        """Of one text a row, each [L_i, D], padded with zeros."""
        padded = nn.utils.rnn.pad_sequence([text.float() for text in texts], batch_first=True)
        return cls(text=to_device(padded, device), length=to_device(torch.tensor([len(text) for text in texts]), device))

    @classmethod
    def blank(cls, n: int, length: int, width: int, device: torch.device) -> Self:
        """Zeros of n texts of this length, for planning."""
        return cls(text=torch.zeros(n, length, width, device=device), length=torch.full((n,), length, device=device))

    def present(self) -> Tensor:
        """Which of the tokens are there, [B, L]."""
        return torch.arange(self.text.shape[1], device=self.text.device) < self.length[:, None]

    def tokens(self) -> tuple[Tensor, Tensor]:
        return self.text, self.present()

    def _join(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Batches of unequal text length are padded to the longer one."""
        if name == "text":
            longest = max(a.shape[1], b.shape[1])
            a, b = (nn.functional.pad(v, (0, 0, 0, longest - v.shape[1])) for v in (a, b))
        return torch.cat([a, b])
