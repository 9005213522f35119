"""A classifier as the reward of class-conditional models: the log-probability of the class that the prompt names (DMDR's DINOv2 on ImageNet)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from instep.core.fingerprint import weights_fingerprint
from instep.core.quiet import quiet
from instep.diffusion.transfer import to_device
from instep.rewards.base import RewardError
from instep.rewards.located import Needed, locate
from instep.rewards.prepare import Preparation, as_videos, frames_of

DINOV2 = Needed(
    "dinov2",
    "facebook/dinov2-large-imagenet1k-1-layer",
    ("config.json", "*.safetensors", "*processor_config.json"),
    "hf download facebook/dinov2-large-imagenet1k-1-layer --include '*.json' model.safetensors",
)


@dataclass(frozen=True)
class ClassifierReward:
    """log p(class | image), 0 or below; the mean over the frames of a video. `classes`: names, in small letters, and numbers to the classifier's outputs."""

    network: Any
    prepare: Preparation
    classes: Mapping[str, int]
    fingerprint: str
    differentiable = True
    space: ClassVar[Literal["pixel", "latent"]] = "pixel"

    @property
    def name(self) -> str:
        return f"dinov2 {self.fingerprint}"

    def score(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] of images [B, 3, H, W] or videos [B, 3, F, H, W] in [0, 1]; a prompt is the name of a class, one of its synonyms, or its number."""
        log_prob = self.log_probabilities(media).mean(1)
        wanted = to_device(torch.tensor([[self._class(prompt)] for prompt in prompts]), media.device)
        return log_prob.gather(1, wanted)[:, 0]

    def log_probabilities(self, media: Tensor) -> Tensor:
        """log p(class | frame), [B, F, C], of images [B, 3, H, W] or videos [B, 3, F, H, W] in [0, 1]."""
        videos = as_videos(media)
        self.network.to(media.device)
        logits = self.network(pixel_values=self.prepare(frames_of(videos))).logits
        return F.log_softmax(logits, 1).unflatten(0, (len(videos), -1))

    def _class(self, prompt: str) -> int:
        found = self.classes.get(prompt.strip().lower())
        if found is None:
            some = ", ".join(repr(name) for name in list(self.classes)[:3])
            raise RewardError(f"reward 'dinov2': the prompt {prompt!r} is no class of the classifier; its {len(self.classes)} names and numbers begin {some}")
        return found


def dinov2(folder: Path | None = None, setting: str = "folder") -> ClassifierReward:
    """Any image classifier of transformers; its names of classes may hold several, divided by commas. `setting`: what gives the folder."""
    from safetensors import SafetensorError
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    place = locate(DINOV2, folder, setting)
    try:
        with quiet():
            network = AutoModelForImageClassification.from_pretrained(place, local_files_only=True, use_safetensors=True, trust_remote_code=False)
            processor = AutoImageProcessor.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"dinov2: {place} cannot be loaded ({reason}); give an image classifier with .safetensors") from error
    network.float().eval().requires_grad_(False)
    prepare = Preparation.of(processor.to_dict(), f"dinov2: {place}")
    classes = class_names(network.config.id2label)
    read = hashlib.sha256(repr((weights_fingerprint(network), prepare, sorted(classes.items()))).encode()).hexdigest()[:16]
    return ClassifierReward(network, prepare, classes, read)


def class_names(labels: Mapping[int, str]) -> dict[str, int]:
    """Each name of each class, and each number, to the number; a name that two classes share ("crane") is left out."""
    pairs = [(name.strip().lower(), int(number)) for number, names in labels.items() for name in dict.fromkeys([*names.split(","), names])]
    numbers: dict[str, set[int]] = {}
    for name, number in pairs:
        numbers.setdefault(name, set()).add(number)
    return {name: number for name, number in pairs if len(numbers[name]) == 1} | {str(number): int(number) for number in labels}
