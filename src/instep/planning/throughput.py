"""How fast a device is: measured in seconds on one block, or stated by the vendor."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from instep.planning.plan import pass_flops
from instep.planning.workload import Workload

# bf16 peak of the dense tensor cores, as the vendor states it; nobody reaches it, `stated` multiplies it by a share
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


def measure_throughput(w: Workload, device: str = "cpu", seconds: float = 2.0) -> float:
    """FLOP/s of this device on forwards of one transformer block at the workload's width, in its number format.

    Norms, modulation and GELU are in it, for they are what keeps small models from the speed of bare matrix products. A
    few samples (at most 8192 tokens, longer ones are cut) stand for the batch. The fastest run counts: a busy machine
    is slower than this.
    """
    dtype = torch.bfloat16 if w.bytes_per_parameter == 2 else torch.float32
    tokens = min(8192, w.tokens)
    batch = max(1, min(w.batch, 8192 // tokens))
    one = replace(w, tokens=tokens, text_tokens=0, layers=1, roles="copies")
    block = _Block(w.width, w.ffn).to(device=device, dtype=dtype)
    x = torch.randn(batch, tokens, w.width, device=device, dtype=dtype)

    def run() -> None:
        block(x)
        # a queue of launches says nothing about time: wait for each block
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    fastest, end = float("inf"), time.perf_counter() + seconds
    with torch.no_grad():
        run()
        while time.perf_counter() < end or fastest == float("inf"):
            start = time.perf_counter()
            run()
            fastest = min(fastest, time.perf_counter() - start)
    return batch * pass_flops(one)[0] / fastest


class _Block(nn.Module):
    """The products of a Wan block, with what lies between them; cross-attention is only its two projections."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.heads = max(1, width // 128)
        self.square = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, x: Tensor) -> Tensor:
        def norm(y: Tensor) -> Tensor:
            return nn.functional.layer_norm(y.float(), y.shape[-1:]).to(y) * 1.1 + 0.1

        y = norm(x)
        q, k, v = (self.square[i](y) for i in range(3))
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (norm(q), norm(k), v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.square[3](y) * 0.5
        x = x + self.square[5](norm(self.square[4](norm(x))))
        return x + self.down(nn.functional.gelu(self.up(norm(x)), approximate="tanh")) * 0.5


def stated(device: str, share: float = 0.4) -> float:
    """FLOP/s from the vendor's bf16 peak times `share`: an assumption to plan with, not a measurement."""
    if device not in PEAK:
        raise ValueError(f"device: {device!r} has no stated peak; allowed: {', '.join(PEAK)}; or pass a measured throughput")
    return share * PEAK[device]
