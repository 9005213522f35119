"""`instep sample`: animations of a run's student, or of any pipeline folder, through stock diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import torch
import tyro
from torch import Tensor

from instep.bundled import LISTED, WORLDS, find, folder_of, settings_of
from instep.cli import default_threads
from instep.core.files import atomic_dir, write_json
from instep.core.json_files import read_object
from instep.core.numbers import check_number, check_whole
from instep.core.outputs import check_output
from instep.core.size import Size
from instep.data.animation import FORMATS, save_animation, tile
from instep.data.benchmarks import Layout
from instep.data.prompt import Prompt, with_negative
from instep.models.families import family_class
from instep.models.family import Family
from instep.models.loading import check_folder

DIR_HELP = f"Folder of a run, of an exported student or of a diffusers pipeline; or the name of a bundled model ({LISTED})."


@dataclass(frozen=True)
class SampleArgs:
    """Draw samples of DIR: a run, an exported student, a pipeline folder, or a bundled model (the teacher)."""

    dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=DIR_HELP)]
    prompts: tuple[str, ...] = ()
    """Prompts, each in quotes; for image-to-video each names its first frame: "a cat runs [image: cat.png]". A prompt may have a negative prompt of its own:
    "a cat runs [negative: blurry]". Default, of bundled models and students: a few of their own."""
    negative_prompt: str | None = None
    """Negative prompt for prompts without one of their own; at guidance 1 it has no effect."""
    steps: int | None = None
    """Sampling steps; default: the student's own, and for a pipeline those that its model card gives."""
    guidance: float | None = None
    """Classifier-free guidance; default 1 (none) for a student, and for a pipeline that of its model card."""
    seed: int = 0
    """Seed of torch's global generator, from which pipelines draw their noise."""
    copies: int | None = None
    """Samples a prompt; default 4, and with a layout what its benchmark asks for."""
    each: Path | None = None
    """A new folder for one file a sample and a samples.json, for `instep human-eval`: samples of two models with the same prompts, copies and seed
    are matched. With a layout: the folder that the benchmark's own tool reads."""
    layout: Layout | None = None
    """Samples for a benchmark, named as its own tool expects: vbench and vbench-i2v (mp4), geneval and dpg-bench (png). The same command goes on with the
    samples that are missing."""
    source: Path | None = None
    """With a layout: the benchmark's prompts. vbench: a file with one a line, such as all_dimension.txt; vbench-i2v: vbench2_i2v_full_info.json; geneval:
    evaluation_metadata.jsonl; dpg-bench: the folder with one .txt a prompt."""
    images: Path | None = None
    """With the layout vbench-i2v: the folder of first frames, cropped to the model's shape."""
    fps: float = 8.0
    """With a layout of videos: frames a second of the files."""
    out: Path = Path("samples.webp")
    """File of the animation: one row a prompt, one column a sample."""
    size: tuple[int, int, int] | None = None
    """Height, width, frames; default: the size that the student was trained at."""

    def __post_init__(self) -> None:
        if self.copies is not None:
            check_whole("copies", self.copies, 1)
        check_whole("seed", self.seed, 0)
        if self.steps is not None:
            check_whole("steps", self.steps, 1)
        if self.guidance is not None:
            check_number("guidance", self.guidance, 0, what="it is a finite scale, 0 or more; 1 is none")


def sample_command(args: SampleArgs) -> int:
    """Samples with stock diffusers and writes one animation."""
    copies = 4 if args.copies is None else args.copies
    if args.each is not None:
        check_output("each", args.each)
    check_output("out", args.out, suffixes=tuple(FORMATS))
    folder, record = find_pipeline(args.dir)
    settings = sampling_settings(args.dir, folder, record, args.steps, args.guidance)
    family = family_in(args.dir, folder, record, Size(*args.size) if args.size else None)
    steps, guidance, guidance_2 = settings.steps, settings.guidance, settings.guidance_2
    torch.set_num_threads(default_threads())
    prompts = with_negative([Prompt.parse(prompt) for prompt in args.prompts] or shown_by(args.dir, record), args.negative_prompt)
    torch.manual_seed(args.seed)
    if guidance == 1 and any(prompt.negative for prompt in prompts):
        print("negative prompts have no effect: guidance is 1, which ignores them")
    names = [prompt for prompt in prompts for _ in range(copies)]
    videos = family.stock_sample(family.pipe, names, steps=steps, guidance=guidance, guidance_2=guidance_2, output="media")
    if videos.ndim == 4:
        videos = videos[:, :, None]
    videos = videos.transpose(1, 2)
    shown = (videos.permute(0, 1, 3, 4, 2) * 255).round().to(torch.uint8)
    save_animation(args.out, tile(shown, columns=copies))
    if args.each is not None:
        save_each(args.each, shown, names, copies, args.seed)
        print(f"wrote {len(shown)} samples and samples.json to {args.each}")
    for i, prompt in enumerate(prompts):
        print(f"row {i + 1}: {prompt}")
    print(f"wrote {args.out} ({steps} steps, guidance {guidance:g}{'' if guidance_2 is None else f' and {guidance_2:g}'}, seed {args.seed})")
    return 0


