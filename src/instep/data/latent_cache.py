"""Real samples as latents, made once and kept on disk: one safetensors file that is filled in place, so that an interrupted run goes on where it stopped, and
that is mapped into memory, so that a run reads the rows of its batches alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instep.core.files import write_error, write_json
from instep.core.progress import Progress
from instep.data.clips import read_clip
from instep.data.media import EncodesMedia
from instep.data.prompt import Prompt
from instep.data.real_files import RealFile
from instep.data.samples import RealSamples

FOLDER = "real"  # in the folder of a run
NAME, RECORD = "latents.safetensors", "latents.json"
BATCH = 8  # files that are decoded, encoded and flushed together


@torch.no_grad()
def real_samples(files: Sequence[RealFile], family: EncodesMedia, cache: Path, fps: float = 16.0) -> RealSamples:
    """The files as latents of `family`, float32, from `cache` as far as it holds them.

    For an image-to-video family the first frame of a sample is that of its file, unless the prompt names one. `fps`: frames a second of the model's videos.
    Raises ValueError for a file that does not fit, and where the cache holds other files, another size or the latents of another encoder.
    """
    if not (0 < fps < math.inf):
        raise ValueError(f"real_fps: {fps} is not allowed; the frames a second of the model's videos, above 0")
    probe = _encode(family, torch.rand(1, 3, family.size.frames, family.size.height, family.size.width, generator=torch.Generator().manual_seed(0)))[0]
    record: dict[str, Any] = {
        "files": _digest(files),
        "count": len(files),
        "size": asdict(family.size),
        "fps": fps,
        "shape": list(probe.shape),
        # of seeded noise, so that latents of another encoder are told apart on any device
        "encoder": [round(float(value), 4) for value in (probe.mean(), probe.std(), *probe.flatten()[:: max(1, probe.numel() // 14)][:14])],
    }
    done = _begin(cache, record)
    rows = mapped(cache / NAME, "r+")
    with Progress("real samples", len(files)) as progress:
        for start in range(0, len(files), BATCH):
            part = files[start : start + BATCH]
            if start >= done:
                media = torch.stack([read_clip(file.path, family.size, fps) for file in part])
                rows[start : start + len(part)] = _encode(family, media).numpy()
                _flush(rows, cache)
                write_json(cache / RECORD, record | {"done": start + len(part)})
            for _ in part:
                progress.step()
    del rows
    prompts = [Prompt.parse(file.prompt) for file in files]
    if family.takes_first_frame:
        prompts = [prompt if prompt.image is not None else replace(prompt, image=file.path) for prompt, file in zip(prompts, files, strict=True)]
    return RealSamples(tuple(prompts), torch.from_numpy(mapped(cache / NAME, "c")))


def mapped(file: Path, mode: Any) -> np.memmap:
    """The one tensor of a safetensors file, float32, mapped into memory; mode r+ writes to it, c gives a copy of the pages that are written to."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entry = json.loads(opened.read(length))["latents"]
    return np.memmap(file, np.float32, mode, 8 + length, tuple(entry["shape"]))


def _begin(cache: Path, record: dict[str, Any]) -> int:
    """How many files the cache holds already; a new one gets its file in full length. Raises ValueError for the cache of something else."""
    if (cache / RECORD).is_file():
        there = json.loads((cache / RECORD).read_text(encoding="utf-8"))
        different = [key for key in record if key != "encoder" and there.get(key) != record[key]]
        if len(there["encoder"]) != len(record["encoder"]) or not np.allclose(there["encoder"], record["encoder"], atol=0.05):
            different.append("encoder")
        if different:
            raise ValueError(f"real: {cache} holds the latents of others (their {', '.join(different)} differ); choose another folder, or remove it")
        return int(there["done"])
    shape = [record["count"], *record["shape"]]
    size = 4 * math.prod(shape)
    header = json.dumps({"latents": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / NAME, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            # allocated now: a full disk is no error in a mapped file, but kills the process
            os.posix_fallocate(file.fileno(), 0, 8 + len(header) + size) if hasattr(os, "posix_fallocate") else file.truncate(8 + len(header) + size)
    except OSError as error:
        (cache / NAME).unlink(missing_ok=True)
        raise write_error(error, f"the latents {cache / NAME}", "nothing else was touched") from error
    write_json(cache / RECORD, record | {"done": 0})
    return 0


def _flush(rows: np.memmap, cache: Path) -> None:
    try:
        rows.flush()
    except OSError as error:
        raise write_error(error, f"the latents {cache / NAME}", "those before are kept") from error


def _encode(family: EncodesMedia, media: Tensor) -> Tensor:
    """Media [B, 3, F, H, W] to latents on the CPU, float32."""
    given = (media if family.size.frames > 1 else media[:, :, 0]).to(family.device)
    return family.encode_media(given).float().cpu()


def _digest(files: Sequence[RealFile]) -> str:
    """Of paths, sizes, times of change and prompts."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.path.stat()
        digest.update(f"{file.path.resolve()} {stat.st_size} {stat.st_mtime_ns} {file.prompt}\n".encode())
    return digest.hexdigest()[:32]
