"""Matched samples of two models, read from runs of instep or from any folder of media with a manifest."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from instep.human_eval.clip import FRAME_MS, VIDEOS

IMAGES = (".webp", ".gif", ".png")
MANIFESTS = ("samples.json", "samples.jsonl")
Match = Literal["seed", "prompt"]


@dataclass(frozen=True)
class Sample:
    """One sample: its prompt and seed, a digest of its content, and the path of its file (None: `encode` makes one)."""

    prompt: str
    seed: int
    copy: int
    digest: str
    path: Path | None
    encode: Callable[[], bytes] | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        return self.prompt, self.seed, self.copy


@dataclass(frozen=True)
class Samples:
    """All samples of one model, and the name that results (never the page) call it by."""

    name: str
    source: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Matched:
    """Matched samples of A and B, in A's order, and the numbers of unmatched ones."""

    a: Samples
    b: Samples
    pairs: tuple[tuple[Sample, Sample], ...]
    alone: tuple[int, int]

    @property
    def fingerprint(self) -> str:
        """Of which samples are compared: prompts, seeds and contents, A and B apart."""
        rows = sorted((*first.key, first.digest, second.digest) for first, second in self.pairs)
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def match(a: str, b: str, by: Match = "seed") -> Matched:
    """The samples of two folders paired by (prompt, seed), or by "prompt" alone, in the order of each folder; ValueError if there are none."""
    first, second = read_samples(a), read_samples(b)
    if first.source == second.source:
        raise ValueError(f"b: {b} holds the same samples as {a}; give two models, of one run as {a} and {a}:teacher_50")
    if first.name == second.name:
        first, second = Samples(a, first.source, first.samples), Samples(b, second.source, second.samples)
    others = dict(zip(_keys(second, by), second.samples, strict=True))
    pairs = tuple((sample, others[key]) for key, sample in zip(_keys(first, by), first.samples, strict=True) if key in others)
    if not pairs:
        shared = "prompt" if by == "prompt" else "prompt and seed"
        raise ValueError(
            f"b: no sample of {b} has the {shared} of one of {a} ({_example(first)} against {_example(second)}); sample both with the same "
            + ("prompts" if by == "prompt" else "prompts and seed, or match them by the prompt alone (--match prompt)")
        )
    return Matched(first, second, pairs, (len(first.samples) - len(pairs), len(second.samples) - len(pairs)))


def read_samples(where: str) -> Samples:
    """The samples of a run folder (`DIR`, or `DIR:MODEL` for another than its student), or of a folder with media and a manifest."""
    folder, model = Path(where), ""
    if not folder.exists() and ":" in where:
        name, _, model = where.rpartition(":")
        folder = Path(name)
    if not folder.is_dir():
        raise ValueError(f"samples: {where!r} is not a folder; give a run, or a folder with media files and a samples.json or samples.jsonl")
    inner = folder / "samples"
    folder = inner if not _manifest(folder) and _manifest(inner) else folder
    manifest = _manifest(folder)
    if manifest is None:
        raise ValueError(
            f'samples: {folder} has neither samples.json nor samples.jsonl; write one with rows {{"file": "a.mp4", "prompt": "...", "seed": 0}}, '
            "or finish the run that makes samples"
        )
    rows = _rows(manifest)
    if isinstance(rows, dict):
        return _of_run(folder, manifest, rows, model)
    if model:
        raise ValueError(f"samples: {where!r} names model {model!r}, but {manifest} lists files of one model; leave :{model} out")
    return Samples(_name(folder), str(folder.resolve()), tuple(_of_files(folder, manifest, rows)))


def _keys(samples: Samples, by: Match) -> list[tuple[Any, ...]]:
    """The unique key that a sample shares with its partner: prompt, seed and copy, or the prompt and the sample's index among those of that prompt."""
    if by == "seed":
        return [sample.key for sample in samples.samples]
    seen: Counter[str] = Counter()
    keys: list[tuple[Any, ...]] = []
    for sample in samples.samples:
        keys.append((sample.prompt, seen[sample.prompt]))
        seen[sample.prompt] += 1
    return keys


