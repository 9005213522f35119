"""The gradient of a differentiable reward as a force (ReFL, Xu et al. 2023; DMDR Eq. 3; AMD Eq. 28)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instep.core.ranks import ALONE, Ranks
from instep.diffusion.transfer import constants
from instep.methods.term import Force, Need, View

# latent elements whose reward's graph (decoder and reward model) is alive at a time; always at least one row
CHUNK = 2**18


@dataclass(frozen=True, kw_only=True)
class RewardGradient(Force):
    """Gradient with respect to x of -mean R(x), R through the decoder, on the supervised forward's own x0.

    The reward's graph lives only inside this call, a few rows at a time, and is gone before the student's backward begins. With several rewards,
    each gradient is scaled to the mean norm of all of them before weighting, so that none dominates by its scale.
    """

    name: str = "reward"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"gradient"})

    def __call__(self, view: View) -> Tensor:
        samples = view.samples
        x = samples.point(self.on).x.detach()
        assert view.reward_grad_fn is not None, "the gradient of a reward needs a differentiable reward"
        prompts = [prompt for prompt in view.batch.prompts for _ in range(samples.group)]
        parts, each = [], max(1, CHUNK // x[0].numel())
        for start in range(0, len(x), each):
            rows = slice(start, start + each)
            with torch.enable_grad():
                here = x[rows].clone().requires_grad_()
                scores = view.reward_grad_fn(here, prompts[rows])
                losses = [-column.sum() / len(x) for column in (scores.unbind(1) if scores.ndim > 1 else [scores])]
                parts.append(torch.stack([torch.autograd.grad(loss, here, retain_graph=loss is not losses[-1])[0] for loss in losses]))
        return balanced(torch.cat(parts, 1), view.weights, view.ranks)


def balanced(gradients: Tensor, weights: Sequence[float], ranks: Ranks = ALONE) -> Tensor:
    """Weighted sum over the first axis of gradients [R, B, ...], each scaled to the mean of their mean per-sample norms on all ranks; a single one is only
    weighted."""
    if len(gradients) == 1:
        return weights[0] * gradients[0]
    norms = ranks.mean(gradients.flatten(2).norm(dim=2).mean(1))
    usual = norms.sum() / (norms > 0).sum().clamp(min=1)  # a reward without a gradient here does not shrink the others
    scale = constants(weights, gradients) * torch.where(norms > 0, usual / norms.clamp(min=1e-12), torch.zeros_like(norms))
    return torch.einsum("r,r...->...", scale, gradients)
