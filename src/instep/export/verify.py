"""Does the exported folder, in stock diffusers, draw the same samples as the library's own sampler?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instep.models import VideoSize
from instep.paths import RectifiedFlow
from instep.prediction import Condition, Prediction, read
from instep.quiet import quiet
from instep.rollout import sample_few_step

# (prompts, generator) -> final latents [B, C, F, H, W]; draws x at t_1 first, then one noise a step, all from generator
Sampler = Callable[[Sequence[str], torch.Generator], Tensor]


def smallest_size(pipe: Any) -> VideoSize:
    """A few tokens' worth of video: the identity of two samplers does not depend on the size, its price does."""
    side = 3 * pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1]
    return VideoSize(side, side, 2 * pipe.vae_scale_factor_temporal + 1)


@dataclass(frozen=True, kw_only=True)
class _Text(Condition):
    text: Tensor


def our_sampler(pipe: Any, transformer: nn.Module, levels: Sequence[float], size: VideoSize) -> Sampler:
    """`instep.rollout.sample_few_step` around `transformer`, with the pipeline's text encoding and latent shape."""
    spatial, temporal = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
    shape = (
        transformer.config.in_channels,
        (size.frames - 1) // temporal + 1,
        size.height // spatial,
        size.width // spatial,
    )
    path = RectifiedFlow()

    def denoise(x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        assert isinstance(cond, _Text)
        return read("velocity", transformer(x_t, t * 1000, cond.text, return_dict=False)[0], path, x_t, t)

    @torch.no_grad()
    def sample(prompts: Sequence[str], rng: torch.Generator) -> Tensor:
        text, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=512)
        noise = torch.randn(len(prompts), *shape, generator=rng, device=rng.device)
        return sample_few_step(denoise, _Text(text=text.to(noise)), noise, levels, path, rng)

    return sample


def verify_export(
    folder: Path,
    ours: Sampler | Sequence[float],
    *,
    prompts: Sequence[str] = ("a seven moving left slowly", "a digit"),
    size: VideoSize | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> float:
    """Largest absolute difference of final latents between stock diffusers on `folder`, in float32, and `ours`.

    ours: the student's sampler in memory (then weights and sampler are compared), or the levels (then our sampler runs
    around the folder's own transformer, and the sampler alone is compared). Both see the same noise: the device's
    global generator, seeded with `seed`, because the Wan pipeline does not hand a generator to `scheduler.step`. size
    None: the smallest. device: where `ours` runs. Raises ValueError if the two shapes differ. The global random state is put back.
    """
    from diffusers import DiffusionPipeline

    with quiet():
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    size = size or smallest_size(pipe)
    steps = _steps_of(folder) if callable(ours) else len(ours)
    sampler = ours if callable(ours) else our_sampler(pipe, pipe.transformer, ours, size)
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    index = device.index if device.index is not None else torch.cuda.current_device() if on_gpu else 0
    rng = torch.cuda.default_generators[index] if on_gpu else torch.default_generator
    with torch.random.fork_rng(devices=[index] if on_gpu else []):
        torch.manual_seed(seed)
        stock = pipe(
            list(prompts), height=size.height, width=size.width, num_frames=size.frames, num_inference_steps=steps,
            guidance_scale=1.0, output_type="latent",
        ).frames  # fmt: skip
        torch.manual_seed(seed)
        own = sampler(prompts, rng)
    if own.shape != stock.shape:
        raise ValueError(
            f"ours: latents {list(own.shape)} do not fit the pipeline's {list(stock.shape)}; verify at the size the"
            " sampler draws: size="
        )
    return float((stock.float() - own.float()).abs().max())


def _steps_of(folder: Path) -> int:
    import json

    record = folder / "instep_export.json"
    if not record.is_file():
        raise ValueError(
            f"folder: {folder} has no instep_export.json, so its number of steps is unknown; pass the levels instead of"
            " a sampler"
        )
    return len(json.loads(record.read_text())["levels"])
