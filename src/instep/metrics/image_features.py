"""Features of frames from a DINOv2 or a CLIP of transformers, for distances between sets, diversity, and consistency in time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instep.core.fingerprint import weights_fingerprint
from instep.core.quiet import quiet
from instep.rewards.clip_score import CLIP
from instep.rewards.located import Needed, locate
from instep.rewards.prepare import Preparation, as_videos

DINOV2 = Needed(
    "dinov2-base",
    "facebook/dinov2-base",
    ("config.json", "*.safetensors", "*processor_config.json"),
    "hf download facebook/dinov2-base --include '*.json' model.safetensors",
)
SPATIAL = 2048
NAMES = {"clip": CLIP, "dinov2": DINOV2}


@dataclass(frozen=True)
class FrameFeatures:
    """A frozen image network: the projected embedding of a CLIP or SigLIP, or the normalised class token of a DINOv2."""

    network: Any
    prepare: Preparation
    name: str
    chunk: int = 32

    @torch.no_grad()
    def __call__(self, media: Tensor) -> Tensor:
        """Features [N, F, D] on the CPU of media [N, 3, (F,) H, W] in [0, 1], a bounded number of frames at a time."""
        videos = as_videos(media)
        self.network.to(media.device)
        frames = videos.transpose(1, 2).flatten(0, 1)
        found = torch.cat([self._of(self.prepare(part)).float().cpu() for part in frames.split(self.chunk)])
        return found.unflatten(0, (len(videos), -1))

    @torch.no_grad()
    def spatial(self, media: Tensor) -> Tensor:
        """Spatial features [N, D] on the CPU of images [N, 3, H, W] in [0, 1], for sFID (Nash et al. 2021): the first channels of what the last layer has at
        every place, as many as make no more than `SPATIAL` numbers. Theirs are the first 7 channels of Inception's mixed_6, at 17 x 17 places.
        """
        self.network.to(media.device)
        vision = getattr(self.network, "vision_model", self.network)
        extra = 0 if type(self.network).__name__.startswith("Siglip") else 1 + getattr(self.network.config, "num_register_tokens", 0)
        parts = [vision(pixel_values=self.prepare(part.float())).last_hidden_state[:, extra:].float().cpu() for part in media.split(self.chunk)]
        places = torch.cat(parts)
        return places[..., : max(1, SPATIAL // places.shape[1])].flatten(1)

    def _of(self, prepared: Tensor) -> Tensor:
        seen = self.network.get_image_features(pixel_values=prepared) if hasattr(self.network, "get_image_features") else self.network(pixel_values=prepared)
        return seen if isinstance(seen, Tensor) else seen.pooler_output


def frame_features(given: str) -> FrameFeatures:
    """`clip`, `dinov2`, or the folder of such a network. Raises ValueError for what is not there, or is none."""
    from safetensors import SafetensorError
    from transformers import AutoImageProcessor, AutoModel

    needed = NAMES.get(given, DINOV2)
    place = locate(needed, None if given in NAMES else Path(given), "features")
    try:
        with quiet():
            network = AutoModel.from_pretrained(place, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32)
            processor = AutoImageProcessor.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"features: {place} cannot be loaded ({' '.join(str(error).split())[:300]}); give a CLIP or DINOv2 with .safetensors") from error
    network.eval().requires_grad_(False)
    prepare = Preparation.of(processor.to_dict(), f"features: {place}")
    read = hashlib.sha256(repr((weights_fingerprint(network), prepare)).encode()).hexdigest()[:16]
    return FrameFeatures(network, prepare, f"{type(network).__name__} {read}")
