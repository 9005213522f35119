"""Real samples as latents, made once and kept on disk: one safetensors file that is filled in place, by all processes of a run and batch by batch, so that an
interrupted run goes on where it stopped. A run maps it into memory and reads the rows of its batches alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from instep.core.files import write_error, write_json
from instep.core.json_files import read_object
from instep.core.progress import Progress
from instep.core.ranks import ALONE, Ranks
from instep.data.clips import read_clip
from instep.data.media import EncodesMedia
from instep.data.prompt import Prompt
from instep.data.real_files import RealFile
from instep.data.samples import RealSamples

FOLDER = "real"  # in the folder of a run
NAME, RECORD = "latents.safetensors", "latents.json"
DONE = "latents.done"  # one byte a batch, 1 once its rows are on disk
BATCH = 8  # files that are decoded, encoded and written together


@torch.no_grad()
def real_samples(files: Sequence[RealFile], family: EncodesMedia, cache: Path, fps: float = 16.0, ranks: Ranks = ALONE) -> RealSamples:
    """The files as latents of `family`, float32, from `cache` as far as it holds them; each of `ranks` encodes its share of the others.

    For an image-to-video family the first frame of a sample is that of its file, unless the prompt names one. `fps`: frames a second of the model's videos.
    Raises ValueError for a file that does not fit, and where the cache holds other files, another size or the latents of another encoder; `Elsewhere` where
    another rank raised one.
    """
    if not (0 < fps < math.inf):
        raise ValueError(f"real_fps: {fps} is not allowed; the frames a second of the model's videos, above 0")
    prompts = tuple(_prompt(file, family) for file in files)
    ranks.of_first(lambda: _begin(cache, _record(files, family, fps)))
    error: Exception | None = None
    try:
        _fill(files, family, cache, fps, ranks)
    except Exception as raised:
        error = raised
    ranks.agree(error)
    return RealSamples(prompts, torch.from_numpy(mapped(cache / NAME, "c")))


def mapped(file: Path, mode: Any) -> np.memmap:
    """The one tensor of a safetensors file, float32, mapped into memory; mode r+ writes to it, c gives a copy of the pages that are written to."""
    start, shape = _layout(file)
    return np.memmap(file, np.float32, mode, start, shape)


def _layout(file: Path) -> tuple[int, tuple[int, ...]]:
    """Where the tensor of a cache begins, and its shape."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return 8 + length, tuple(json.loads(opened.read(length))["latents"]["shape"])


def _prompt(file: RealFile, family: EncodesMedia) -> Prompt:
    """The prompt of a file, with the file as its first frame where the family takes one and the prompt names none."""
    prompt = Prompt.parse(file.prompt)
    if not family.takes_first_frame or prompt.image is not None:
        return prompt
    if file.member is not None:
        raise ValueError(
            f"real: {file.name} lies in a shard, and an image-to-video model reads its first frame from a file; unpack the shards into a folder, or name "
            "first frames in the captions, [image: FILE]"
        )
    return replace(prompt, image=file.path)


