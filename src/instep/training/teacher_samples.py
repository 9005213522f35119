"""Samples of the teacher, made once and kept with a run: for methods that need real samples, or noise and what the teacher makes of it
(DMD's regression), where the user has prompts alone.

Every batch is written as a part of its own, so that an interruption loses the batch in progress and nothing else; the parts are joined
at the end.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instep.core.files import write_bytes
from instep.core.progress import Progress
from instep.data.prompt import Prompt, as_prompts
from instep.data.samples import TeacherSamples
from instep.diffusion.guidance import GuidanceByLevel, by_level
from instep.diffusion.prediction import Denoiser
from instep.diffusion.sampling import sample_ode
from instep.models.family import Family
from instep.training.batches import ShuffledIndices

FILE, PARTS = "teacher_samples.safetensors", "teacher_samples.parts"

# key of our record in the header of a safetensors file
RECORD = "teacher_samples"


def teacher_samples(
    folder: Path,
    family: Family,
    teacher: Denoiser,
    prompts: Sequence[Prompt | str],
    *,
    n: int,
    steps: int,
    guidance: float,
    shift: float,
    seed: int,
    guidance_2: float | None = None,
    batch: int = 16,
) -> TeacherSamples:
    """n samples of the teacher on `prompts` in a seeded order, from `folder` if they are there, else made (`rollout.sample_ode`) and kept.

    Prompts are drawn without repetition as long as there are new ones. `steps`, `guidance` (1: none) and `shift` are the sampler's;
    `batch` samples are in memory at a time, and an interrupted call goes on after the last whole batch. The same arguments give the
    same samples, interrupted or not; another `batch` changes them by rounding only. Raises ValueError if `folder` holds samples that
    were made with other arguments.
    """
    prompts = as_prompts(prompts)
    _check(prompts, n=n, steps=steps, guidance=guidance, shift=shift, batch=batch)
    record = {
        "model": family.name,
        "shape": list(family.latent_shape),
        "prompts": hashlib.sha256("\n".join(map(str, prompts)).encode()).hexdigest()[:16],
        "n": n,
        "steps": steps,
        "guidance": float(guidance),
        **({} if guidance_2 is None else {"guidance_2": float(guidance_2)}),
        "shift": float(shift),
        "seed": seed,
    }
    file, parts = folder / FILE, folder / PARTS
    if not file.is_file():
        names = tuple(prompts[i] for i in ShuffledIndices(len(prompts), seed).next(n))
        noise = torch.randn(n, *family.latent_shape, generator=torch.Generator().manual_seed(_stream(seed)))
        made: list[TeacherSamples] = []
        # rows on disk are found again before the bar starts: its time left is that of the work left
        while (part := parts / f"{_rows(made):06d}.safetensors").is_file():
            made.append(_read(part, record, parts))
        with Progress("batches of the teacher's samples", math.ceil((n - _rows(made)) / batch)) as bar:
            while (start := _rows(made)) < n:
                rows = slice(start, start + batch)
                latents = _sample(family, teacher, names[rows], noise[rows], steps=steps, guidance=by_level(guidance, guidance_2, family.boundary), shift=shift)
                made.append(TeacherSamples(names[rows], noise[rows], latents))
                _write(parts / f"{start:06d}.safetensors", record, made[-1])
                bar.step()
        _write(file, record, _joined(made))
    samples = _read(file, record, file)
    shutil.rmtree(parts, ignore_errors=True)
    return samples


def _check(prompts: Sequence[Prompt], *, n: int, steps: int, guidance: float, shift: float, batch: int) -> None:
    if not prompts:
        raise ValueError("prompts: the list is empty; give at least one prompt")
    for name, value in (("n", n), ("steps", steps), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}: {value} is not allowed for samples of the teacher; 1 or more")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance: {guidance} is not allowed; a finite number, 1 for none")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift: {shift} is not allowed; it is positive, 1 for none (the model's own is family.shift)")


def _stream(seed: int) -> int:
    """A generator seed that is used for nothing else: the run's own generator, seeded alike, would draw the very same noise."""
    return int.from_bytes(hashlib.sha256(f"teacher samples {seed}".encode()).digest()[:7])


def _rows(made: Sequence[TeacherSamples]) -> int:
    return sum(len(part.prompts) for part in made)


def _sample(
    family: Family, teacher: Denoiser, names: Sequence[Prompt], noise: Tensor, *, steps: int, guidance: float | GuidanceByLevel, shift: float
) -> Tensor:
    device = family.device
    cond, null = family.encode(names), family.unconditional(names)
    x = sample_ode(teacher, cond, null, noise.to(device), steps=steps, path=family.path, shift=shift, guidance=guidance).cpu()
    if not bool(x.isfinite().all()):
        raise ValueError(f"teacher: its sample for {str(names[0])!r} or a neighbour is not finite; check the model's weights and number format")
    return x


def _joined(made: Sequence[TeacherSamples]) -> TeacherSamples:
    names = tuple(name for part in made for name in part.prompts)
    return TeacherSamples(names, torch.cat([part.noise for part in made]), torch.cat([part.latents for part in made]))


def _write(path: Path, record: Mapping[str, Any], samples: TeacherSamples) -> None:
    """Tensors and what they are in one file, so that the two cannot part."""
    from safetensors.torch import save

    header = {RECORD: json.dumps({**record, "names": list(map(str, samples.prompts))})}
    write_bytes(path, save({"noise": samples.noise.contiguous(), "latents": samples.latents.contiguous()}, header))


def _read(path: Path, record: Mapping[str, Any], remove: Path) -> TeacherSamples:
    """ValueError if the file was made with anything but `record`, naming what to `remove` to make the samples again."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            there = json.loads((file.metadata() or {})[RECORD])
            samples = TeacherSamples(tuple(map(Prompt.parse, there["names"])), file.get_tensor("noise"), file.get_tensor("latents"))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"folder: {path} does not hold samples of a teacher ({error}); remove {remove}, they are made again") from error
    for field, value in record.items():
        if there.get(field) != value:
            what = "the list is not the one" if field == "prompts" else f"{value!r} does not fit {there.get(field)!r},"
            raise ValueError(
                f"{field}: {what} that the samples in {path} were made with; repeat with what was used before, choose another folder, "
                f"or remove {remove} to make them again"
            )
    return samples
