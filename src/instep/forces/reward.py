"""The gradient of a differentiable reward as a force (ReFL, Xu et al. 2023; DMDR Eq. 3; AMD Eq. 28)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from instep.terms import Force, Need, View

# latent elements whose reward's graph (decoder and reward model) is alive at a time; always at least one row
CHUNK = 2**18


@dataclass(frozen=True, kw_only=True)
class RewardGradient(Force):
    """Gradient with respect to x of -mean R(x), R through the unclamped decoder, on the supervised forward's own x0.

    The reward's graph lives only inside this call, a few rows at a time, and is gone before the student's backward begins.
    """

    name: str = "reward"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"gradient"})

    def __call__(self, view: View) -> Tensor:
        samples = view.samples
        x = samples.point(self.on).x.detach()
        assert view.reward is not None, "the gradient of a reward needs a differentiable reward"
        prompts = [prompt for prompt in view.batch.prompts for _ in range(samples.group)]
        parts, each = [], max(1, CHUNK // x[0].numel())
        for start in range(0, len(x), each):
            rows = slice(start, start + each)
            with torch.enable_grad():
                here = x[rows].clone().requires_grad_()
                loss = -view.reward(here, prompts[rows]).sum() / len(x)
                parts.append(torch.autograd.grad(loss, here)[0])
        return torch.cat(parts)
