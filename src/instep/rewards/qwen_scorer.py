"""What HPSv3 and VideoAlign share: Qwen2-VL reads an instruction with images or a video, and a head scores its hidden state at special tokens.

Images are resized and cut into patches as Qwen2-VL's processor does it, but in torch and with a gradient. Positions of tokens are counted one by one, as both
models were trained: their code left Qwen2-VL's positions in space and time out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.core.fingerprint import weights_fingerprint
from instep.core.quiet import quiet
from instep.rewards.located import Needed, locate
from instep.rewards.prepare import CLIP_MEAN, CLIP_STD, normalised

Kind = Literal["image", "video"]
RECORD = "reward.json"
FILES = ("config.json", "model.safetensors", RECORD)


class QwenScorer(nn.Module):
    """Qwen2-VL without its language head, and the head of scores: linear without a bias (`hidden` None), or three layers with ReLU between them."""

    def __init__(self, config: Any, outputs: int, hidden: tuple[int, int] | None = None) -> None:
        from transformers import Qwen2VLModel

        super().__init__()
        self.model = Qwen2VLModel(config)
        width = config.text_config.hidden_size
        if hidden is None:
            self.rm_head: nn.Module = nn.Linear(width, outputs, bias=False)
        else:
            layers = [nn.Linear(width, hidden[0]), nn.ReLU(), nn.Dropout(0.05), nn.Linear(hidden[0], hidden[1]), nn.ReLU(), nn.Linear(hidden[1], outputs)]
            self.rm_head = nn.Sequential(*layers)

    def forward(self, ids: Tensor, mask: Tensor, patches: Tensor, grid: Tensor, kind: Kind, special: Tensor) -> Tensor:
        """Scores [B, S, outputs] at the S special tokens of each row of ids [B, T]; patches of all samples one after another."""
        given = {"pixel_values": patches, "image_grid_thw": grid} if kind == "image" else {"pixel_values_videos": patches, "video_grid_thw": grid}
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        hidden = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **given).last_hidden_state
        at = torch.isin(ids, special)
        return self.rm_head(hidden[at].float()).unflatten(0, (len(ids), -1))


@dataclass(frozen=True)
class QwenReader:
    """A scorer with all it takes to read samples: tokenizer, instruction with `{text_prompt}` in it, special tokens, and bounds on the pixels of a frame."""

    network: QwenScorer
    tokenizer: Any
    instruction: str
    special: tuple[str, ...]
    pixels: tuple[int, int]
    fingerprint: str

    def score(self, videos: Tensor, prompts: Sequence[str], kind: Kind) -> Tensor:
        """[B, S, outputs] of videos [B, 3, F, H, W] in [0, 1]; an image is a video of one frame."""
        vision: Any = self.network.model.config.vision_config
        patch, merge = int(vision.patch_size), int(vision.spatial_merge_size)
        frames = videos.transpose(1, 2).flatten(0, 1)
        side = fitting(frames.shape[2], frames.shape[3], patch * merge, self.pixels)
        frames = normalised(F.interpolate(frames, side, mode="bicubic", align_corners=False, antialias=True), CLIP_MEAN, CLIP_STD)
        patches, grid = patched(frames.unflatten(0, (len(videos), -1)), patch, merge, int(vision.temporal_patch_size))
        tokens = self.tokenizer([self._asked(prompt, kind, math.prod(grid) // merge**2) for prompt in prompts], padding=True, return_tensors="pt")
        device = videos.device
        rows = torch.tensor([grid] * len(videos), device=device)
        special = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(self.special)), device=device)
        dtype = self.network.model.dtype
        self.network.to(device)
        return self.network(tokens.input_ids.to(device), tokens.attention_mask.to(device), patches.flatten(0, 1).to(dtype), rows, kind, special)

    def _asked(self, prompt: str, kind: Kind, tokens: int) -> str:
        """The message of the chat, with one place for each token of the image or video."""
        content = [{"type": kind, kind: ""}, {"type": "text", "text": self.instruction.replace("{text_prompt}", prompt)}]
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        return text.replace(f"<|{kind}_pad|>", f"<|{kind}_pad|>" * tokens)


def fitting(height: int, width: int, factor: int, pixels: tuple[int, int]) -> tuple[int, int]:
    """Height and width in multiples of `factor`, close to the aspect, with `pixels` (least, most) in all; Qwen2-VL's rule."""
    low, high = pixels
    sides = [max(factor, round(edge / factor) * factor) for edge in (height, width)]
    if sides[0] * sides[1] > high:
        shrink = math.sqrt(height * width / high)
        sides = [max(factor, math.floor(edge / shrink / factor) * factor) for edge in (height, width)]
    elif sides[0] * sides[1] < low:
        grow = math.sqrt(low / (height * width))
        sides = [math.ceil(edge * grow / factor) * factor for edge in (height, width)]
    return sides[0], sides[1]


def patched(frames: Tensor, patch: int, merge: int, times: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames [B, F, 3, H, W] as patches [B, t h w, 3 times patch^2], and their grid (t, h, w); those that are merged lie next to each other.

    The last frame is repeated to a multiple of `times`.
    """
    if short := -frames.shape[1] % times:
        frames = torch.cat([frames, frames[:, -1:].expand(-1, short, -1, -1, -1)], 1)
    b, f, c, height, width = frames.shape
    t, h, w = f // times, height // patch, width // patch
    cut = frames.reshape(b, t, times, c, h // merge, merge, patch, w // merge, merge, patch).permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return cut.reshape(b, t * h * w, c * times * patch * patch), (t, h, w)


def load_reader(needed: Needed, folder: Path | None, dtype: str) -> tuple[QwenReader, dict[str, Any]]:
    """The reader of a converted folder, and its record. Raises ValueError for other folders and for an unknown dtype."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, Qwen2VLConfig

    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype: {dtype!r} is not allowed; bfloat16, float16 or float32")
    place = locate(needed, folder)
    try:
        about = json.loads((place / RECORD).read_text(encoding="utf-8"))
        with quiet():
            network = QwenScorer(Qwen2VLConfig.from_pretrained(place, local_files_only=True), about["outputs"], about["hidden"] and tuple(about["hidden"]))
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False, padding_side="right")
        network.load_state_dict(load_file(place / "model.safetensors"))
        instruction, special, pixels = str(about["instruction"]), tuple(about["special"]), (int(about["pixels"][0]), int(about["pixels"][1]))
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{needed.name}: {place} cannot be loaded ({type(error).__name__}: {reason}); convert it again") from error
    network.eval().requires_grad_(False)
    network.model.to(getattr(torch, dtype))
    network.rm_head.float()
    read = hashlib.sha256(repr((weights_fingerprint(network), about, tokenizer.chat_template, len(tokenizer))).encode()).hexdigest()[:16]
    return QwenReader(network, tokenizer, instruction, special, pixels, f"{read}, {dtype}"), about
