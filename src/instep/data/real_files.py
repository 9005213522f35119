"""A user's own images or videos with their captions: a folder with text files beside the media, or an index in JSON lines or Parquet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instep.data.media import IMAGES, VIDEOS
from instep.data.pairs import rows_of

FILE_COLUMNS = ("file", "file_name", "path", "video", "image")
PROMPT_COLUMNS = ("prompt", "caption", "text")


@dataclass(frozen=True)
class RealFile:
    """A media file and its prompt in the written form (`data/prompt.py`)."""

    path: Path
    prompt: str


def real_files(source: Path) -> list[RealFile]:
    """The files of a folder (with its folders, sorted by name; the caption of a.mp4 is in a.txt), or of an index, `.jsonl` or `.parquet`.

    An index has a column with the file, beside the index (one of `FILE_COLUMNS`), and one with the prompt (one of `PROMPT_COLUMNS`). Raises ValueError that
    names the file or row: for a missing file or caption, an empty caption, and where there is nothing.
    """
    if source.is_dir():
        return _of_folder(source)
    if source.suffix.lower() not in (".jsonl", ".parquet"):
        raise ValueError(f"real: {source} is not allowed; give a folder of images or videos, or an index that ends in .jsonl or .parquet")
    try:
        rows = [(f"{source}, row {i}", row) for i, row in rows_of(source)]
    except ValueError as error:
        raise ValueError("real" + str(error).removeprefix("pairs")) from error
    return [_checked(where, source.parent / _column(where, row, FILE_COLUMNS), _column(where, row, PROMPT_COLUMNS)) for where, row in rows]


def _of_folder(folder: Path) -> list[RealFile]:
    media = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (*IMAGES, *VIDEOS) and path.is_file())
    if not media:
        raise ValueError(f"real: {folder} holds no image or video; they end in {', '.join((*IMAGES, *VIDEOS))}")
    found = []
    for path in media:
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise ValueError(f"real: {path} has no caption; write it into {caption.name} beside it")
        found.append(_checked(str(path), path, caption.read_text(encoding="utf-8")))
    return found


def _column(where: str, row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if not isinstance(value, str):
        raise ValueError(f"real: {where}: {' or '.join(names)} is {value!r}; it is a text")
    return value


def _checked(where: str, path: Path, prompt: str) -> RealFile:
    prompt = " ".join(prompt.split())
    if not prompt:
        raise ValueError(f"real: {where}: its caption is empty; write what it shows")
    if not path.is_file():
        raise ValueError(f"real: {where}: {path} does not exist; correct the index")
    return RealFile(path, prompt)
