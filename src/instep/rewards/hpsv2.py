"""HPSv2.1 (Wu et al. 2023): a CLIP ViT-H/14 fine-tuned on people's choices between images of one prompt; cos, about 0.2 to 0.35."""

from __future__ import annotations

from pathlib import Path

from instep.rewards.image_text import ImageTextReward, load_image_text
from instep.rewards.located import Needed, locate
from instep.rewards.prepare import Preparation

HPSV2 = Needed(
    "hpsv2",
    "xswu/HPSv2",
    ("config.json", "*.safetensors", "*processor_config.json"),
    "hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir . && "
    "hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K --include '*.json' '*.txt' --local-dir models/clip-vit-h-14 && "
    "instep rewards convert HPS_v2.1_compressed.pt --base models/clip-vit-h-14 --to models/hpsv2",
    cached=False,
)


def hpsv2(folder: Path | None = None) -> ImageTextReward:
    """Images as the authors' code takes them: the longer side is resized, and black bars fill the square."""
    model = load_image_text(locate(HPSV2, folder), "hpsv2")
    return ImageTextReward(model.prepared(Preparation(None, None, longest=model.image_size)), "hpsv2")
