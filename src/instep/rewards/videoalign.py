"""VideoAlign's VideoReward (Liu et al. 2025): Qwen2-VL-2B that scores visual quality, motion quality and text alignment of a video at three special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from instep.diffusion.transfer import constants
from instep.rewards.image_text import check_prompts
from instep.rewards.located import Needed
from instep.rewards.prepare import as_videos
from instep.rewards.qwen_scorer import FILES, QwenReader, load_reader
from instep.rewards.samples import evenly_spaced

PARTS = ("vq", "mq", "ta")
LEAST_FRAMES = 4  # of a longer video; the authors' reader takes no fewer
VIDEOALIGN = Needed(
    "videoalign",
    "KwaiVGI/VideoReward",
    FILES,
    "hf download KwaiVGI/VideoReward --local-dir videoreward && "
    "hf download Qwen/Qwen2-VL-2B-Instruct --include '*.json' '*.txt' --exclude '*.index.json' --local-dir models/qwen2-vl-2b && "
    "curl -O https://raw.githubusercontent.com/KwaiVGI/VideoAlign/main/prompt_template.py && "
    "instep rewards convert videoreward/checkpoint-11352/model.pth --base models/qwen2-vl-2b --instruction prompt_template.py --to models/videoalign",
    cached=False,
)


@dataclass(frozen=True)
class VideoAlign:
    """One of the three scores, less its published mean and over its deviation; without `part` their sum, the authors' overall score.

    `fps`: frames a second of the videos that are scored; of them `sampled` a second are seen, evenly spaced and an even number of them.
    """

    reader: QwenReader
    means: tuple[float, ...]
    deviations: tuple[float, ...]
    part: str | None = None
    fps: float = 16.0
    sampled: float = 2.0
    differentiable = True
    space: ClassVar[Literal["pixel", "latent"]] = "pixel"

    @property
    def name(self) -> str:
        return f"videoalign{f':{self.part}' if self.part else ''} {self.reader.fingerprint}, {self.fps:g} fps"

    def score(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] of videos [B, 3, F, H, W] in [0, 1]; an image is a video of one frame."""
        check_prompts("videoalign", prompts)
        videos = as_videos(media)
        each = self.reader.score(videos[:, :, self.seen(videos.shape[2])], prompts, "video")[:, :, 0]
        normal = (each - constants(self.means, each)) / constants(self.deviations, each)
        return normal.sum(1) if self.part is None else normal[:, PARTS.index(self.part)]

    def seen(self, frames: int) -> list[int]:
        """The frames that are seen of so many."""
        wanted = max(LEAST_FRAMES, int(frames / self.fps * self.sampled))
        count = min(wanted, frames) // 2 * 2
        return evenly_spaced(frames, max(1, count))


def videoalign(part: str | None = None, folder: Path | None = None, dtype: str = "bfloat16", fps: float = 16.0) -> VideoAlign:
    """A converted VideoReward; `part` is vq, mq or ta."""
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps: {fps} is not allowed; the frames a second of the videos, above 0")
    reader, about = load_reader(VIDEOALIGN, folder, dtype)
    means, deviations = (tuple(float(about["normal"][part][i]) for part in PARTS) for i in (0, 1))
    return VideoAlign(reader, means, deviations, part, fps, float(about["fps"]))
