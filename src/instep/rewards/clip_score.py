"""CLIP score: how well an image fits its prompt, 100 cos of their embeddings (Hessel et al. 2021, whose scale is 2.5 max(cos, 0)).

It is not clipped at 0, where a reward would have no gradient. DFN-CLIP (Fang et al. 2023) is a CLIP trained on filtered data; DMDR climbs it.
"""

from __future__ import annotations

from pathlib import Path

from instep.rewards.image_text import ImageTextReward, load_image_text
from instep.rewards.located import Needed, locate
from instep.rewards.prepare import Preparation

CLIP = Needed(
    "clipscore",
    "openai/clip-vit-large-patch14",
    ("config.json", "*.safetensors", "*processor_config.json"),
    "hf download openai/clip-vit-large-patch14 --include '*.json' '*.txt' model.safetensors",
)
DFN_CLIP = Needed(
    "dfn-clip",
    "apple/DFN5B-CLIP-ViT-H-14-378",
    ("config.json", "*.safetensors", "*processor_config.json"),
    "hf download apple/DFN5B-CLIP-ViT-H-14-378 --include '*.json' '*.txt' pytorch_model.bin --local-dir models/dfn-clip && "
    "instep rewards convert models/dfn-clip/pytorch_model.bin --to models/dfn-clip",
    cached=False,
)


def clip_score(folder: Path | None = None) -> ImageTextReward:
    """100 cos of a CLIP or SigLIP, images as its processor takes them."""
    return ImageTextReward(load_image_text(locate(CLIP, folder), "clipscore"), "clipscore", scale=100.0)


def dfn_clip(folder: Path | None = None) -> ImageTextReward:
    """100 cos of DFN-CLIP. Images are squashed to its square, as its authors evaluate it, and not cropped."""
    model = load_image_text(locate(DFN_CLIP, folder), "dfn-clip")
    return ImageTextReward(model.prepared(Preparation((model.image_size, model.image_size), None)), "dfn-clip", scale=100.0)
