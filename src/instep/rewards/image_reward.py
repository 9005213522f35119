"""ImageReward (Xu et al. 2023): BLIP's text encoder reads the prompt and looks at the image; a head scores its first token.

Scores are the published ones, less the authors' mean and over their deviation: about -2 to 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from instep.core.fingerprint import weights_fingerprint
from instep.core.quiet import quiet
from instep.rewards.image_text import check_prompts
from instep.rewards.located import Needed, locate
from instep.rewards.prepare import Preparation, as_videos, frames_of
from instep.rewards.score_head import ScoreHead

MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35  # longer prompts are cut, as in the authors' code
IMAGE_REWARD = Needed(
    "imagereward",
    "THUDM/ImageReward",
    ("config.json", "model.safetensors"),
    "hf download THUDM/ImageReward ImageReward.pt --local-dir . && "
    "hf download google-bert/bert-base-uncased --include 'tokenizer*' vocab.txt --local-dir models/bert-base-uncased && "
    "instep rewards convert ImageReward.pt --base models/bert-base-uncased --to models/imagereward",
    cached=False,
)


class BlipScorer(nn.Module):
    """BLIP's image encoder, its text encoder, which attends to the image, and the head; the names of its weights are those of a converted file."""

    def __init__(self, config: Any) -> None:
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.head = ScoreHead(config.text_config.hidden_size)

    def forward(self, frames: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Prepared frames [N, 3, h, w] and tokens [N, T] to scores [N]."""
        seen = self.vision_model(pixel_values=frames).last_hidden_state
        whole = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        read = self.text_encoder(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=whole).last_hidden_state
        return (self.head(read[:, 0]) - MEAN) / STD


@dataclass(frozen=True)
class ImageReward:
    """The published score; the mean over the frames of a video."""

    network: BlipScorer
    tokenizer: Any
    prepare: Preparation
    fingerprint: str
    differentiable = True
    space: ClassVar[Literal["pixel", "latent"]] = "pixel"

    @property
    def name(self) -> str:
        return f"imagereward {self.fingerprint}"

    def score(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] of images [B, 3, H, W] or videos [B, 3, F, H, W] in [0, 1]."""
        check_prompts("imagereward", prompts)
        videos = as_videos(media)
        frames = videos.shape[2]
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").to(media.device)
        ids, mask = (x.repeat_interleave(frames, 0) for x in (tokens.input_ids, tokens.attention_mask))
        return self.network.to(media.device)(self.prepare(frames_of(videos)), ids, mask).unflatten(0, (-1, frames)).mean(1)


def image_reward(folder: Path | None = None) -> ImageReward:
    """A converted ImageReward: its networks and BERT's tokenizer in one folder."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, BlipConfig

    place = locate(IMAGE_REWARD, folder)
    try:
        with quiet():
            config: Any = BlipConfig.from_pretrained(place, local_files_only=True)
            network = BlipScorer(config)
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        network.load_state_dict({name: value.float() for name, value in load_file(place / "model.safetensors").items()})
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"imagereward: {place} cannot be loaded ({reason}); convert it again") from error
    network.eval().requires_grad_(False)
    side = int(config.vision_config.image_size)
    read = hashlib.sha256(repr((weights_fingerprint(network), sorted(tokenizer.get_vocab().items()))).encode()).hexdigest()[:16]
    return ImageReward(network, tokenizer, Preparation(side, (side, side)), read)
