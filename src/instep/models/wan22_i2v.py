"""Wan 2.2 A14B image-to-video: two experts by noise level, and a given first frame joined along channels."""

from __future__ import annotations

from instep.models.preset import Preset
from instep.models.wan22 import Wan22Family
from instep.models.wan_i2v import WanImageFamily

WAN22_I2V = Preset(
    source="Wan 2.2's released code (github.com/Wan-Video/Wan2.2), wan/configs/wan_i2v_A14B.py: 40 steps, guidance 3.5 for both experts, boundary 0.9",
    guidance=3.5,
    guidance_2=3.5,
    sampler_steps=40,
    micro_batch=1,
)


class Wan22ImageFamily(Wan22Family, WanImageFamily):
    """A `WanImageToVideoPipeline` of two experts seen as a family; a prompt names its first frame, a file (see `data/prompt.py`)."""

    preset = WAN22_I2V
