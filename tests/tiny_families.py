"""Whole pipelines of further families with random weights, small enough for tests: built offline, each once a session (`families.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tiny import tiny_wan_i2v_pipeline, tiny_wan_pipeline

if TYPE_CHECKING:
    from diffusers import WanImageToVideoPipeline, WanPipeline


def tiny_wan22_i2v_pipeline(seed: int = 0) -> WanImageToVideoPipeline:
    """Two experts of equal shape and different random weights, each given a first frame: 16 + 4 + 16 channels in."""
    from diffusers import WanImageToVideoPipeline

    pipe, other = tiny_wan_i2v_pipeline(seed), tiny_wan_i2v_pipeline(seed + 100)
    return WanImageToVideoPipeline(**{**pipe.components, "transformer_2": other.transformer}, boundary_ratio=0.9)


def tiny_ti2v_pipeline(seed: int = 0) -> WanPipeline:
    """`tiny_wan_pipeline` with a level for every token."""
    from diffusers import WanPipeline

    return WanPipeline(**tiny_wan_pipeline(seed).components, expand_timesteps=True)


def tiny_ti2v_image_pipeline(seed: int = 0) -> WanImageToVideoPipeline:
    """The parts of `tiny_ti2v_pipeline` as the pipeline that begins with a given frame."""
    from diffusers import WanImageToVideoPipeline

    return WanImageToVideoPipeline(**tiny_wan_pipeline(seed).components, expand_timesteps=True)


def tiny_wan21_i2v_pipeline(seed: int = 0) -> WanImageToVideoPipeline:
    """16 + 4 + 16 channels in, and a CLIP of width 16 that reads 8 x 8 pixels as 5 tokens, which are loud so that two first frames differ visibly."""
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    base = tiny_wan_pipeline(seed)
    config = {key: value for key, value in base.transformer.config.items() if not key.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(**{**config, "in_channels": 36, "image_dim": 16, "added_kv_proj_dim": 32})
        encoder = CLIPVisionModel(
            CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4, projection_dim=16)
        )
    with torch.no_grad():
        for block in transformer.blocks:
            block.attn2.to_v.weight.mul_(32)
            block.attn2.add_v_proj.weight.mul_(4)
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return WanImageToVideoPipeline(
        **{**base.components, "transformer": transformer.eval(), "image_encoder": encoder.eval(), "image_processor": processor},
    )