def _of_run(folder: Path, manifest: Path, record: dict[str, Any], model: str) -> Samples:
    """What `instep train` keeps: one tensor uint8 [models x prompts, F, H, W, 3], and what its rows are."""
    try:
        models, prompts, seed = list(record["models"]), list(record["prompts"]), int(record["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'samples: {manifest} is neither a list of rows {{"file", "prompt", "seed"}} nor written by a run ({error!r})') from error
    wanted = model or ("student" if "student" in models else models[-1] if models else "")
    if wanted not in models:
        raise ValueError(f"samples: {folder} has no samples of {wanted!r}; allowed: {', '.join(models)}")
    tensors = folder / "samples.safetensors"
    if not tensors.is_file():
        raise ValueError(f"samples: {tensors} is missing, which belongs to {manifest}; run the training command again")
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        videos = load_file(tensors)["samples"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"samples: {tensors} cannot be read ({error}); run the training command again") from error
    if videos.dtype != "uint8" or videos.ndim != 5 or videos.shape[-1] != 3 or len(videos) != len(models) * len(prompts):
        raise ValueError(f"samples: {tensors} holds {videos.dtype} {videos.shape}; {manifest} needs uint8 [{len(models) * len(prompts)}, F, H, W, 3]")
    first, seen, found = models.index(wanted) * len(prompts), dict[str, int](), []
    for i, prompt in enumerate(prompts):
        seen[prompt] = seen.get(prompt, -1) + 1
        video = videos[first + i]
        digest = hashlib.sha256(repr(video.shape).encode() + video.tobytes()).hexdigest()
        found.append(Sample(prompt, seed, seen[prompt], digest, None, partial(_webp, video)))
    name = _name(folder) + ("" if wanted == "student" else f":{wanted}")
    return Samples(name, f"{folder.resolve()}:{wanted}", tuple(found))


def _webp(video: Any) -> bytes:
    """A video uint8 [F, H, W, 3] as an animation that keeps every pixel."""
    from PIL import Image

    from instep.human_eval.frames import webp

    return webp([Image.fromarray(frame) for frame in video], [FRAME_MS] * len(video))


def _of_files(folder: Path, manifest: Path, rows: list[Any]) -> list[Sample]:
    found: dict[tuple[str, int, int], Sample] = {}
    for i, row in enumerate(rows, 1):
        where = f"samples: {manifest}, row {i}"
        if not isinstance(row, dict) or not isinstance(row.get("file"), str) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ValueError(f'{where}: {str(row)[:80]} is not allowed; a row is {{"file": "a.mp4", "prompt": "...", "seed": 0}}')
        seed = row.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool) or abs(seed) >= 2**63:
            raise ValueError(f"{where}: seed: {seed!r} is not allowed; it is a whole number below 2^63")
        path = folder / row["file"]
        if "\0" in row["file"] or not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{where}: file: {row['file']!r} is not allowed; it is a file inside {folder}")
        if path.suffix.lower() not in (*IMAGES, *VIDEOS):
            raise ValueError(f"{where}: file: {row['file']!r} is not allowed; it ends in {', '.join((*IMAGES, *VIDEOS))}")
        if not path.is_file():
            raise ValueError(f"{where}: file: {path} does not exist")
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        sample = Sample(row["prompt"].strip(), seed, 0, digest, path.resolve())
        if sample.key in found:
            raise ValueError(f"{where}: prompt {sample.prompt!r} with seed {seed} is there twice; give every sample of a prompt its own seed")
        found[sample.key] = sample
    return list(found.values())


def _manifest(folder: Path) -> Path | None:
    return next((folder / name for name in MANIFESTS if (folder / name).is_file()), None)


def _rows(manifest: Path) -> Any:
    """A list of rows, or the record of a run."""
    try:
        text = manifest.read_text(encoding="utf-8-sig")
        rows = [json.loads(line) for line in text.split("\n") if line.strip()] if manifest.suffix == ".jsonl" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"samples: {manifest} is not JSON in UTF-8 ({error}); fix it") from error
    if not isinstance(rows, (list, dict)) or not rows:
        raise ValueError(f'samples: {manifest} has no rows; it is a list of {{"file": "a.mp4", "prompt": "...", "seed": 0}}')
    return rows


def _name(folder: Path) -> str:
    folder = folder.resolve()
    return folder.parent.name if folder.name == "samples" and folder.parent.name else folder.name


def _example(samples: Samples) -> str:
    sample = samples.samples[0]
    return f"{sample.prompt!r}, seed {sample.seed}"