@dataclass(frozen=True)
class Settings:
    """How the stock pipeline samples."""

    steps: int
    guidance: float
    guidance_2: float | None


def sampling_settings(name: str, folder: Path, record: dict | None, steps: int | None, guidance: float | None) -> Settings:
    """The given settings, else a student's own, else those of the model's card, from JSON files alone: nothing is loaded.

    `name`: what the user called the model; `folder` and `record`: what `find_pipeline` found. Raises ValueError for settings that a student cannot be sampled
    with, and for a pipeline that no family knows.
    """
    if record is None:
        known = settings_of(name if name in WORLDS else folder)
        assert known is not None, "find_pipeline refuses what is no model folder"
        preset = known.preset
        return Settings(steps or preset.sampler_steps, preset.guidance if guidance is None else guidance, preset.guidance_2 if guidance is None else None)
    levels, usual = record["levels"], record.get("guidance", 1.0)
    count, scale = len(levels) if steps is None else steps, usual if guidance is None else guidance
    if record.get("guidance_scales") and scale != 1:
        raise ValueError(
            f"guidance: {scale:g} is not allowed; {folder} has its own in its weights, and others come from `instep export RUN --to FOLDER --guidance`"
        )
    if record.get("sampler", "few-step") == "few-step" and count != len(levels):
        raise ValueError(f"steps: {count} does not fit {folder}; its scheduler is solved for exactly {len(levels)}, train another student for {count}")
    return Settings(count, scale, None)


def save_each(folder: Path, videos: Tensor, prompts: Sequence[Prompt], copies: int, seed: int) -> None:
    """Videos uint8 [N, F, H, W, 3] as files, and the manifest that `instep human-eval` reads. Copies of a prompt get consecutive seeds from `seed`."""
    rows = [{"file": f"{i:04d}.webp", "prompt": str(prompt), "seed": seed + i % copies} for i, prompt in enumerate(prompts)]
    with atomic_dir(folder, "samples") as temporary:
        for row, video in zip(rows, videos, strict=True):
            save_animation(temporary / str(row["file"]), video)
        write_json(temporary / "samples.json", rows)


def find_pipeline(name: str) -> tuple[Path, dict | None]:
    """Returns the diffusers folder of `name`, and its export record if it is a student."""
    if name in WORLDS and find(name).pipeline is not None:
        return folder_of(name), None
    folder = folder_of(name) if name in WORLDS else Path(name)
    folder = folder / "student" if (folder / "student" / "model_index.json").is_file() else folder
    parts = next((f for f in (folder / "student", folder) if (f / "transformer").is_dir() and not (f / "model_index.json").is_file()), None)
    if parts is not None:
        raise ValueError(f"dir: {parts} holds a transformer and a scheduler that no stock pipeline samples; the loop that does is in {parts / 'README.md'}")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"dir: {name!r} is neither a finished run, an exported student nor a diffusers pipeline folder; `instep train` makes a run")
    record = folder / "instep_export.json"
    return folder, read_object(record, "dir", "export the student again") if record.is_file() else None


def shown_by(name: str, record: dict | None) -> Sequence[Prompt]:
    """Returns the default prompts: those of a bundled model, also for students of one, or the example prompt of a student's record. Raises ValueError
    for other models.
    """
    base = name if name in WORLDS else record["info"]["base_model"] if record else None
    if base in WORLDS:
        return find(base).shown
    example = Prompt.parse(record["info"]["example_prompt"]) if record else None
    if example is None or example.image is not None:
        raise ValueError(f"prompts: none for {name}; give some with --prompts, each in quotes (only bundled models and students have some of their own)")
    return [example]


def family_in(name: str, folder: Path, record: dict | None, size: Size | None) -> Family:
    """Returns the family of the pipeline in `folder`, at the requested size, else the student's training size, else the model's own."""
    if name in WORLDS:
        return find(name).load(size)
    if size is None and record is not None:
        size = Size(**record["info"]["size"])
    index = read_object(folder / "model_index.json", "dir", "download or export the model again")
    check_folder(folder)
    family = cast(Family, family_class(index.get("_class_name", ""), index).load(folder, size, name))
    base = record["info"]["base_model"] if record is not None else None
    return find(base).adopt(family) if base in WORLDS else family
