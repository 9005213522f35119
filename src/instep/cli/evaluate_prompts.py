"""`instep eval --prompts`: any run, student or pipeline on a user's own prompts, by rewards and by distances to given data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from instep.bundled import WORLDS
from instep.cli import checked_device, default_threads
from instep.cli.evaluate import EvalArgs, Measured, print_rows
from instep.cli.rewards import load_reward
from instep.cli.sample import family_in, find_pipeline, settings_of
from instep.core.files import check_writable, write_json
from instep.core.progress import Progress
from instep.core.size import Size
from instep.data.clips import read_clip
from instep.data.prompt import Prompt, load_prompts
from instep.data.real_files import RealFile, real_files
from instep.metrics.any_model import NEIGHBOURS, Seen, columns, gathered, measures, observe
from instep.metrics.compare import Row
from instep.metrics.figures import Value
from instep.metrics.image_features import FrameFeatures, frame_features
from instep.models.folder import check_weights
from instep.models.outline import outline
from instep.rewards.base import Reward, as_reward

BATCH = 8  # files of given data that are read at once


@dataclass(frozen=True)
class Protocol:
    """What every model is measured by."""

    prompts: tuple[Prompt, ...]
    copies: int
    seed: int
    reward: Reward | None
    network: FrameFeatures | None
    files: tuple[RealFile, ...]
    fps: float
    device: str


def eval_prompts_command(args: EvalArgs) -> int:
    """Measures each of `args.dirs`, prints a table, and writes rows and protocol to `args.out`."""
    torch.set_num_threads(default_threads())
    protocol = protocol_of(args)
    given: dict[Size, Tensor] = {}
    rows = [measured(str(folder), args, protocol, given) for folder in args.dirs]
    shown = tuple(column for column in columns(protocol.reward, protocol.network) if any(column.key in row.values for row in rows))
    about = {
        "prompts": [str(prompt) for prompt in protocol.prompts],
        "copies": protocol.copies,
        "seed": protocol.seed,
        "reward": protocol.reward and protocol.reward.name,
        "features": protocol.network and protocol.network.name,
        "given": len(protocol.files),
    }
    write_json(args.out, {"protocol": about, "columns": [column.json() for column in shown], "rows": [row.json() for row in rows]})
    print_rows(Measured(rows, shown))
    print(f"wrote {args.out}")
    return 0


def protocol_of(args: EvalArgs) -> Protocol:
    """Loads prompts, rewards and given data. Raises ValueError for what is missing or does not fit, before anything is sampled."""
    assert args.prompts is not None
    if not args.dirs:
        raise ValueError("dirs: none was given; give the folder of a run, a student or a pipeline, or the name of a bundled model")
    if args.out.exists():
        raise ValueError(f"out: {args.out} exists; choose another name with --out, nothing is overwritten unasked")
    check_writable(args.out, "out")
    prompts = tuple(load_prompts(args.prompts))
    if len(prompts) * args.copies < 4:
        raise ValueError(f"copies: {len(prompts)} prompts x {args.copies} are too few for a standard error; draw 4 samples or more")
    files = tuple(real_files(args.real)) if args.real else ()
    if files and (args.features is None or min(len(files), len(prompts) * args.copies // 2) <= NEIGHBOURS):
        what = "features: none were given" if args.features is None else f"real: {len(files)} files and {len(prompts) * args.copies} samples are too few"
        raise ValueError(f"{what}; distances to given data need --features clip, dinov2 or a folder, and more than {2 * NEIGHBOURS + 1} of each")
    for name in args.dirs:
        check_model(str(name), args, prompts)
    reward = as_reward(load_reward(args.reward)) if args.reward else None
    network = frame_features(args.features) if args.features else None
    return Protocol(prompts, args.copies, args.seed, reward, network, files, args.real_fps, checked_device(args.device))


def check_model(name: str, args: EvalArgs, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError for a model that could not be measured, from its configurations alone: nothing is sampled, and no weights of a folder are read."""
    folder, record = find_pipeline(name)
    size = Size(*args.size) if args.size else Size(**record["info"]["size"]) if record else None
    small = name in WORLDS or (record is not None and record["info"]["base_model"] in WORLDS)
    if not small:
        check_weights(folder)
    # bundled models, and students of one, have first frames of their own and are small
    family = family_in(name, folder, record, size) if small else outline(folder, size)
    family.check_prompts(prompts)
    settings_of(folder, record, family, args.steps, args.guidance)


@torch.no_grad()
def measured(name: str, args: EvalArgs, protocol: Protocol, given: dict[Size, Tensor]) -> Row:
    """One model's row; its samples are drawn and measured prompt by prompt. `given`: features of the given data at the sizes that were read already."""
    folder, record = find_pipeline(name)
    family = family_in(name, folder, record, Size(*args.size) if args.size else None)
    settings = settings_of(folder, record, family, args.steps, args.guidance)
    family.pipe.to(protocol.device)
    if protocol.files and family.size not in given:
        given[family.size] = given_features(protocol, family.size)
    parts, seconds = [], 0.0
    with Progress(name, len(protocol.prompts)) as progress:
        for i, prompt in enumerate(protocol.prompts):
            torch.manual_seed(protocol.seed + i)
            start = time.perf_counter()
            names = [prompt] * protocol.copies
            media = family.stock_sample(
                family.pipe, names, steps=settings.steps, guidance=settings.guidance, guidance_2=settings.guidance_2, output="media"
            ).clamp(0, 1)
            seconds += time.perf_counter() - start
            parts.append(observe(media.float().to(protocol.device), names, protocol.reward, protocol.network))
            progress.step()
    seen = gathered(parts)
    values = measures(seen, protocol.copies, given.get(family.size)) | {"seconds": Value(seconds / len(protocol.prompts) / protocol.copies, 0.0)}
    nfe = settings.steps * (2 if settings.guidance != 1 else 1)
    return Row(Path(name).name, "student" if record else "teacher", values, nfe, settings.steps, settings.guidance, _count(seen))


def given_features(protocol: Protocol, size: Size) -> Tensor:
    """Features [M, D] of the given data, read at the model's size and rate, a few files at a time."""
    assert protocol.network is not None
    found = []
    with Progress("given data", len(protocol.files)) as progress:
        for part in _split(protocol.files):
            media = torch.stack([read_clip(file, size, protocol.fps) for file in part])
            found.append(protocol.network(media.to(protocol.device)).mean(1))
            for _ in part:
                progress.step()
    return torch.cat(found)


def _split(files: Sequence[RealFile]) -> list[Sequence[RealFile]]:
    return [files[start : start + BATCH] for start in range(0, len(files), BATCH)]


def _count(seen: Seen) -> int:
    return len(next(iter(seen.values.values())))
