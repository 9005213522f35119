"""PickScore (Kirstain et al. 2023): a CLIP ViT-H/14 fine-tuned on the choices of Pick-a-Pic's users; exp(logit scale) * cos, about 15 to 25."""

from __future__ import annotations

from pathlib import Path

from instep.rewards.image_text import ImageTextReward, load_image_text
from instep.rewards.located import Needed, locate

PICKSCORE = Needed(
    "pickscore",
    "yuvalkirstain/PickScore_v1",
    ("config.json", "*.safetensors", "*processor_config.json"),
    "hf download yuvalkirstain/PickScore_v1 --include '*.json' '*.txt' model.safetensors",
)


def pickscore(folder: Path | None = None) -> ImageTextReward:
    """Images as its processor takes them: shorter side resized, centre crop."""
    model = load_image_text(locate(PICKSCORE, folder), "pickscore")
    return ImageTextReward(model, "pickscore", scale=float(model.network.logit_scale.exp()))
