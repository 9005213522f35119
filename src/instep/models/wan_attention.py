"""Wan's attention: the values of diffusers' own processor, for less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor


class PaddedTextProcessor(WanAttnProcessor):
    """Cross-attention over a short text that equals attention over the text padded to the stock length.

    Stock padding repeats one and the same key r times; one such key with log r added to its logit weighs the same. `bias` gives the additive bias [B, L] of the
    running call; None: nothing is padded.
    """

    def __init__(self, bias: Callable[[], Tensor | None]) -> None:
        super().__init__()
        self.bias = bias
        # the backends that a run may choose take no additive mask
        self._attention_backend = AttentionBackendName.NATIVE

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        bias = self.bias()
        if bias is not None:
            attention_mask = bias[:, None, None].to(hidden_states.dtype)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


class RotaryProcessor(WanAttnProcessor):
    """Self-attention in which, on the CPU, each pair of channels is turned as one complex number: the same values and gradients, bit for bit in float32.

    The stock processor goes through every second channel, eight times forward and more often backward, which CPUs do slowly. Elsewhere, and in a compiled
    block, where the compiler joins these passes, it is left to do so.
    """

    def __init__(self, stock: WanAttnProcessor) -> None:
        super().__init__()
        self._attention_backend, self._parallel_config = stock._attention_backend, stock._parallel_config

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        joined = attn.fused_projections or torch.compiler.is_compiling()
        # complex numbers have parts in float32 or float64: a network that is cast as a whole has others
        narrow = rotary_emb is not None and rotary_emb[0].dtype not in (torch.float32, torch.float64)
        if joined or narrow or hidden_states.device.type != "cpu" or encoder_hidden_states is not None or rotary_emb is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        cos, sin = rotary_emb
        turn = torch.complex(cos[..., 0::2], sin[..., 1::2])
        query = _turned(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)), turn)
        key = _turned(attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1)), turn)
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        found = dispatch_attention_fn(query, key, value, attn_mask=attention_mask, backend=self._attention_backend, parallel_config=self._parallel_config)
        out, dropout = attn.to_out
        return dropout(out(found.flatten(2, 3).type_as(query)))


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """x [B, N, heads, D] with its pairs of channels multiplied by the complex numbers `turn` [1, N, 1, D / 2]."""
    wide = x.to(torch.promote_types(x.dtype, turn.real.dtype))
    return torch.view_as_real(torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * turn).flatten(-2).type_as(x)
