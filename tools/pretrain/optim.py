"""Muon for weights of any rank, AdamW for the rest, one learning-rate schedule for both, and a moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, by Muon's quintic Newton-Schulz iteration; g [N, rows, columns], in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.shape[1] <= g.shape[2]
    x = g if wide else g.mT
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024); convolution kernels [out, in, ...] count as matrices [out, in * ...].

    torch.optim.Muon takes matrices only. The step is scaled by sqrt(max(1, rows / columns)); equal shapes go through in one batch.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.01, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
            for (rows, columns), params in shapes.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum"] for p in params]
                grads = [p.grad for p in params]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, grads)
                nesterov = torch.stack([(g + group["momentum"] * m).flatten(1) for g, m in zip(grads, buffers, strict=True)])
                scale = max(1.0, rows / columns) ** 0.5
                for p, update in zip(params, orthogonalise(nesterov), strict=True):
                    p.add_(update.view_as(p), alpha=-group["lr"] * scale)


class Optimisers:
    """Muon on `matrices`, AdamW on `others`; learning rates warm up, stay, then fall linearly to 0 at the last step."""

    def __init__(
        self, matrices: list[nn.Parameter], others: list[nn.Parameter], steps: int, muon_lr: float, adam_lr: float, warmup: int = 50, decay_from: float = 0.3
    ) -> None:
        self.parts = [Muon(matrices, muon_lr), torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
        self.rates, self.steps, self.warmup, self.decay_from = (muon_lr, adam_lr), steps, warmup, decay_from

    def scale(self, step: int) -> float:
        """Factor on both learning rates at `step`."""
        rest = (1 - step / self.steps) / (1 - self.decay_from)
        return min((step + 1) / self.warmup, rest, 1.0)

    def step(self, i: int) -> None:
        """One update at step i, and gradients cleared."""
        for optimiser, rate in zip(self.parts, self.rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * self.scale(i)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)


class Average:
    """Exponential moving average of a module's weights; its memory grows with the steps so that early weights are forgotten."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        assert all(v.is_floating_point() for v in module.state_dict().values())
        self.weights = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        keep = min(self.decay, (1 + step) / (10 + step))
        values = module.state_dict()
        torch._foreach_lerp_([self.weights[name] for name in values], list(values.values()), 1 - keep)


def finite(loss: Tensor, stage: str, step: int) -> float:
    """The loss as a number; ValueError if training has diverged."""
    value = loss.item()
    if not math.isfinite(value):
        raise ValueError(f"{stage}: the loss is {value} at step {step}; start again with another seed or a lower learning rate")
    return value
