"""The inputs of a reward learned from preferences: features of media and their prompts, from an image-text model of the user or from a classifier that the
caller provides (`FeaturesOf`).

Both embed the sample and its prompt in one space. The features are (sample, prompt, sample * prompt): with the products a linear head can weigh how well a
sample fits its prompt, direction by direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from instep.data.media import read_media
from instep.rewards.image_text import ImageText, load_image_text
from instep.rewards.prepare import as_videos
from instep.rewards.samples import evenly_spaced


class Features(Protocol):
    """Media [B, 3, (F,) H, W] in [0, 1] and their prompts to [B, width], differentiable with respect to the pixels.

    `given` and `frames` rebuild the same features (through a `FeaturesOf`); `name` contains every setting and the network's fingerprint.
    """

    @property
    def given(self) -> str: ...

    @property
    def frames(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def name(self) -> str: ...

    def read(self, path: Path) -> Tensor:
        """One media file as a batch of one."""
        ...

    def __call__(self, media: Tensor, prompts: Sequence[str]) -> Tensor: ...


# a name or folder, and frames of each video, to features; ValueError for anything but such a model
FeaturesOf = Callable[[str, int], Features]


def joined(sample: Tensor, prompt: Tensor) -> Tensor:
    """[B, D] of samples and of their prompts to [B, 3 D]: both and their product."""
    return torch.cat([sample, prompt, sample * prompt], 1)


@dataclass(frozen=True)
class ImageTextFeatures:
    """Embeddings of an image-text model, each of length one: the mean over `frames` evenly spaced frames, and the prompt's."""

    given: str
    frames: int
    model: ImageText

    @property
    def name(self) -> str:
        return f"{Path(self.given).name} {self.model.fingerprint}, {self.frames} frames"

    @property
    def width(self) -> int:
        return 3 * self.model.width

    def read(self, path: Path) -> Tensor:
        media = read_media(path, self.frames)
        # equal frames need one pass only
        return (media[:, :1] if all(torch.equal(media[:, f], media[:, 0]) for f in range(1, media.shape[1])) else media)[None]

    def __call__(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        videos = as_videos(media)
        some = videos[:, :, evenly_spaced(videos.shape[2], min(self.frames, videos.shape[2]))]
        return joined(self.model.of_videos(some).mean(1), self.model.of_texts(prompts, media.device))


def image_text_features(folder: str, frames: int = 8) -> ImageTextFeatures:
    """Loads a local folder in the form of transformers' `save_pretrained`: weights as safetensors, no code of the folder's own, nothing downloaded."""
    if frames < 1:
        raise ValueError(f"frames: {frames} is not allowed; it is 1 or more")
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"features: {folder!r} is not a model folder (it has no config.json); give the folder of a CLIP or SigLIP, "
            "downloaded once with `hf download MODEL --local-dir FOLDER`"
        )
    return ImageTextFeatures(str(Path(folder).resolve()), frames, load_image_text(Path(folder), "features"))
