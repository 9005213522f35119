"""The discriminator head on a role's features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    pass


class Head(nn.Module):
    """How real a noised sample looks, from the tokens [B, N, width] of its role's features: a logit [B], in float32.

    DMD2 (Sec. 4.3) reads the fake score's features in the same way. The tokens are scored before they are averaged: a flaw in a few of
    them would be lost in the mean token. The last layer starts at zero, so the first logits are 0.
    """

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        # without a scale of its own: the layer after it has one
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.hidden = nn.Linear(width, hidden, dtype=torch.float32)
        self.logit = nn.Linear(hidden, 1, dtype=torch.float32)
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logit(nn.functional.silu(self.hidden(self.norm(tokens.float()))).mean(1)).squeeze(1)
