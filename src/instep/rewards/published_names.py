"""The names of weights in the authors' files, and those of the networks that compute the same here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]

# open_clip's transformer blocks, and transformers' layers
CLIP_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}
CLIP_REST = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
# matrices that open_clip keeps as inputs x outputs
CLIP_TURNED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
# BLIP's image encoder
BLIP_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"^norm\.", "post_layernorm."),
)


def clip_of_open_clip(weights: Weights) -> dict[str, Tensor]:
    """A CLIP of open_clip under transformers' names. Raises KeyError for a name that open_clip does not have."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith("attn_mask"):
            continue
        if found := re.match(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)$|(.+)\.attn\.in_proj_(weight|bias)$", name):
            if found[5] is None:
                out[f"{_clip_layer(found[1], found[2])}.{CLIP_BLOCK[found[3]]}.{found[4]}"] = value
                continue
            block = re.match(r"(visual\.)?transformer\.resblocks\.(\d+)$", found[5])
            if block is None:
                raise KeyError(name)
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                out[f"{_clip_layer(block[1], block[2])}.self_attn.{part}_proj.{found[6]}"] = rows
        elif name in CLIP_TURNED:
            out[CLIP_TURNED[name]] = value.T
        else:
            out[CLIP_REST[name]] = value
    return out


def _clip_layer(visual: str | None, number: str) -> str:
    return f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"


def blip_of_image_reward(weights: Weights) -> dict[str, Tensor]:
    """ImageReward's file under the names of `image_reward.BlipScorer`; projections that it does not use are left out."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.startswith("mlp."):
            out["head." + name.removeprefix("mlp.")] = value
        elif name.startswith("blip.text_encoder.") and not name.endswith("position_ids"):
            out[name.removeprefix("blip.")] = value
        elif name.startswith("blip.visual_encoder."):
            own = name.removeprefix("blip.visual_encoder.")
            for pattern, to in BLIP_VISION:
                own, changed = re.subn(pattern, to, own)
                if changed:
                    break
            out["vision_model." + own] = value
    return out


def blip_settings(weights: Weights) -> tuple[dict[str, object], dict[str, object]]:
    """Settings of the image and of the text encoder, read off the shapes of `blip_of_image_reward`; heads are 64 wide, as everywhere in BLIP."""
    positions, patches = weights["vision_model.embeddings.position_embedding"], weights["vision_model.embeddings.patch_embedding.weight"]
    words = weights["text_encoder.embeddings.word_embeddings.weight"]
    vision: dict[str, object] = {
        "hidden_size": patches.shape[0],
        "intermediate_size": weights["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(weights, r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, patches.shape[0] // 64),
        "patch_size": patches.shape[-1],
        "image_size": math.isqrt(positions.shape[1] - 1) * patches.shape[-1],
        "layer_norm_eps": 1e-6,
    }
    text: dict[str, object] = {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "encoder_hidden_size": patches.shape[0],
        "intermediate_size": weights["text_encoder.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": _count(weights, r"text_encoder\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": max(1, words.shape[1] // 64),
        "max_position_embeddings": weights["text_encoder.embeddings.position_embeddings.weight"].shape[0],
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    return vision, text


def _count(weights: Weights, pattern: str) -> int:
    return 1 + max(int(found[1]) for name in weights if (found := re.match(pattern, name)))


def mismatch(weights: Weights, network: torch.nn.Module) -> str | None:
    """The first difference between weights and a network's own: a name that one of them lacks, or another shape; None where they fit."""
    own = network.state_dict()
    for name in own.keys() | weights.keys():
        if name not in weights or name not in own:
            return f"{name} is {'missing' if name in own else 'not known'}"
        if own[name].shape != weights[name].shape:
            return f"{name} is {tuple(weights[name].shape)}, not {tuple(own[name].shape)}"
    return None
