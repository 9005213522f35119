"""What ComfyUI needs to run a Wan student: its names for the modules, its list of levels, a workflow of stock nodes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from instep.core.size import Size

# diffusers' module names -> the original Wan names, which ComfyUI keeps; the first rule that matches decides
_MODULES = (
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"proj_out", "head.head"),
    (r"blocks\.(\d+)\.attn1\.to_([qkv])", r"blocks.\1.self_attn.\2"),
    (r"blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.self_attn.o"),
    (r"blocks\.(\d+)\.attn2\.to_([qkv])", r"blocks.\1.cross_attn.\2"),
    (r"blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.o"),
    (r"blocks\.(\d+)\.attn2\.add_([kv])_proj", r"blocks.\1.cross_attn.\2_img"),
    (r"blocks\.(\d+)\.ffn\.net\.0\.proj", r"blocks.\1.ffn.0"),
    (r"blocks\.(\d+)\.ffn\.net\.2", r"blocks.\1.ffn.2"),
)
# what is not a linear layer: needed for whole checkpoints, never for LoRA
_OTHERS = (
    (r"patch_embedding", "patch_embedding"),
    (r"blocks\.(\d+)\.attn1\.norm_([qk])", r"blocks.\1.self_attn.norm_\2"),
    (r"blocks\.(\d+)\.attn2\.norm_([qk])", r"blocks.\1.cross_attn.norm_\2"),
    # the norm before cross-attention: second in diffusers, third in the original
    (r"blocks\.(\d+)\.norm2", r"blocks.\1.norm3"),
)
_TABLES = ((r"scale_shift_table", "head.modulation"), (r"blocks\.(\d+)\.scale_shift_table", r"blocks.\1.modulation"))


def _renamed(name: str, rules: tuple[tuple[str, str], ...], what: str) -> str:
    for pattern, target in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(target)
    raise ValueError(
        f"{what}: {name!r} has no name in ComfyUI's Wan; allowed: q, k, v and out of attn1 and attn2, both ffn layers,"
        " time and text embedders, proj_out; restrict target_modules to these"
    )


def comfyui_module(name: str) -> str:
    """ComfyUI's name of a diffusers Wan layer; raises ValueError if it has none there."""
    return _renamed(name, _MODULES, "target module")


def comfyui_parameter(key: str) -> str:
    """The name that ComfyUI's diffusion-model loader reads for a parameter of the transformer (text-to-video Wan); ValueError if it has none there."""
    owner, _, leaf = key.rpartition(".")
    if leaf == "scale_shift_table":
        return _renamed(key, _TABLES, "parameter")
    return f"{_renamed(owner, (*_MODULES, *_OTHERS), 'parameter')}.{leaf}"


def comfyui_levels(n: int, shift: float) -> list[float]:
    """The levels of ModelSamplingSD3(shift) with scheduler `simple`: every (1000 / n)-th of 1000 shifted uniform
    levels, from 1 down.
    """
    t = [(1000 - int(j * (1000 / n))) / 1000 for j in range(n)]
    return [shift * v / (1 + (shift - 1) * v) for v in t]


def comfyui_shift(levels: Sequence[float]) -> tuple[float, float]:
    """The shift at which ComfyUI's second level is ours, and the largest difference of all levels at that shift.

    The difference is 0 (rounding apart) for uniform-then-shifted lists whose n divides 1000; for the other n ComfyUI
    rounds to thousandths, which costs under .001 times the shift; lists of another form differ visibly.
    """
    n = len(levels)
    if n == 1:
        return 1.0, 0.0
    u, t = (1000 - int(1000 / n)) / 1000, levels[1]
    # six digits: the node's own resolution is finer than any training needs, and 5 reads better than 4.9999998
    shift = round(t * (1 - u) / (u * (1 - t)), 6 if n > 2 else 4)
    return shift, max(abs(a - b) for a, b in zip(comfyui_levels(n, shift), levels, strict=True))


def comfyui_workflow(levels: Sequence[float], size: Size, prompt: str, model: str, loras: Sequence[tuple[str, float]], seed: int) -> dict[str, Any]:
    """A text-to-video graph of stock nodes in ComfyUI's API format: opens by dropping it on the window, or POST to
    /prompt.

    model, loras: file names under ComfyUI's models/diffusion_models and models/loras, these with their strengths. Text encoder and VAE carry the
    names of ComfyUI's own Wan 2.1 files. Sampler `lcm` predicts x0 and re-noises, which is how the student was trained.
    """
    shift, _ = comfyui_shift(levels)
    chain = {f"lora{i or ''}": (name, strength) for i, (name, strength) in enumerate(loras)}
    source = [list(chain)[-1], 0] if chain else ["model", 0]
    graph: dict[str, tuple[str, dict[str, Any]]] = {
        "model": ("UNETLoader", {"unet_name": model, "weight_dtype": "default"}),
        "clip": (
            "CLIPLoader",
            {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan", "device": "default"},
        ),
        "vae": ("VAELoader", {"vae_name": "wan_2.1_vae.safetensors"}),
        "positive": ("CLIPTextEncode", {"text": prompt, "clip": ["clip", 0]}),
        # at cfg 1 the negative prompt is not evaluated, but the sampler's socket must be filled
        "negative": ("CLIPTextEncode", {"text": "", "clip": ["clip", 0]}),
        "shift": ("ModelSamplingSD3", {"shift": shift, "model": source}),
        "latent": (
            "EmptyHunyuanLatentVideo",
            {"width": size.width, "height": size.height, "length": size.frames, "batch_size": 1},
        ),
        "sampler": (
            "KSampler",
            {
                "seed": seed,
                "steps": len(levels),
                "cfg": 1.0,
                "sampler_name": "lcm",
                "scheduler": "simple",
                "denoise": 1.0,
                "model": ["shift", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["latent", 0],
            },
        ),
        "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["vae", 0]}),
        "save": (
            "SaveAnimatedWEBP",
            {
                "images": ["decode", 0],
                "filename_prefix": "instep",
                "fps": 16.0,
                "lossless": False,
                "quality": 90,
                "method": "default",
            },
        ),
    }
    for before, (node, (name, strength)) in zip(["model", *chain], chain.items(), strict=False):
        graph[node] = ("LoraLoaderModelOnly", {"lora_name": name, "strength_model": strength, "model": [before, 0]})
    ids = {name: str(i + 1) for i, name in enumerate(graph)}

    def link(value: Any) -> Any:
        return [ids[value[0]], value[1]] if isinstance(value, list) else value

    return {
        ids[name]: {"class_type": kind, "inputs": {key: link(v) for key, v in inputs.items()}, "_meta": {"title": name}}
        for name, (kind, inputs) in graph.items()
    }


def comfyui_obstacle(pipeline: Any) -> str | None:
    """None if text encoder and VAE are the ones ComfyUI has for Wan 2.1, else the reason why ComfyUI cannot run the
    model.
    """
    if pipeline.transformer.config.text_dim != 4096:
        return f"its text encoder is {pipeline.transformer.config.text_dim} wide, ComfyUI's UMT5-XXL is 4096"
    vae = pipeline.vae.config
    if vae.is_residual or vae.base_dim != 96 or vae.z_dim != 16:
        return "its VAE is not the Wan 2.1 one"
    return None


class WanComfyUI:
    """ComfyUI's Wan, with the members of `models/family.py`'s `ComfyUI`."""

    parameter = staticmethod(comfyui_parameter)
    obstacle = staticmethod(comfyui_obstacle)
    shift = staticmethod(comfyui_shift)
    workflow = staticmethod(comfyui_workflow)
