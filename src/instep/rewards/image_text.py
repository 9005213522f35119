"""Image-text models of transformers (CLIP, SigLIP): embeddings of length one of frames and of texts, and their cosine as a reward."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from instep.core.fingerprint import weights_fingerprint
from instep.core.quiet import quiet
from instep.rewards.base import RewardError
from instep.rewards.prepare import Preparation, as_videos


@dataclass(frozen=True)
class ImageText:
    """A frozen image-text model: how it takes frames and texts. `tokens`: the longest text it reads; `vocabulary`: a digest of its tokenizer."""

    network: Any
    tokenizer: Any
    prepare: Preparation
    tokens: int
    weights: str
    vocabulary: str

    @property
    def fingerprint(self) -> str:
        """Of everything that changes a score: weights, preparation of images, tokenizer; 16 hexadecimal digits."""
        return hashlib.sha256(repr((self.weights, self.prepare, self.tokens, self.vocabulary)).encode()).hexdigest()[:16]

    @property
    def width(self) -> int:
        return self.of_texts(["a"], self.network.device).shape[1]

    @property
    def image_size(self) -> int:
        return int(self.network.config.vision_config.image_size)

    def prepared(self, prepare: Preparation) -> ImageText:
        """The same model with another preparation of images."""
        return replace(self, prepare=prepare)

    def of_videos(self, media: Tensor) -> Tensor:
        """Embeddings [B, F, D] of the frames of media [B, 3, (F,) H, W] in [0, 1], with a gradient."""
        videos = as_videos(media)
        self.network.to(media.device)
        frames = self.prepare(videos.transpose(1, 2).flatten(0, 1))
        return _embedding(self.network.get_image_features(pixel_values=frames)).unflatten(0, (len(videos), -1))

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Embeddings [B, D]; texts that are longer than the model reads are cut."""
        self.network.to(device)
        # SigLIP was trained with padding to its full length; CLIP does not mind
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt")
        return _embedding(self.network.get_text_features(**tokens.to(device)))


@dataclass(frozen=True)
class ImageTextReward:
    """scale * cos(frame, prompt), the mean over the frames of a video; differentiable. `label`: what the reward is called."""

    model: ImageText
    label: str
    scale: float = 1.0
    differentiable = True
    space: ClassVar[Literal["pixel", "latent"]] = "pixel"

    @property
    def name(self) -> str:
        return f"{self.label} {self.model.fingerprint}"

    def score(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] of images [B, 3, H, W] or videos [B, 3, F, H, W] in [0, 1]."""
        check_prompts(self.label, prompts)
        images = self.model.of_videos(media)
        return self.scale * (images * self.model.of_texts(prompts, media.device)[:, None]).sum(2).mean(1)


def check_prompts(label: str, prompts: Sequence[str]) -> None:
    """Raises RewardError for a prompt without a text: there is nothing that a sample could fit."""
    empty = next((i for i, prompt in enumerate(prompts) if not prompt.strip()), None)
    if empty is not None:
        raise RewardError(f"reward {label!r}: the prompt of sample {empty} of the batch is empty, and it measures how well a sample fits its prompt; give one")


def load_image_text(folder: Path, what: str) -> ImageText:
    """Loads a CLIP or SigLIP from a folder of transformers' `save_pretrained`; messages of a ValueError begin with `what`."""
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoProcessor

    try:
        with quiet():
            network = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32)
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{what}: {folder} cannot be loaded ({' '.join(str(error).split())[:300]}); give a CLIP or SigLIP with .safetensors") from error
    if not all(hasattr(network, method) for method in ("get_image_features", "get_text_features")) or not hasattr(processor, "tokenizer"):
        raise ValueError(f"{what}: {folder} holds a {type(network).__name__}, which does not embed images and text; give a CLIP or SigLIP")
    network.eval().requires_grad_(False)
    limit = min(processor.tokenizer.model_max_length, network.config.text_config.max_position_embeddings)
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"{what}: {folder} has no preprocessor_config.json, so how it takes images is not known; give the whole model folder")
    prepare = Preparation.of(processor.image_processor.to_dict(), f"{what}: {folder}")
    vocabulary = hashlib.sha256(repr(sorted(processor.tokenizer.get_vocab().items())).encode()).hexdigest()
    return ImageText(network, processor.tokenizer, prepare, limit, weights_fingerprint(network), vocabulary)


def _embedding(found: Any) -> Tensor:
    """The projected embedding [B, D], of length one."""
    return nn.functional.normalize(found if isinstance(found, Tensor) else found.pooler_output, dim=1)
