"""Checks that an exported folder, in stock diffusers, draws the same samples as the library's own sampler."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath

import torch
from torch import Tensor, nn

from instep.core.quiet import quiet
from instep.core.size import Size
from instep.data.prompt import Prompt, as_prompts
from instep.diffusion.path import Path
from instep.diffusion.prediction import Condition, Denoiser, Prediction
from instep.diffusion.sampling import sample_few_step
from instep.models.backbone import Backbone
from instep.models.families import family_of
from instep.models.family import Family
from instep.models.role import Role

# (prompts, generator) -> final latents in the pipeline's own order of axes; draws x at t_1 first, then one noise a step, in that order, all from generator
Sampler = Callable[[Sequence[Prompt], torch.Generator], Tensor]


EXAMPLES = ("a cat runs through snow", "a street in the rain")


def examples(family: Family, folder: FilePath) -> list[Prompt]:
    """Two prompts that any text model takes; for image-to-video models with first frames of noise, which are written into `folder`."""
    if not family.takes_first_frame:
        return [Prompt(text) for text in EXAMPLES]
    from PIL import Image

    rng, prompts = torch.Generator().manual_seed(0), []
    for i, text in enumerate(EXAMPLES):
        noise = torch.randint(256, (family.size.height, family.size.width, 3), generator=rng, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
        prompts.append(Prompt(text, image=folder / f"{i}.png"))
    return prompts


@torch.no_grad()
def sample_as_stock(
    denoiser: Denoiser, cond: Condition, shape: Sequence[int], levels: Sequence[float], path: Path, rng: torch.Generator, axes: tuple[int, ...]
) -> Tensor:
    """`sample_few_step` of len(cond) samples of `shape` with noise and result in a pipeline's order of axes (`Family.axes`)."""
    back = [axes.index(i) for i in range(len(axes))]

    def turned(x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        answer = denoiser(x_t.permute(back), t, cond)
        return Prediction(answer.x0.permute(axes), answer.v.permute(axes))

    whole = (len(cond), *shape)
    noise = torch.randn([whole[i] for i in axes], generator=rng, device=rng.device)
    return sample_few_step(turned, cond, noise, levels, path, rng)


def our_sampler(family: Family, network: nn.Module, levels: Sequence[float]) -> Sampler:
    """The library's own few-step sampler around a plain `network` of the family, at the family's size."""
    student = Role("student", Backbone(family, network))

    def sample(prompts: Sequence[Prompt], rng: torch.Generator) -> Tensor:
        return sample_as_stock(student, family.encode(prompts).to(rng.device), family.latent_shape, levels, family.path, rng, family.axes)

    return sample


def verify_export(
    folder: FilePath,
    ours: Sampler | Sequence[float],
    *,
    family: Family | None = None,
    prompts: Sequence[Prompt | str] | None = None,
    size: Size | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> float:
    """Largest absolute difference of final latents between stock diffusers on `folder`, in float32, and `ours`.

    ours: the student's sampler in memory (then weights and sampler are compared), or the levels (then our sampler runs around the folder's own network, and the
    sampler alone is compared). family: that of the folder's pipeline; None detects it. Both sides see the same noise: the device's global generator,
    seeded with `seed` (plus 1 for each further call, where a call takes one first frame), because some pipelines do not pass a generator to
    `scheduler.step`. prompts None: two texts, with first frames of noise where the model takes them. size None: the smallest. device: where `ours` runs.
    Raises ValueError if the two shapes differ. The global random state is restored.
    """
    from diffusers import DiffusionPipeline

    with quiet():
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    there: Family = family_of(pipe) if family is None else family.with_pipe(pipe, family.size)
    there = there.at(size or there.smallest())
    steps = _steps_of(folder) if callable(ours) else len(ours)
    rng, devices = _global_generator(torch.device(device))
    with tempfile.TemporaryDirectory() as images, torch.random.fork_rng(devices=devices):
        asked = examples(there, FilePath(images)) if prompts is None else as_prompts(prompts)
        groups = there.calls(asked)
        theirs = []
        for i, group in enumerate(groups):
            torch.manual_seed(seed + i)
            theirs.append(there.stock_sample(pipe, group, steps=steps, guidance=1.0, output="latent"))
        # after the stock samples, because our sampler replaces the stock attention
        sampler = ours if callable(ours) else our_sampler(there, there.pretrained, ours)
        own = []
        for i, group in enumerate(groups):
            torch.manual_seed(seed + i)
            own.append(sampler(group, rng))
    stock, mine = torch.cat(theirs), torch.cat(own)
    if mine.shape != stock.shape:
        raise ValueError(f"ours: latents {list(mine.shape)} do not fit the pipeline's {list(stock.shape)}; verify at the size the sampler draws: size=")
    return float((stock.float() - mine.float()).abs().max())


def _global_generator(device: torch.device) -> tuple[torch.Generator, list[int]]:
    """Returns the global generator of a device, and the devices whose random state must be restored."""
    if device.type != "cuda":
        return torch.default_generator, []
    index = device.index if device.index is not None else torch.cuda.current_device()
    return torch.cuda.default_generators[index], [index]


def _steps_of(folder: FilePath) -> int:
    import json

    record = folder / "instep_export.json"
    if not record.is_file():
        raise ValueError(f"folder: {folder} has no instep_export.json, so its number of steps is unknown; pass the levels instead of a sampler")
    return len(json.loads(record.read_text())["levels"])
