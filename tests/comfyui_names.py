"""Which tensors of a LoRA file ComfyUI takes: facts about its loader, for `test_families.py`.

ComfyUI (github.com/comfyanonymous/ComfyUI) looks each tensor of a file up by its name. It passes over one that it does not know, with a warning in its log. The
names are those of `model_lora_keys_unet` in comfy/lora.py and of the tables in comfy/utils.py that it uses, as of 2026 (the tables in version 0.26.1). ComfyUI
itself is not installed for the tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PEFT = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")


@dataclass(frozen=True)
class Names:
    """prefix: what a layer's name begins with. layers: pattern of the layer's name in the file -> the parameter of ComfyUI's network that it changes, without
    `.weight`, and after a colon the rows of a fused one. factors: the ends of the names of A and B. source: where the rule stands.
    """

    prefix: str
    layers: Mapping[str, str]
    source: str
    factors: tuple[str, str] = PEFT

    def target(self, layer: str) -> str | None:
        """What a layer of the file changes; None if ComfyUI does not know it."""
        if not layer.startswith(self.prefix):
            return None
        name = layer.removeprefix(self.prefix)
        return next((found.expand(target) for pattern, target in self.layers.items() if (found := re.fullmatch(pattern, name))), None)


_BLOCK = r"blocks\.(\d+)\."

WAN = Names(
    "diffusion_model.",
    {
        rf"{_BLOCK}(self_attn|cross_attn)\.([qkvo])": r"blocks.\1.\2.\3",
        rf"{_BLOCK}cross_attn\.([kv])_img": r"blocks.\1.cross_attn.\2_img",
        rf"{_BLOCK}ffn\.([02])": r"blocks.\1.ffn.\2",
    },
    "comfy/lora.py: of every model a parameter's own name after `diffusion_model.`; comfy/ldm/wan/model.py",
)
_JOINT = r"transformer_blocks\.(\d+)\."
SD3 = Names(
    "transformer.",
    {
        rf"{_JOINT}attn\.to_([qkv])": r"joint_blocks.\1.x_block.attn.qkv:\2",
        rf"{_JOINT}attn\.add_([qkv])_proj": r"joint_blocks.\1.context_block.attn.qkv:\2",
        rf"{_JOINT}attn2\.to_([qkv])": r"joint_blocks.\1.x_block.attn2.qkv:\2",
        rf"{_JOINT}(attn2?)\.to_out\.0": r"joint_blocks.\1.x_block.\2.proj",
        rf"{_JOINT}attn\.to_add_out": r"joint_blocks.\1.context_block.attn.proj",
    },
    "comfy/lora.py, SD3; comfy/utils.py: mmdit_to_diffusers",
)
_SINGLE = r"single_transformer_blocks\.(\d+)\."
# of both streams of a double block
_DOUBLE = {
    rf"{_JOINT}attn\.to_([qkv])": r"double_blocks.\1.img_attn.qkv:\2",
    rf"{_JOINT}attn\.add_([qkv])_proj": r"double_blocks.\1.txt_attn.qkv:\2",
    rf"{_JOINT}attn\.to_out\.0": r"double_blocks.\1.img_attn.proj",
    rf"{_JOINT}attn\.to_add_out": r"double_blocks.\1.txt_attn.proj",
}
FLUX = Names(
    "transformer.",
    {
        **_DOUBLE,
        rf"{_JOINT}ff\.net\.0\.proj": r"double_blocks.\1.img_mlp.0",
        rf"{_JOINT}ff\.net\.2": r"double_blocks.\1.img_mlp.2",
        rf"{_SINGLE}attn\.to_([qkv])": r"single_blocks.\1.linear1:\2",
        rf"{_SINGLE}proj_mlp": r"single_blocks.\1.linear1:mlp",
        rf"{_SINGLE}proj_out": r"single_blocks.\1.linear2",
    },
    "comfy/lora.py, Flux; comfy/utils.py: flux_to_diffusers",
)
FLUX2 = Names(
    "transformer.",
    {
        **_DOUBLE,
        rf"{_JOINT}ff\.linear_in": r"double_blocks.\1.img_mlp.0",
        rf"{_JOINT}ff\.linear_out": r"double_blocks.\1.img_mlp.2",
        rf"{_JOINT}ff_context\.linear_in": r"double_blocks.\1.txt_mlp.0",
        rf"{_JOINT}ff_context\.linear_out": r"double_blocks.\1.txt_mlp.2",
        rf"{_SINGLE}attn\.to_qkv_mlp_proj": r"single_blocks.\1.linear1",
        rf"{_SINGLE}attn\.to_out": r"single_blocks.\1.linear2",
    },
    "comfy/lora.py, Flux, whose subclass Flux2 is; comfy/utils.py: flux_to_diffusers",
)
QWEN_IMAGE = Names(
    "transformer.",
    {
        rf"{_JOINT}attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)": r"transformer_blocks.\1.attn.\2",
        rf"{_JOINT}(img|txt)_mlp\.net\.(0\.proj|2)": r"transformer_blocks.\1.\2_mlp.net.\3",
    },
    "comfy/lora.py, QwenImage: a parameter's own name after `transformer.`; comfy/ldm/qwen_image/model.py, whose names are diffusers'",
)
_LAYER = r"(layers|context_refiner|noise_refiner)\.(\d+)\."
Z_IMAGE = Names(
    "transformer.",
    {
        rf"{_LAYER}attention\.to_([qkv])": r"\1.\2.attention.qkv:\3",
        rf"{_LAYER}attention\.to_out\.0": r"\1.\2.attention.out",
        rf"{_LAYER}feed_forward\.w([123])": r"\1.\2.feed_forward.w\3",
    },
    "comfy/lora.py, Lumina2, whose code runs Z-Image; comfy/utils.py: z_image_to_diffusers",
)
# diffusers' names of a UNet with underscores; ComfyUI counts blocks otherwise, which the target leaves out
_ATTENTION = r"(down_blocks_\d+|mid_block|up_blocks_\d+)_attentions_(\d+)_"
SDXL = Names(
    "lora_unet_",
    {
        rf"{_ATTENTION}(proj_in|proj_out)": r"\1.\2.\3",
        rf"{_ATTENTION}transformer_blocks_(\d+)_attn([12])_(to_[qkv]|to_out_0)": r"\1.\2.transformer_blocks.\3.attn\4.\5",
        rf"{_ATTENTION}transformer_blocks_(\d+)_ff_net_(0_proj|2)": r"\1.\2.transformer_blocks.\3.ff.net.\4",
    },
    "comfy/lora.py, diffusers' names with underscores; comfy/utils.py: unet_to_diffusers",
    KOHYA,
)

# ComfyUI has no DiT of classes. Of CogVideoX, which it has since 2026, it takes only its own names, `diffusion_model.blocks.0.q`; diffusers does not read them.
BY_FAMILY: Mapping[str, Names] = {
    **dict.fromkeys(("WanFamily", "Wan22Family", "Wan21ImageFamily", "Wan22ImageFamily", "TI2VFamily", "TI2VImageFamily"), WAN),
    "SD3Family": SD3,
    "SDXLFamily": SDXL,
    "ZImageFamily": Z_IMAGE,
    "FluxFamily": FLUX,
    "Flux2KleinBaseFamily": FLUX2,
    "QwenImageFamily": QWEN_IMAGE,
}


def changed(names: Names, keys: Iterable[str]) -> list[str]:
    """What the layers of a file change in ComfyUI, one entry a layer. Raises AssertionError for a tensor that ComfyUI does not take."""
    there, (first, second) = set(keys), names.factors
    layers = sorted(key.removesuffix(f".{first}") for key in there if key.endswith(f".{first}"))
    assert there == {f"{layer}.{end}" for layer in layers for end in (first, second)}, "each layer has two tensors of these names, and nothing else"
    unknown = [layer for layer in layers if names.target(layer) is None]
    assert not unknown, f"ComfyUI has no name for {unknown[:3]}"
    return [str(names.target(layer)) for layer in layers]
