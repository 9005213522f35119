"""Checks that an exported folder, in stock diffusers, draws the same samples as the library's own sampler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.core.unusable import Unusable
from instep.data.prompt import Prompt, as_prompts
from instep.diffusion.prediction import Condition, Denoiser, Prediction
from instep.diffusion.sampling import sample_few_step
from instep.export.load import load_pipeline
from instep.models.backbone import Backbone
from instep.models.families import family_of
from instep.models.family import Family
from instep.models.role import Role

# (prompts, generator) -> final latents in the pipeline's own layout; draws x at t_1 first, then one noise a step, in that order, all from generator
Sampler = Callable[[Sequence[Prompt], torch.Generator], Tensor]


EXAMPLES = ("a cat runs through snow", "a street in the rain")
EARLIER = "export an earlier checkpoint, or train anew with a lower learning rate"


@dataclass(frozen=True)
class Latents:
    """Final latents of the same prompts and noise, each [B, ...] in the pipeline's layout: `stock` of stock diffusers on a folder, `folder` of our
    sampler on the folder's network, `narrow` of that sampler and network in the student's own dtype (None where this is not less than float32)."""

    stock: Tensor
    folder: Tensor
    narrow: Tensor | None = None


def examples(family: Family, folder: FilePath) -> list[Prompt]:
    """Two prompts that any text model takes; for image-to-video models with first frames of noise, which are written into `folder`."""
    if family.task == "class-to-image":
        return [Prompt("0"), Prompt("1")]
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
def sample_as_stock(denoiser: Denoiser, family: Family, cond: Condition, levels: Sequence[float], rng: torch.Generator) -> Tensor:
    """`sample_few_step` of len(cond) samples with the noise that the family's stock pipeline draws, and the result in the layout that it steps."""

    def turned(x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        answer = denoiser(family.own_latents(x_t), t, cond)
        return Prediction(family.stock_latents(answer.x0), family.stock_latents(answer.v))

    noise = family.stock_latents(family.first_noise(len(cond), rng))
    return sample_few_step(turned, cond, noise, levels, family.path, rng)


def our_sampler(family: Family, network: nn.Module, levels: Sequence[float]) -> Sampler:
    """The library's own few-step sampler around a plain `network` of the family, at the family's size."""
    return role_sampler(family, Role("student", Backbone(family, network)), levels)


def role_sampler(family: Family, student: Denoiser, levels: Sequence[float]) -> Sampler:
    """The library's own few-step sampler of a student, at the family's size."""

    def sample(prompts: Sequence[Prompt], rng: torch.Generator) -> Tensor:
        return sample_as_stock(student, family, family.encode(prompts).to(rng.device), levels, rng)

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
    sampler alone is compared). A student in memory that computes in less than float32 differs by that as well. family: that of the folder's pipeline; None
    detects it. Both sides see the same noise: the device's global generator, seeded with `seed` (plus 1 for each further call, where a call takes one first
    frame), because some pipelines do not pass a generator to `scheduler.step`. prompts None: two texts, with first frames of noise where the model takes
    them. size None: the smallest. device: where `ours` runs. Needs the memory of the whole pipeline in float32. Raises ValueError if the two shapes differ. The
    global random state is restored.
    """
    pipe = load_pipeline(folder, device)
    there: Family = family_of(pipe) if family is None else family.with_pipe(pipe, family.size)
    there = there.at(size or there.smallest())
    steps = steps_of(folder) if callable(ours) else len(ours)
    with tempfile.TemporaryDirectory() as images:
        asked = examples(there, FilePath(images)) if prompts is None else list(as_prompts(prompts))
        stock = draw(stock_sampler(there, pipe, steps), there, asked, device, seed)
        # after the stock samples, because our sampler replaces the stock attention
        mine = draw(ours if callable(ours) else our_sampler(there, there.pretrained, ours), there, asked, device, seed)
    return difference(stock, mine)


def draw_latents(
    folder: FilePath,
    family: Family,
    prompts: Sequence[Prompt],
    levels: Sequence[float],
    device: torch.device,
    dtype: torch.dtype | None,
    narrow: Mapping[str, Mapping[str, torch.dtype]] | None,
) -> Latents:
    """Samples of an export at the family's size, one after the other on one copy of its networks.

    dtype: that of the export, None for an unchanged one. narrow: the dtypes of the student's parameters in memory, by part and name, if it computes in less
    than float32.

    Needs the memory of the folder's denoisers in float32, twice that of bfloat16 weights, whatever the folder holds
    them in. Text encoders and VAE that were written as they are (`dtype` None) in float32 on `device` are not loaded again; others are loaded in float32 too.
    Activations are those of the family's size.
    """
    pipe = load_pipeline(folder, device, {} if dtype else unchanged(family, device))
    there = family.with_pipe(pipe, family.size)
    stock = draw(stock_sampler(there, pipe, len(levels)), there, prompts, device)
    own = draw(our_sampler(there, there.pretrained, levels), there, prompts, device)
    if narrow is None:
        return Latents(stock, own)
    # exact: float32 holds every value of the narrow weights
    for name, part in there.parts(there.pretrained).items():
        for key, p in part.named_parameters():
            p.data = p.data.to(narrow[name][key])
    # with the text encoder in memory, too: nothing but the network is the folder's
    return Latents(stock, own, draw(our_sampler(family, there.pretrained, levels), family, prompts, device))


def unchanged(family: Family, device: torch.device) -> dict[str, nn.Module]:
    """The frozen networks in memory that stand for those of a folder, which hold the same values."""
    frozen = {name: part for name, part in family.pipe.components.items() if isinstance(part, nn.Module) and name not in family.denoisers}
    return {name: part for name, part in frozen.items() if all(p.dtype == torch.float32 and p.device == device for p in part.parameters())}


def stock_sampler(family: Family, pipe: Any, steps: int, guidance: float = 1.0) -> Sampler:
    """The stock pipeline as a sampler. It draws from the device's global generator."""
    return lambda prompts, rng: family.stock_sample(pipe, prompts, steps=steps, guidance=guidance, output="latent")


