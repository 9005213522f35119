"""HPSv3 (Ma et al. 2025): Qwen2-VL-7B with a head of mean and spread, trained on people's choices between images; the mean is the score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from instep.rewards.image_text import check_prompts
from instep.rewards.located import Needed
from instep.rewards.prepare import as_videos, frames_of
from instep.rewards.qwen_scorer import FILES, QwenReader, load_reader

HPSV3 = Needed(
    "hpsv3",
    "MizzenAI/HPSv3",
    FILES,
    "hf download MizzenAI/HPSv3 HPSv3.safetensors --local-dir . && "
    "hf download Qwen/Qwen2-VL-7B-Instruct --include '*.json' '*.txt' --exclude '*.index.json' --local-dir models/qwen2-vl-7b && "
    "curl -O https://raw.githubusercontent.com/MizzenAI/HPSv3/main/hpsv3/dataset/data_collator_qwen.py && "
    "instep rewards convert HPSv3.safetensors --base models/qwen2-vl-7b --instruction data_collator_qwen.py --to models/hpsv3",
    cached=False,
)


@dataclass(frozen=True)
class HPSv3:
    """The mean of the score, about 0 to 15; of a video the mean over its frames, each an image."""

    reader: QwenReader
    differentiable = True
    space: ClassVar[Literal["pixel", "latent"]] = "pixel"

    @property
    def name(self) -> str:
        return f"hpsv3 {self.reader.fingerprint}"

    def score(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] of images [B, 3, H, W] or videos [B, 3, F, H, W] in [0, 1]."""
        check_prompts("hpsv3", prompts)
        frames = as_videos(media).shape[2]
        each = self.reader.score(frames_of(media)[:, :, None], [prompt for prompt in prompts for _ in range(frames)], "image")
        return each[:, 0, 0].unflatten(0, (-1, frames)).mean(1)


def hpsv3(folder: Path | None = None, dtype: str = "bfloat16") -> HPSv3:
    """A converted HPSv3."""
    return HPSv3(load_reader(HPSV3, folder, dtype)[0])
