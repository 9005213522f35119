"""LAION's aesthetic predictor (improved-aesthetic-predictor, sac+logos+ava1-l14): a head on CLIP ViT-L/14, trained on people's marks from 1 to 10.

It does not read the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from instep.core.fingerprint import weights_fingerprint
from instep.rewards.clip_score import CLIP
from instep.rewards.image_text import ImageText, load_image_text
from instep.rewards.located import Needed, locate
from instep.rewards.score_head import ScoreHead

AESTHETIC = Needed(
    "aesthetic",
    "github.com/christophschuhmann/improved-aesthetic-predictor",
    ("head.safetensors",),
    "download sac+logos+ava1-l14-linearMSE.pth from that page, then: instep rewards convert sac+logos+ava1-l14-linearMSE.pth --to models/aesthetic",
    cached=False,
)


@dataclass(frozen=True)
class Aesthetic:
    """The head's mark of the image's embedding (of length one), about 1 to 10; the mean over the frames of a video."""

    model: ImageText
    head: ScoreHead
    weights: str
    differentiable = True
    space: ClassVar[Literal["pixel", "latent"]] = "pixel"

    @property
    def name(self) -> str:
        return f"aesthetic {self.model.fingerprint} {self.weights}"

    def score(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] of images [B, 3, H, W] or videos [B, 3, F, H, W] in [0, 1]."""
        images = self.model.of_videos(media)
        return self.head.to(images.device)(images.flatten(0, 1)).unflatten(0, images.shape[:2]).mean(1)


def aesthetic(folder: Path | None = None, base: Path | None = None) -> Aesthetic:
    """`folder` holds the converted head, `base` the CLIP that it reads, by default the one of `clipscore`."""
    head = ScoreHead.load(locate(AESTHETIC, folder) / "head.safetensors", "aesthetic")
    model = load_image_text(locate(CLIP, base, "base"), "aesthetic")
    reads = head.layers[0].in_features
    if model.width != reads:
        raise ValueError(f"aesthetic: its head reads {reads} features and the CLIP gives {model.width}; give the ViT-L/14 of OpenAI (base=FOLDER)")
    return Aesthetic(model, head, weights_fingerprint(head))
