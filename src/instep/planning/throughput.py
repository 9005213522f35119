"""How fast a device is: measured in seconds on one block, or stated by the vendor."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from instep.planning.tally import Tally

# bf16 peak of the dense tensor cores, as the vendor states it; nobody reaches it, `stated` multiplies it by a share
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
# tokens of the block that is measured; longer samples are cut
MOST_TOKENS = 8192


def measure_throughput(width: int, tokens: int, rows: int, dtype: torch.dtype, device: str = "cpu", seconds: float = 2.0) -> float:
    """FLOP/s of this device on forwards of one transformer block of that width, in that number format, on `rows` samples of `tokens` tokens.

    Norms, modulation and GELU are in it, for they are what keeps small models from the speed of bare matrix products. A few samples (at most 8192 tokens) stand
    for all. The fastest run counts: a busy machine is slower than this.
    """
    tokens = max(1, min(MOST_TOKENS, tokens))
    block = _Block(width).to(device=device, dtype=dtype)
    x = torch.randn(max(1, min(rows, MOST_TOKENS // tokens)), tokens, width, device=device, dtype=dtype)

    def run() -> None:
        block(x)
        # a queue of launches says nothing about time: wait for each block
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    fastest, end = float("inf"), time.perf_counter() + seconds
    with torch.no_grad():
        with Tally() as tally:
            run()
        while time.perf_counter() < end or fastest == float("inf"):
            start = time.perf_counter()
            run()
            fastest = min(fastest, time.perf_counter() - start)
    return sum(tally.flops.values()) / fastest


class _Block(nn.Module):
    """Self-attention and a feed-forward layer of four times the width, with what lies between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # heads of 128 where they come out even
        self.heads = width // 128 if width % 128 == 0 else 1
        self.square = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        def norm(y: Tensor) -> Tensor:
            return nn.functional.layer_norm(y.float(), y.shape[-1:]).to(y) * 1.1 + 0.1

        y = norm(x)
        q, k, v = (self.square[i](y) for i in range(3))
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (norm(q), norm(k), v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.square[3](y) * 0.5
        return x + self.down(nn.functional.gelu(self.up(norm(x)), approximate="tanh")) * 0.5


def stated(device: str, share: float = 0.4) -> float:
    """FLOP/s from the vendor's bf16 peak times `share`: an assumption to plan with, not a measurement."""
    if device not in PEAK:
        raise ValueError(f"device: {device!r} has no stated peak; allowed: {', '.join(PEAK)}; or pass a measured throughput")
    return share * PEAK[device]
