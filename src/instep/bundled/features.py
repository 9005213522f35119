"""What a reward learned from preferences reads of a bundled world: a classifier's penultimate features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from instep.bundled import LISTED, WORLDS, find
from instep.core.fingerprint import weights_fingerprint
from instep.core.size import Size
from instep.data.media import fitted, read_media
from instep.rewards.features import Features, image_text_features, joined


def features_of(given: str, frames: int = 8) -> Features:
    """The name of a bundled world (its training classifier; the monitor with `:monitor` after it), or the folder of an image-text model such as CLIP or
    SigLIP, which sees `frames` evenly spaced frames. ValueError for the held-out classifier, which no training may look at, and for what is no such model.
    """
    model, _, classifier = given.partition(":")
    if model not in WORLDS:
        if not Path(given).is_dir():
            raise ValueError(f"features: {given!r} is not a model folder; give {LISTED}, or the folder of a CLIP or SigLIP")
        return image_text_features(given, frames)
    if classifier not in ("", "training", "monitor"):
        raise ValueError(f"features: {given!r} is not allowed; {model}:training or {model}:monitor (the held-out classifier measures what others train on)")
    return find(model).features("monitor" if classifier == "monitor" else "training")


class Embeds(Protocol):
    """A bundled classifier or reader: features of media, and what prompts ask for in their space, each [B, D]."""

    @property
    def name(self) -> str: ...

    @property
    def net(self) -> nn.Module: ...

    def features(self, media: Tensor) -> Tensor: ...

    def asked(self, prompts: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True)
class ClassifierFeatures:
    """A bundled classifier's penultimate features, and its last layer's weights of what the prompt asks for."""

    model: str
    classifier: Embeds
    size: Size
    width: int

    @property
    def given(self) -> str:
        return f"{self.model}:{self.classifier.name}"

    @property
    def frames(self) -> int:
        return self.size.frames

    @property
    def name(self) -> str:
        return f"{self.given} {weights_fingerprint(self.classifier.net)}"

    def read(self, path: Path) -> Tensor:
        media = fitted(read_media(path, self.size.frames, self.size), self.size, str(path))[None]
        return media if self.size.frames > 1 else media[:, :, 0]

    def __call__(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        self.classifier.net.to(media.device)
        sample = self.classifier.features(media)
        return joined(sample, self.classifier.asked(prompts).to(sample))
