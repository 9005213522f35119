"""Attention spelled out for fast training on a CPU: over 27 tokens, plain matrix products beat the fused kernel's backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class TextBias:
    """The additive bias [B, L] of the text tokens of the batch in hand."""

    value: Tensor


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Wan's rotary embedding of x [B, L, H, D]; pairs are neighbours."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(3)


class TrainingAttention:
    """A processor for `WanAttention`, equal to the stock one; in cross-attention it adds `bias` to the logits."""

    def __init__(self, bias: TextBias) -> None:
        self.bias = bias

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        query, key = attn.norm_q(query.float()), attn.norm_k(key.float())
        query, key, value = (v.unflatten(2, (attn.heads, -1)) for v in (query, key, value))
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        query, key, value = (v.transpose(1, 2) for v in (query, key, value))
        logits = (query * query.shape[-1] ** -0.5) @ key.mT
        if encoder_hidden_states is not None:
            logits = logits + self.bias.value[:, None, None]
        out = logits.float().softmax(-1).to(value.dtype) @ value
        return attn.to_out[0](out.transpose(1, 2).flatten(2))
