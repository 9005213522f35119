"""`instep sample --layout`: samples of a benchmark's prompts, for its own tool. Each has a seed of its own, and the same command goes on where it stopped."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instep.cli import default_threads
from instep.cli.sample import SampleArgs, Settings, family_in, find_pipeline, sampling_settings
from instep.core.files import write_bytes, write_json, write_text
from instep.core.json_files import read_object
from instep.core.outputs import check_output
from instep.core.progress import Progress
from instep.core.size import Size
from instep.data.animation import check
from instep.data.benchmarks import BENCHMARKS, Item
from instep.data.prompt import Prompt, with_negative
from instep.data.video_file import check_codec, save_video
from instep.models.family import Family


def sample_layout_command(args: SampleArgs) -> int:
    """Draws what is missing. Raises ValueError before anything is drawn: for prompts or a model that do not fit, or samples of other settings."""
    assert args.layout is not None
    if args.each is None or args.source is None:
        missing = "each: a layout needs the folder of its samples; give it with --each" if args.each is None else "source: a layout needs its benchmark's "
        raise ValueError(missing if args.each is None else f"{missing}prompts; give them with --source")
    if args.prompts:
        raise ValueError("prompts: a layout has the prompts of its benchmark; leave the option out, or leave --layout out")
    benchmark = BENCHMARKS[args.layout]
    copies = benchmark.copies if args.copies is None else args.copies
    if copies < 1 or args.fps <= 0:
        raise ValueError(f"copies: {copies} samples at {args.fps:g} frames a second are not allowed; 1 or more, and above 0")
    items = benchmark.items(args.source, copies, args.images)
    prompts = with_negative([item.prompt for item in items], args.negative_prompt)
    if benchmark.video:
        check_codec()
    folder, record = find_pipeline(args.dir)
    settings = sampling_settings(args.dir, folder, record, args.steps, args.guidance)
    family = family_in(args.dir, folder, record, Size(*args.size) if args.size else None)
    _check_family(family, args)
    family.check_prompts(prompts)
    about = {"layout": args.layout, "model": str(folder), "size": list(vars(family.size).values()), **vars(settings), "seed": args.seed, "copies": copies}
    _claim(args.each, about | {"fps": args.fps, "prompts": [str(prompt) for prompt in prompts]})
    torch.set_num_threads(default_threads())
    with Progress("samples", len(items)) as progress:
        for i, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
            _draw(family, settings, item, prompt, args.each, args.seed + i * copies, args.fps)
            progress.step()
    print(f"{len(items)} prompts x {copies} samples are in {args.each}; how they were drawn is in {_record(args.each)}")
    return 0


def _check_family(family: Family, args: SampleArgs) -> None:
    assert args.layout is not None
    if BENCHMARKS[args.layout].video != (family.size.frames > 1):
        kind = "videos" if BENCHMARKS[args.layout].video else "images"
        raise ValueError(f"layout: {args.layout} measures {kind}, and {family.name} draws {family.size.frames} frames; choose another model or --size")
    if args.layout == "dpg-bench" and family.size.height != family.size.width:
        raise ValueError(f"size: {family.size.height} x {family.size.width} is not allowed; DPG-Bench's tool cuts squares out of its grids")


def _record(folder: Path) -> Path:
    """Beside the folder: the tools take every file in it for a sample."""
    return folder.with_name(folder.name + ".json")


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Writes how the samples are drawn; ValueError where there are samples that were drawn otherwise."""
    file = _record(folder)
    if file.is_file():
        there = read_object(file, "each", "choose another folder, or remove this one and draw its samples again")
        if different := [key for key in about if there.get(key) != about[key]]:
            raise ValueError(f"each: {folder} holds samples of another command (their {', '.join(different)} differ); choose another folder")
    elif folder.exists():
        raise ValueError(f"each: {folder} exists, and {file} does not say how its samples were drawn; choose another folder")
    check_output("each", folder, fills=True)
    write_json(file, about)


def _draw(family: Family, settings: Settings, item: Item, prompt: Prompt, folder: Path, seed: int, fps: float) -> None:
    """The samples of a prompt that are not there, one at a time; the k-th from `seed` + k."""
    for name, text in item.beside.items():
        write_text(folder / name, text)
    if item.grid:
        if not (folder / item.files[0]).is_file():
            save_image(folder / item.files[0], two_by_two([_one(family, settings, prompt, seed + k) for k in range(len(item.files))]))
        return
    for k, name in enumerate(item.files):
        if not (folder / name).is_file():
            frames = _one(family, settings, prompt, seed + k)
            save_video(folder / name, frames, fps) if len(frames) > 1 else save_image(folder / name, frames)


def _one(family: Family, settings: Settings, prompt: Prompt, seed: int) -> Tensor:
    """One sample as frames uint8 [F, H, W, 3]."""
    torch.manual_seed(seed)
    drawn = family.stock_sample(family.pipe, [prompt], steps=settings.steps, guidance=settings.guidance, guidance_2=settings.guidance_2, output="media")
    media = drawn[0] if drawn.ndim == 5 else drawn[0][:, None]
    return (media.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 3, 0).cpu()


def two_by_two(images: list[Tensor]) -> Tensor:
    """Four images [1, H, W, 3], row by row, as one."""
    first, second, third, fourth = images
    return torch.cat([torch.cat([first, second], 2), torch.cat([third, fourth], 2)], 1)


def save_image(path: Path, frames: Tensor) -> None:
    """A frame uint8 [1, H, W, 3] as a .png, atomically."""
    from PIL import Image

    check(frames[None])
    buffer = io.BytesIO()
    Image.fromarray(frames[0].numpy()).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
