"""SiT's published weights as parts that stock diffusers classes read: the same function, told time and sign as the rectified flow here has them.

SiT (Ma et al. 2024, arXiv 2401.08740) has x = s data + (1 - s) noise, predicts data - noise and is told s itself. Here t = 1 - s, the velocity is
noise - data, and the network is told 1000 t through diffusers' frequencies. Signs are turned in the last layer. The sines and cosines of s have periods of 6
and more, so on [0, 1] they are sums of the slow ones of 1000 t and a constant, to 1e-7; the first layer of the time embedding takes these sums in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instep.core.files import atomic_dir
from instep.core.outputs import check_output

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
HALF = 128
# radians that a frequency of diffusers turns by between t = 0 and 1, up to which it is used
FASTEST = 6.0
# relative singular value that the fit damps
RIDGE = 1e-8
# the authors' positions are float32
POSITIONS = 1e-4
ONE_TO_ONE = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
REST = {"x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out_2", "final_layer.adaLN_modulation.1": "proj_out_1"}
SHARED = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2", "y_embedder": "class_embedder"}


def time_features(t: Tensor) -> tuple[Tensor, Tensor]:
    """What SiT's time embedding reads of 1 - t, and what diffusers' reads of 1000 t: cosines, then sines, each [n, 256]."""
    i = torch.arange(HALF, dtype=torch.float64)
    theirs, stock = (1 - t)[:, None] * 1e4 ** (-i / HALF), 1000 * t[:, None] * 1e4 ** (-i / (HALF - 1))
    return torch.cat([theirs.cos(), theirs.sin()], 1), torch.cat([stock.cos(), stock.sin()], 1)


def time_map() -> tuple[Tensor, Tensor]:
    """Matrix [256, 256] and offset [256] of float64 that make SiT's features of diffusers': theirs = stock @ matrix + offset for t in [0, 1]."""
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    theirs, stock = time_features(t)
    slow = 1000 * 1e4 ** (-torch.arange(HALF, dtype=torch.float64) / (HALF - 1)) <= FASTEST
    used = torch.cat([slow, slow]).nonzero().flatten()
    u, s, v = torch.linalg.svd(torch.cat([stock[:, used], torch.ones(len(t), 1, dtype=t.dtype)], 1), full_matrices=False)
    found = v.T @ ((s / (s.square() + (RIDGE * s[0]).square()))[:, None] * (u.T @ theirs))
    matrix = torch.zeros(2 * HALF, 2 * HALF, dtype=t.dtype)
    matrix[used] = found[:-1]
    return matrix, found[-1]


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under diffusers' names, time and sign turned; `pos_embed`, which diffusers computes, is left out. ValueError for a name that SiT has not."""
    depth = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1)
    found: dict[str, Tensor] = {}
    matrix, offset = time_map()
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        if name == "pos_embed":
            continue
        if name == "t_embedder.mlp.0.weight":
            value = (value.double() @ matrix.T).to(value.dtype)
        elif name == "t_embedder.mlp.0.bias":
            value = (value.double() + weights["t_embedder.mlp.0.weight"].double() @ offset).to(value.dtype)
        elif layer == "final_layer.linear":
            value = -value
        shared = next((new + layer[len(old) :] for old, new in SHARED.items() if layer.startswith(old)), None)
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)
        if shared is not None:
            # diffusers' blocks embed time and class each for itself
            found |= {f"transformer_blocks.{i}.norm1.emb.{shared}.{kind}": value for i in range(depth)}
        elif layer in REST:
            found[f"{REST[layer]}.{kind}"] = value
        elif block and block[2] == "attn.qkv":
            found |= {f"transformer_blocks.{block[1]}.attn1.to_{part}.{kind}": rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
        elif block and block[2] in ONE_TO_ONE:
            found[f"transformer_blocks.{block[1]}.{ONE_TO_ONE[block[2]]}.{kind}"] = value
        else:
            raise ValueError(f"file: it holds {name!r}, which SiT has not; give the published file, for example SiT-XL-2-256x256.pt")
    return found


def network_of(weights: Mapping[str, Tensor], heads: int | None = None) -> Any:
    """The `DiTTransformer2DModel` of SiT's published weights. heads: None for the published widths. ValueError for weights of another model."""
    from diffusers import DiTTransformer2DModel

    needed = (
        "x_embedder.proj.weight",
        "pos_embed",
        "y_embedder.embedding_table.weight",
        "final_layer.linear.weight",
        "t_embedder.mlp.0.weight",
        "t_embedder.mlp.0.bias",
    )
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(f"file: it lacks {missing[0]!r}, which SiT has; give the published file, for example SiT-XL-2-256x256.pt")
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    heads = heads or HEADS.get(width)
    if not heads or width % heads:
        raise ValueError(f"heads: {heads} is not allowed for width {width}; give a divisor of the width (published: {HEADS})")
    found = renamed(weights)
    positions = weights["pos_embed"][0]
    network = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=len(weights["final_layer.linear.weight"]) // patch**2,
        num_layers=sum(name.endswith("attn1.to_q.weight") for name in found),
        sample_size=round(len(positions) ** 0.5) * patch,
        patch_size=patch,
        num_embeds_ada_norm=len(weights["y_embedder.embedding_table.weight"]) - 1,
        norm_eps=1e-6,
    )
    try:
        network.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(f"file: it is not SiT as it was published ({' '.join(str(error).split())[:200]}); download it again") from error
    if not float((network.pos_embed.pos_embed[0] - positions).abs().max()) <= POSITIONS:
        raise ValueError("file: its positions are not SiT's; give the published file, for example SiT-XL-2-256x256.pt")
    return network.eval()


def write_sit(weights: Mapping[str, Tensor], vae: Path, to: Path, heads: int | None = None) -> None:
    """Writes the model folder `to`: transformer/, scheduler/ of the flow, and vae/, all of safetensors; whole or not at all.

    vae: the folder of the VAE whose latents the model has (stabilityai/sd-vae-ft-ema). Raises ValueError for weights of another model, and where `to`
    holds something.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    check_output("to", to, empty=True)
    if not (vae / "config.json").is_file():
        raise ValueError(f"vae: {vae} is not the folder of a VAE (config.json is missing); give that of stabilityai/sd-vae-ft-ema")
    network, decoder = network_of(weights, heads), AutoencoderKL.from_pretrained(vae, local_files_only=True, use_safetensors=True)
    with atomic_dir(to, "model") as folder:
        network.save_pretrained(folder / "transformer")
        decoder.save_pretrained(folder / "vae")
        FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
