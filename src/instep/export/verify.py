"""Does the exported folder, in stock diffusers, draw the same samples as the library's own sampler?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instep.core.quiet import quiet
from instep.core.size import VideoSize
from instep.data.first_frame import FirstFrameReader, read_first_frame
from instep.data.prompt import Prompt
from instep.diffusion import path as paths
from instep.diffusion.prediction import Condition, Denoiser, Prediction, to_prediction
from instep.diffusion.sampling import sample_few_step
from instep.models.stock import calls, draw, stock

# (prompts, generator) -> final latents in the pipeline's own order of axes; draws x at t_1 first, then one noise a step, in that order, all from generator
Sampler = Callable[[Sequence[Prompt], torch.Generator], Tensor]


EXAMPLES = (Prompt("a cat runs through snow"), Prompt("a street in the rain"))


def noise_frame(prompt: Prompt, size: VideoSize) -> Tensor:
    """A first frame [3, H, W] in [0, 1] of noise, another one for every prompt: the identity of two samplers does not depend on what it shows."""
    rng = torch.Generator().manual_seed(len(prompt.text))
    return torch.rand(3, size.height, size.width, generator=rng)


def smallest_size(pipe: Any) -> VideoSize:
    """A few tokens' worth of video: the identity of two samplers does not depend on the size, its price does."""
    return stock(pipe).smallest()


@torch.no_grad()
def sample_as_stock(
    denoiser: Denoiser, cond: Condition, shape: Sequence[int], levels: Sequence[float], path: paths.Path, rng: torch.Generator, axes: tuple[int, ...]
) -> Tensor:
    """`sample_few_step` of len(cond) samples of `shape` with its noise drawn, and its result given, in a pipeline's order of axes (`Stock.axes`)."""
    back = [axes.index(i) for i in range(len(axes))]

    def turned(x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        answer = denoiser(x_t.permute(back), t, cond)
        return Prediction(answer.x0.permute(axes), answer.v.permute(axes))

    whole = (len(cond), *shape)
    noise = torch.randn([whole[i] for i in axes], generator=rng, device=rng.device)
    return sample_few_step(turned, cond, noise, levels, path, rng)


def our_sampler(pipe: Any, transformer: nn.Module, levels: Sequence[float], size: VideoSize, first_frame: FirstFrameReader = read_first_frame) -> Sampler:
    """`instep.diffusion.sampling.sample_few_step` around `transformer`, with the pipeline's text encoding and latent shape."""
    how = stock(pipe)

    def denoise(x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return to_prediction(how.prediction_type, how.forward(transformer, x_t, t, cond), how.path, x_t, t)

    def sample(prompts: Sequence[Prompt], rng: torch.Generator) -> Tensor:
        return sample_as_stock(denoise, how.encode(prompts, size, first_frame).to(rng.device), how.latent_shape(size), levels, how.path, rng, how.axes)

    return sample


def verify_export(
    folder: Path,
    ours: Sampler | Sequence[float],
    *,
    prompts: Sequence[Prompt | str] | None = None,
    size: VideoSize | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    first_frame: FirstFrameReader = read_first_frame,
) -> float:
    """Largest absolute difference of final latents between stock diffusers on `folder`, in float32, and `ours`.

    ours: the student's sampler in memory (then weights and sampler are compared), or the levels (then our sampler runs
    around the folder's own transformer, and the sampler alone is compared). Both see the same noise: the device's
    global generator, seeded with `seed` (one more for each further call, where a call takes one first frame), because the Wan
    pipeline does not hand a generator to `scheduler.step`. prompts None: two texts, for an image-to-video pipeline with
    first frames of noise; those of other prompts are read by `first_frame`. size None: the smallest. device: where `ours` runs. Raises
    ValueError if the two shapes differ. The global random state is put back.
    """
    from diffusers import DiffusionPipeline

    with quiet():
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    size = size or smallest_size(pipe)
    if prompts is None:
        prompts, first_frame = EXAMPLES, noise_frame
    steps = _steps_of(folder) if callable(ours) else len(ours)
    sampler = ours if callable(ours) else our_sampler(pipe, pipe.transformer, ours, size, first_frame)
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    index = device.index if device.index is not None else torch.cuda.current_device() if on_gpu else 0
    rng = torch.cuda.default_generators[index] if on_gpu else torch.default_generator
    with torch.random.fork_rng(devices=[index] if on_gpu else []):
        both = []
        for i, names in enumerate(calls(pipe, prompts)):
            torch.manual_seed(seed + i)
            stock_draws = draw(pipe, names, size, steps=steps, guidance=1.0, output="latent", first_frame=first_frame)
            torch.manual_seed(seed + i)
            both.append((stock_draws, sampler(names, rng)))
    theirs, own = (torch.cat(parts) for parts in zip(*both, strict=True))
    if own.shape != theirs.shape:
        raise ValueError(f"ours: latents {list(own.shape)} do not fit the pipeline's {list(theirs.shape)}; verify at the size the sampler draws: size=")
    return float((theirs.float() - own.float()).abs().max())


def _steps_of(folder: Path) -> int:
    import json

    record = folder / "instep_export.json"
    if not record.is_file():
        raise ValueError(f"folder: {folder} has no instep_export.json, so its number of steps is unknown; pass the levels instead of a sampler")
    return len(json.loads(record.read_text())["levels"])
