"""The head of LAION's aesthetic predictor and of ImageReward: five linear layers without a nonlinearity between them; dropout belongs to training alone."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from torch import Tensor, nn

# place of each linear layer among the published layers, dropout included, and its outputs
LAYERS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}


class ScoreHead(nn.Module):
    """Features [B, D] to scores [B]. The names of its weights are the published ones: layers.0.weight, layers.2.weight ..."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width, *LAYERS.values()]
        self.layers = nn.Sequential(*(nn.Identity() for _ in range(max(LAYERS) + 1)))
        for place, inside, outside in zip(LAYERS, widths, widths[1:], strict=False):
            self.layers[place] = nn.Linear(inside, outside)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).squeeze(1)

    @classmethod
    def load(cls, file: Path, what: str) -> Self:
        """The head of a safetensors file, frozen. Raises ValueError, which begins with `what`, for other weights."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights = load_file(file)
            head = cls(weights["layers.0.weight"].shape[1])
            head.load_state_dict({name: value.float() for name, value in weights.items()})
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{what}: {file} does not hold the weights of its head ({type(error).__name__}: {reason}); convert them again") from error
        return head.eval().requires_grad_(False)
