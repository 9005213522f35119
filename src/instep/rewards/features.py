"""The inputs of a reward learned from preferences: features of media and their prompts, from an image-text model of the user or from a classifier that the
caller provides (`FeaturesOf`).

Both embed the sample and its prompt in one space. The features are (sample, prompt, sample * prompt): with the products a linear head can weigh how well a
sample fits its prompt, direction by direction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.core.fingerprint import weights_fingerprint
from instep.core.quiet import quiet
from instep.data.media import read_media
from instep.diffusion.transfer import constants
from instep.rewards.samples import evenly_spaced

RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, in processors' files


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
class Preparation:
    """Prepares frames by the settings of an image-text model's processor, but with a gradient: resized, cropped, normalised.

    `resize`: (height, width), or one number for the shorter side. Pillow, with which processors resize, rounds to 8 bits in between; this does not.
    """

    resize: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, settings: dict[str, Any], name: str) -> Preparation:
        """Reads an image processor's settings. Raises ValueError for steps that are not supported here."""
        size, crop, normal = settings.get("size") or {}, settings.get("crop_size") or {}, settings.get("do_normalize")
        resize: Any = size["shortest_edge"] if size.get("shortest_edge") else (size.get("height"), size.get("width"))
        if settings.get("resample", 3) not in RESAMPLE or (settings.get("do_resize") and None in (resize if isinstance(resize, tuple) else ())):
            kind = settings.get("image_processor_type")
            raise ValueError(f"features: {name} resizes images in a way that is not known ({kind}, {size}); give a CLIP or SigLIP with a fixed size")
        return cls(
            resize if settings.get("do_resize") else None,
            (crop["height"], crop["width"]) if settings.get("do_center_crop") else None,
            RESAMPLE[settings.get("resample", 3)],
            tuple(settings["image_mean"]) if normal else (0.0, 0.0, 0.0),
            tuple(settings["image_std"]) if normal else (1.0, 1.0, 1.0),
        )

    def __call__(self, frames: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] to [N, 3, h, w]."""
        height, width = frames.shape[2:]
        if self.resize is not None:
            short = min(height, width)
            to = self.resize if isinstance(self.resize, tuple) else (int(self.resize * height / short), int(self.resize * width / short))
            frames = F.interpolate(frames, to, mode=self.mode, align_corners=False, antialias=True)
        if self.crop is not None:
            top, left = ((have - want) // 2 for have, want in zip(frames.shape[2:], self.crop, strict=True))
            if min(top, left) < 0:
                raise ValueError(f"media: {height} x {width} are too small for a crop of {self.crop[0]} x {self.crop[1]}; give larger ones")
            frames = frames[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (constants(values, frames)[:, None, None] for values in (self.mean, self.std))
        return (frames - mean) / std


@dataclass(frozen=True)
class ImageTextFeatures:
    """Embeddings of an image-text model, each of length one: the mean over `frames` evenly spaced frames, and the prompt's."""

    given: str
    frames: int
    fingerprint: str
    network: Any
    tokenizer: Any
    prepare: Preparation
    tokens: int

    @property
    def name(self) -> str:
        return f"{Path(self.given).name} {self.fingerprint}, {self.frames} frames"

    @property
    def width(self) -> int:
        return 3 * self.asked(["a"]).shape[1]

    def read(self, path: Path) -> Tensor:
        media = read_media(path, self.frames)
        # equal frames need one pass only
        return (media[:, :1] if bool((media == media[:, :1]).all()) else media)[None]

    def __call__(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        if media.ndim not in (4, 5) or media.shape[1] != 3:
            raise ValueError(f"media: shape {tuple(media.shape)} is not allowed; give images [B, 3, H, W] or videos [B, 3, F, H, W] in [0, 1]")
        videos = (media if media.ndim == 5 else media[:, :, None]).float()
        some = videos[:, :, evenly_spaced(videos.shape[2], min(self.frames, videos.shape[2]))]
        self.network.to(media.device)
        each = _embedding(self.network.get_image_features(pixel_values=self.prepare(some.transpose(1, 2).flatten(0, 1))))
        return joined(each.unflatten(0, (len(media), -1)).mean(1), self.asked(prompts))

    @torch.no_grad()
    def asked(self, prompts: Sequence[str]) -> Tensor:
        """[B, D] of prompts; those longer than the model reads are cut."""
        # SigLIP was trained with padding to its full length; CLIP does not mind
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt")
        return _embedding(self.network.get_text_features(**tokens.to(self.network.device)))


def image_text_features(folder: str, frames: int = 8) -> ImageTextFeatures:
    """Loads a local folder in the form of transformers' `save_pretrained`: weights as safetensors, no code of the folder's own, nothing downloaded."""
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoProcessor

    if frames < 1:
        raise ValueError(f"frames: {frames} is not allowed; it is 1 or more")
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"features: {folder!r} is not a model folder (it has no config.json); give the folder of a CLIP or SigLIP, "
            "downloaded once with `hf download MODEL --local-dir FOLDER`"
        )
    try:
        with quiet():
            network = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32)
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"features: {folder} cannot be loaded ({' '.join(str(error).split())[:300]}); give a CLIP or SigLIP with .safetensors") from error
    if not all(hasattr(network, method) for method in ("get_image_features", "get_text_features")) or not hasattr(processor, "tokenizer"):
        raise ValueError(f"features: {folder} holds a {type(network).__name__}, which does not embed images and text; give a CLIP or SigLIP")
    network.eval().requires_grad_(False)
    limit = min(processor.tokenizer.model_max_length, network.config.text_config.max_position_embeddings)
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"features: {folder} has no preprocessor_config.json, so how it takes images is not known; give the whole model folder")
    prepare = Preparation.of(processor.image_processor.to_dict(), folder)
    # preprocessing of images and texts changes scores just as weights do
    read = hashlib.sha256(repr((weights_fingerprint(network), prepare, limit, sorted(processor.tokenizer.get_vocab().items()))).encode()).hexdigest()[:16]
    return ImageTextFeatures(str(Path(folder).resolve()), frames, read, network, processor.tokenizer, prepare, limit)


def _embedding(found: Any) -> Tensor:
    """The projected embedding [B, D], of length one."""
    return nn.functional.normalize(found if isinstance(found, Tensor) else found.pooler_output, dim=1)