def _record(files: Sequence[RealFile], family: EncodesMedia, fps: float) -> dict[str, Any]:
    """What the latents of a cache are made of."""
    probe = _encode(family, torch.rand(1, 3, family.size.frames, family.size.height, family.size.width, generator=torch.Generator().manual_seed(0)))[0]
    return {
        "files": _digest(files),
        "count": len(files),
        "size": asdict(family.size),
        "fps": fps,
        "shape": list(probe.shape),
        # of seeded noise, so that latents of another encoder are told apart on any device
        "encoder": [round(float(value), 4) for value in (probe.mean(), probe.std(), *probe.flatten()[:: max(1, probe.numel() // 14)][:14])],
    }


def _begin(cache: Path, record: dict[str, Any]) -> None:
    """Makes the files of a new cache in full length, with nothing done, and those of a damaged one anew. Raises ValueError for the cache of something else."""
    there = _recorded(cache)
    shape = [record["count"], *record["shape"]]
    header = _header(shape)
    length, batches = len(header) + 4 * math.prod(shape), -(-record["count"] // BATCH)
    if there is not None:
        different = [key for key in record if key != "encoder" and there.get(key) != record[key]]
        if len(there["encoder"]) != len(record["encoder"]) or not np.allclose(there["encoder"], record["encoder"], atol=0.05):
            different.append("encoder")
        if different:
            raise ValueError(f"real: {cache} holds the latents of others (their {', '.join(different)} differ); choose another folder, or remove it")
        damaged = [name for name, whole in ((NAME, _begins_with(cache / NAME, header, length)), (DONE, _marks(cache / DONE, batches))) if not whole]
        if not damaged:
            return
        print(f"real samples: {' and '.join(damaged)} of {cache} {'is' if len(damaged) == 1 else 'are'} damaged or gone; all are encoded again")
    elif (cache / NAME).exists() and not (cache / DONE).exists():
        raise ValueError(f"real: {cache / NAME} is no cache of real samples ({DONE} and {RECORD} are not beside it); choose another folder, or remove it")
    # under another name first, because a run may have the present file mapped
    temporary = cache / f".{NAME}.{os.getpid()}.tmp"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"real_cache: {cache} cannot be a folder ({error.strerror}); choose another one with --real-cache") from error
    try:
        (cache / DONE).write_bytes(bytes(batches))
        with open(temporary, "wb") as file:
            file.write(header)
            # allocated now, so that a full disk is found before anything is decoded
            os.posix_fallocate(file.fileno(), 0, length) if hasattr(os, "posix_fallocate") else file.truncate(length)
        os.replace(temporary, cache / NAME)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(error, f"the latents {cache / NAME}", "nothing else was touched") from error
    write_json(cache / RECORD, record)


def _recorded(cache: Path) -> dict[str, Any] | None:
    """What a cache says of itself; None where there is none. Raises ValueError for what is no record."""
    file = cache / RECORD
    if not file.exists():
        return None
    fix = f"choose another folder, or remove {cache}: its samples are encoded again"
    there = read_object(file, "real", fix)
    encoder = there.get("encoder")
    if isinstance(encoder, list) and all(isinstance(value, int | float) for value in encoder):
        return there
    raise ValueError(f"real: {file} is not the record of a cache (its encoder is no list of numbers); {fix}")


def _header(shape: Sequence[int]) -> bytes:
    """The beginning of a safetensors file with one tensor, `latents`, in float32."""
    header = json.dumps({"latents": {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * math.prod(shape)]}}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _begins_with(file: Path, header: bytes, length: int) -> bool:
    if not file.is_file() or file.stat().st_size != length:
        return False
    with open(file, "rb") as opened:
        return opened.read(len(header)) == header


def _marks(file: Path, batches: int) -> bool:
    return file.is_file() and len(done := file.read_bytes()) == batches and set(done) <= {0, 1}


def _fill(files: Sequence[RealFile], family: EncodesMedia, cache: Path, fps: float, ranks: Ranks) -> None:
    """Encodes what is not done of every `ranks.count`-th batch. Rows are written, not mapped, so that memory stays flat; a batch is done once it is on disk."""
    start, shape = _layout(cache / NAME)
    row = 4 * math.prod(shape[1:])
    batches = [i for i, done in enumerate((cache / DONE).read_bytes()) if not done][ranks.rank :: ranks.count]
    with open(cache / NAME, "r+b") as rows, open(cache / DONE, "r+b") as marks, Progress("real samples", len(batches)) as progress:
        for i in batches:
            part = files[i * BATCH : (i + 1) * BATCH]
            latents = _encode(family, torch.stack([read_clip(file, family.size, fps) for file in part]))
            try:
                _put(rows, start + i * BATCH * row, latents.numpy().tobytes())
                _put(marks, i, b"\1")
            except OSError as error:
                raise write_error(error, f"the latents {cache / NAME}", "those before are kept") from error
            progress.step()


def _put(file: BinaryIO, at: int, data: bytes) -> None:
    """Writes in place, and returns once it is on disk."""
    file.seek(at)
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _encode(family: EncodesMedia, media: Tensor) -> Tensor:
    """Media [B, 3, F, H, W] to latents on the CPU, float32."""
    given = (media if family.size.frames > 1 else media[:, :, 0]).to(family.device)
    return family.encode_media(given).float().cpu()


def _digest(files: Sequence[RealFile]) -> str:
    """Of paths, sizes, times of change and prompts."""
    digest = hashlib.sha256()
    known: dict[Path, str] = {}  # of shards, whose files are many
    for file in files:
        if file.path not in known:
            stat = file.path.stat()
            known[file.path] = f"{file.path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        inside = "" if file.member is None else f" {file.member.start}"
        digest.update(f"{known[file.path]}{inside} {file.prompt}\n".encode())
    return digest.hexdigest()[:32]
