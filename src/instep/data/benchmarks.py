"""Benchmarks that have tools of their own: which prompts they ask for, how often, and what their tools expect the samples to be called."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from instep.data.prompt import Prompt, load_prompts

LONGEST = 220  # bytes of a prompt that is the name of a file, of the 255 that file systems allow
Layout = Literal["vbench", "vbench-i2v", "geneval", "dpg-bench"]


@dataclass(frozen=True)
class Item:
    """A prompt and the files of its samples, from the folder that the tool reads. `grid`: one file holds all of them, two by two; `beside`: other files
    and their texts."""

    prompt: Prompt
    files: tuple[str, ...]
    grid: bool = False
    beside: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """`copies`: how many samples of a prompt it asks for. `items`: its prompts, from their source, the number of copies and the folder of first frames."""

    copies: int
    video: bool
    items: Callable[[Path, int, Path | None], list[Item]]


def _vbench(source: Path, copies: int, images: Path | None) -> list[Item]:
    """VBench's prompts/README.md: PROMPT-INDEX.mp4, INDEX from 0, all in one folder."""
    return [_video(prompt, copies) for prompt in dict.fromkeys(load_prompts(source))]


def _vbench_i2v(source: Path, copies: int, images: Path | None) -> list[Item]:
    """VBench-I2V's README: the same names; prompts and first frames of vbench2_i2v_full_info.json (prompt_en, image_name)."""
    if images is None:
        raise ValueError("images: VBench-I2V samples begin with first frames; give their folder, such as crop/16-9 of its data, with --images")
    found: dict[str, str] = {}
    for i, row in enumerate(_rows(source, [_json(source, 1, _text(source))], whole=True)):
        for name in ("prompt_en", "image_name"):
            if not isinstance(row.get(name), str):
                raise ValueError(f"source: {source}, entry {i}: {name} is {row.get(name)!r}; it is a text, as in vbench2_i2v_full_info.json")
        if found.setdefault(row["prompt_en"], row["image_name"]) != row["image_name"]:
            raise ValueError(f"source: {source}, entry {i}: {row['prompt_en']!r} has two first frames, and VBench-I2V names its videos by the prompt alone")
        if not (images / row["image_name"]).is_file():
            raise ValueError(f"images: {images / row['image_name']} does not exist; give the folder of the benchmark's first frames with --images")
    return [_video(Prompt(text, images / image), copies) for text, image in found.items()]


def _video(prompt: Prompt, copies: int) -> Item:
    if "/" in prompt.text or prompt.text.startswith(".") or len(prompt.text.encode()) > LONGEST:
        raise ValueError(f"source: {prompt.text!r} cannot be the name of a file, which VBench needs it to be; leave it out")
    return Item(prompt, tuple(f"{prompt.text}-{i}.mp4" for i in range(copies)))


def _geneval(source: Path, copies: int, images: Path | None) -> list[Item]:
    """GenEval's README and generation/diffusers_generate.py: a folder a line of evaluation_metadata.jsonl, with that line and samples/00000.png and on."""
    lines = [line for line in _text(source).splitlines() if line.strip()]
    items = []
    for i, row in enumerate(_rows(source, [_json(source, i, line) for i, line in enumerate(lines, 1)])):
        if not isinstance(row.get("prompt"), str) or "tag" not in row:
            raise ValueError(f"source: {source}, line {i + 1} has no prompt or no tag; give GenEval's evaluation_metadata.jsonl")
        files = tuple(f"{i:05}/samples/{copy:05}.png" for copy in range(copies))
        items.append(Item(Prompt(row["prompt"]), files, beside={f"{i:05}/metadata.jsonl": json.dumps(row)}))
    return items


def _dpg_bench(source: Path, copies: int, images: Path | None) -> list[Item]:
    """DPG-Bench (the repository of ELLA): an image is called as its prompt's .txt; four of them make one, two by two."""
    if copies not in (1, 4):
        raise ValueError(f"copies: {copies} is not allowed; DPG-Bench takes 1 image a prompt, or 4 in a grid")
    files = sorted(source.glob("*.txt")) if source.is_dir() else []
    if not files:
        raise ValueError(f"source: {source} holds no .txt; give DPG-Bench's folder of prompts, one file each")
    # its tool cuts names at the first dot
    if dotted := next((file for file in files if "." in file.stem), None):
        raise ValueError(f"source: {dotted} has a dot in its name, which DPG-Bench's tool takes for its end; rename it")
    return [Item(Prompt(" ".join(_text(file).split())), (f"{file.stem}.png",) * copies, grid=copies > 1) for file in files]


BENCHMARKS: Mapping[Layout, Benchmark] = {
    "vbench": Benchmark(5, True, _vbench),
    "vbench-i2v": Benchmark(5, True, _vbench_i2v),
    "geneval": Benchmark(4, False, _geneval),
    "dpg-bench": Benchmark(4, False, _dpg_bench),
}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"source: {file} cannot be read ({error}); give the file of the benchmark's prompts") from error


def _json(file: Path, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"source: {file}, line {line} is not JSON ({error}); give the benchmark's own file") from error


def _rows(file: Path, rows: list[Any], *, whole: bool = False) -> list[dict[str, Any]]:
    """The objects of a file; `whole`: of one list. ValueError where there are none or others."""
    found = rows[0] if whole else rows
    if not isinstance(found, list) or not found or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"source: {file} holds no list of objects; give the benchmark's own file")
    return found
