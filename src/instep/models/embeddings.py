"""What a role learns beside its network: the embedding of guidance scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from instep.diffusion.guidance_scales import FREQUENCIES, GuidanceRange, GuidanceScales

FEATURES = 2 * (1 + 2 * FREQUENCIES)


class GuidanceEmbedding(nn.Module):
    """Guidance scales [B, 2] to what is added to the time embedding, [B, width]; float32. The last layer starts at zero.

    Meng et al. (2023, On Distillation of Guided Diffusion Models) tell w in the same place.
    """

    def __init__(self, guidance_range: GuidanceRange, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.guidance_range = guidance_range
        self.hidden = nn.Linear(FEATURES, hidden, dtype=torch.float32)
        self.out = nn.Linear(hidden, width, dtype=torch.float32)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, guidance_scales: Tensor) -> Tensor:
        return self.out(nn.functional.silu(self.hidden(self.guidance_range.features(guidance_scales).to(self.hidden.weight))))


@torch.no_grad()
def fold_guidance(embedders: Sequence[nn.Module], embedding: GuidanceEmbedding, guidance_scales: GuidanceScales) -> None:
    """The time embedders (`Family.time_embedders`) say untold what they said when told `guidance_scales`, added to their last layers' biases, in place."""
    added = embedding(torch.tensor([guidance_scales], device=embedding.out.bias.device))[0]
    for embedder in embedders:
        bias = last_layer(embedder).bias
        bias.add_(added.to(bias))


def last_layer(embedder: nn.Module) -> nn.Linear:
    """The linear layer that makes a time embedder's output."""
    return [layer for layer in embedder.modules() if isinstance(layer, nn.Linear)][-1]


def check_foldable(embedders: Sequence[nn.Module], name: str) -> None:
    """ValueError if guidance scales cannot be folded into the time embedders' biases, because they have none."""
    if any(last_layer(embedder).bias is None for embedder in embedders):
        raise ValueError(
            f"guidance_range: a student of {name} cannot be conditioned on guidance scales, because its time embedding has no bias that an export could fold "
            "them into; choose a recipe that distils a fixed guidance"
        )