@torch.no_grad()
def draw(sampler: Sampler, family: Family, prompts: Sequence[Prompt], device: torch.device | str, seed: int = 0) -> Tensor:
    """Final latents of a sampler, one call of the stock pipeline after the other (`Family.calls`), each from its own seed of the global generator."""
    drawn = []
    with global_generator(torch.device(device)) as rng:
        for i, group in enumerate(family.calls(prompts)):
            torch.manual_seed(seed + i)
            drawn.append(sampler(group, rng))
    return torch.cat(drawn)


def difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference of two sets of latents; ValueError if their shapes differ."""
    if one.shape != other.shape:
        raise ValueError(f"ours: latents {list(other.shape)} do not fit the pipeline's {list(one.shape)}; verify at the size the sampler draws: size=")
    return float((one.float() - other.float()).abs().max())


def check_samples(what: str, latents: Tensor, fix: str) -> None:
    """Raises Unusable if latents are not finite."""
    if not bool(latents.isfinite().all()):
        raise Unusable(f"samples: those of {what} hold values that are not finite, and nothing was written; {fix}")


@contextmanager
def global_generator(device: torch.device) -> Iterator[torch.Generator]:
    """The global generator of a device, whose state is restored afterwards."""
    if device.type != "cuda":
        with torch.random.fork_rng(devices=[]):
            yield torch.default_generator
        return
    index = device.index if device.index is not None else torch.cuda.current_device()
    with torch.random.fork_rng(devices=[index]):
        yield torch.cuda.default_generators[index]


def steps_of(folder: FilePath) -> int:
    record = folder / "instep_export.json"
    if not record.is_file():
        raise ValueError(f"folder: {folder} has no instep_export.json, so its number of steps is unknown; pass the levels instead of a sampler")
    return len(json.loads(record.read_text())["levels"])
