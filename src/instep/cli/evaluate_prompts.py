"""`instep eval --prompts`: any run, student or pipeline on a user's own prompts, by rewards and by distances to given data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from instep.cli import checked_device, default_threads
from instep.cli.evaluate import EvalArgs, Measured, print_rows
from instep.cli.measured_model import check_model, open_model
from instep.cli.rewards import load_reward
from instep.core.files import write_json
from instep.core.outputs import check_output
from instep.core.progress import Progress
from instep.core.size import Size
from instep.data.clips import read_clip
from instep.data.prompt import Prompt, load_prompts
from instep.data.real_files import RealFile, real_files
from instep.metrics.any_model import NEIGHBOURS, Given, Networks, Seen, columns, gathered, measures, observe
from instep.metrics.compare import Row
from instep.metrics.figures import Value
from instep.metrics.image_features import frame_features
from instep.metrics.win_rate import win_rate
from instep.rewards.base import Reward, as_reward
from instep.rewards.dinov2 import dinov2
from instep.rewards.several import parts_of

BATCH = 8  # files of given data that are read at once


@dataclass(frozen=True)
class Protocol:
    """What every model is measured by."""

    prompts: tuple[Prompt, ...]
    copies: int
    seed: int
    reward: Reward | None
    networks: Networks
    files: tuple[RealFile, ...]
    fps: float
    device: str


def eval_prompts_command(args: EvalArgs) -> int:
    """Measures each of `args.dirs`, prints a table, and writes rows and protocol to `args.out`."""
    torch.set_num_threads(default_threads())
    protocol = protocol_of(args)
    given: dict[Size, Given] = {}
    found = [measured(str(folder), args, protocol, given) for folder in args.dirs]
    rows = [row for row, _ in found]
    compared = wins(rows, [seen for _, seen in found], protocol)
    shown = tuple(column for column in columns(protocol.reward, protocol.networks) if any(column.key in row.values for row in rows))
    about = {
        "prompts": [str(prompt) for prompt in protocol.prompts],
        "copies": protocol.copies,
        "seed": protocol.seed,
        "reward": protocol.reward and protocol.reward.name,
        "features": protocol.networks.features and protocol.networks.features.name,
        "classifier": protocol.networks.classifier and protocol.networks.classifier.name,
        "given": len(protocol.files),
    }
    write_json(args.out, {"protocol": about, "columns": [column.json() for column in shown], "rows": [row.json() for row in rows], "wins": compared})
    print_rows(Measured(rows, shown))
    for win in compared:
        share, low, high = (100 * win[key] for key in ("value", "low", "high"))
        print(f"{win['model']} has more {win['reward']} than {win['against']} in {share:.0f} % of pairs (95 % interval {low:.0f} to {high:.0f} %)")
    print(f"wrote {args.out}")
    return 0


def protocol_of(args: EvalArgs) -> Protocol:
    """Loads prompts, rewards and given data. Raises ValueError for what is missing or does not fit, before anything is sampled."""
    assert args.prompts is not None
    if not args.dirs:
        raise ValueError("dirs: none was given; give the folder of a run, a student or a pipeline, or the name of a bundled model")
    check_output("out", args.out)
    prompts = tuple(load_prompts(args.prompts))
    if len(prompts) * args.copies < 4:
        raise ValueError(f"copies: {len(prompts)} prompts x {args.copies} are too few for a standard error; draw 4 samples or more")
    files = tuple(real_files(args.real)) if args.real else ()
    if files and (args.features is None or min(len(files), len(prompts) * args.copies // 2) <= NEIGHBOURS):
        what = "features: none were given" if args.features is None else f"real: {len(files)} files and {len(prompts) * args.copies} samples are too few"
        raise ValueError(f"{what}; distances to given data need --features clip, dinov2 or a folder, and more than {2 * NEIGHBOURS + 1} of each")
    for name in args.dirs:
        check_model(str(name), prompts, _size(args), args.steps, args.guidance)
    reward = as_reward(load_reward(args.reward)) if args.reward else None
    networks = Networks(
        frame_features(args.features) if args.features else None,
        dinov2(None if args.classifier == "dinov2" else Path(args.classifier), "classifier") if args.classifier else None,
        bool(files),
    )
    return Protocol(prompts, args.copies, args.seed, reward, networks, files, args.real_fps, checked_device(args.device))


@torch.no_grad()
def measured(name: str, args: EvalArgs, protocol: Protocol, given: dict[Size, Given]) -> tuple[Row, Seen]:
    """One model's row, and what was seen of each sample; its samples are drawn and measured prompt by prompt. `given`: features of the given data at the
    sizes that were read already."""
    model = open_model(name, _size(args), args.steps, args.guidance, protocol.device)
    size, settings = model.family.size, model.settings
    if protocol.files and size not in given:
        given[size] = given_features(protocol, size)
    parts, seconds = [], 0.0
    with Progress(name, len(protocol.prompts)) as progress:
        for i, prompt in enumerate(protocol.prompts):
            start = time.perf_counter()
            names = [prompt] * protocol.copies
            media = model(names, protocol.seed + i)
            seconds += time.perf_counter() - start
            parts.append(observe(media.float().to(protocol.device), names, protocol.reward, protocol.networks))
            progress.step()
    seen = gathered(parts)
    values = measures(seen, protocol.copies, given.get(size)) | {"seconds": Value(seconds / len(protocol.prompts) / protocol.copies, 0.0)}
    nfe = settings.steps * (2 if settings.guidance != 1 else 1)
    return Row(Path(name).name, "student" if model.record else "teacher", values, nfe, settings.steps, settings.guidance, _count(seen)), seen


def wins(rows: Sequence[Row], seen: Sequence[Seen], protocol: Protocol) -> list[dict[str, Any]]:
    """How often each model after the first has a higher reward than the first, on the same prompts and seeds."""
    prompt, found = torch.arange(len(protocol.prompts) * protocol.copies) // protocol.copies, []
    for i, part in enumerate(parts_of(protocol.reward) if protocol.reward is not None else ()):
        key = f"reward_{i}"
        for row, one in zip(rows[1:], seen[1:], strict=True):
            rate = win_rate(one.values[key], seen[0].values[key], prompt)
            found.append({"reward": part.name, "model": row.name, "against": rows[0].name, **asdict(rate)})
    return found


def given_features(protocol: Protocol, size: Size) -> Given:
    """Features of the given data, read at the model's size and rate, a few files at a time."""
    network = protocol.networks.features
    assert network is not None
    found, spatial = [], []
    with Progress("given data", len(protocol.files)) as progress:
        for part in _split(protocol.files):
            media = torch.stack([read_clip(file, size, protocol.fps) for file in part])
            found.append(network(media.to(protocol.device)).mean(1))
            if protocol.networks.spatial and size.frames == 1:
                spatial.append(network.spatial(media[:, :, 0].to(protocol.device)))
            for _ in part:
                progress.step()
    return Given(torch.cat(found), torch.cat(spatial) if spatial else None)


def _size(args: EvalArgs) -> Size | None:
    return Size(*args.size) if args.size else None


def _split(files: Sequence[RealFile]) -> list[Sequence[RealFile]]:
    return [files[start : start + BATCH] for start in range(0, len(files), BATCH)]


def _count(seen: Seen) -> int:
    return len(next(iter(seen.values.values())))
