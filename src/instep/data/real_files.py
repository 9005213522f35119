"""A user's own images or videos with their captions: a folder with text files beside the media, an index in JSON lines or Parquet, or WebDataset shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instep.data.media import IMAGES, VIDEOS
from instep.data.pairs import rows_of
from instep.data.shards import SHARD, Member, samples_of

FILE_COLUMNS = ("file", "file_name", "path", "video", "image")
PROMPT_COLUMNS = ("prompt", "caption", "text")


@dataclass(frozen=True)
class RealFile:
    """A media file and its prompt in the written form (`data/prompt.py`). `member`: the file in the shard at `path`."""

    path: Path
    prompt: str
    member: Member | None = None

    @property
    def name(self) -> str:
        """What errors call it."""
        return str(self.path) if self.member is None else f"{self.path}: {self.member.name}"

    @property
    def suffix(self) -> str:
        return Path(self.path if self.member is None else self.member.name).suffix.lower()


def real_files(source: Path) -> list[RealFile]:
    """The files of a folder (with its folders, sorted by name; the caption of a.mp4 is in a.txt), of an index, `.jsonl` or `.parquet`, or of a WebDataset
    shard, `.tar`, or a folder of those.

    An index has a column with the file, beside the index (one of `FILE_COLUMNS`), and one with the prompt (one of `PROMPT_COLUMNS`). Raises ValueError that
    names the file or row: for a missing file or caption, an empty caption, and where there is nothing.
    """
    if source.is_dir():
        return _of_folder(source)
    if source.suffix.lower() == SHARD and source.is_file():
        return _of_shards([source])
    if source.suffix.lower() not in (".jsonl", ".parquet"):
        raise ValueError(
            f"real: {source} is not allowed; give a folder of images, videos or shards, an index that ends in .jsonl or .parquet, or a shard, {SHARD}"
        )
    try:
        rows = [(f"{source}, row {i}", row) for i, row in rows_of(source)]
    except ValueError as error:
        raise ValueError("real" + str(error).removeprefix("pairs")) from error
    return [_checked(where, source.parent / _column(where, row, FILE_COLUMNS), _column(where, row, PROMPT_COLUMNS)) for where, row in rows]


def _of_folder(folder: Path) -> list[RealFile]:
    there = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (SHARD, *IMAGES, *VIDEOS) and path.is_file())
    shards = [path for path in there if path.suffix.lower() == SHARD]
    media = [path for path in there if path.suffix.lower() != SHARD]
    if shards and media:
        raise ValueError(f"real: {folder} holds both shards ({shards[0].name}) and media ({media[0].name}); give folders of their own")
    if shards:
        return _of_shards(shards)
    if not media:
        raise ValueError(f"real: {folder} holds no image or video; they end in {', '.join((*IMAGES, *VIDEOS))}, and shards in {SHARD}")
    found = []
    for path in media:
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise ValueError(f"real: {path} has no caption; write it into {caption.name} beside it")
        found.append(_checked(str(path), path, caption.read_text(encoding="utf-8")))
    return found


def _of_shards(shards: Sequence[Path]) -> list[RealFile]:
    found = []
    for shard in shards:
        for sample in samples_of(shard, (*IMAGES, *VIDEOS)):
            where = f"real: {shard}: {sample.medium.name}"
            found.append(RealFile(shard, _stated(where, sample.caption(PROMPT_COLUMNS, where)), sample.medium))
    if not found:
        raise ValueError(f"real: {shards[0]} holds no image or video; they end in {', '.join((*IMAGES, *VIDEOS))}")
    return found


def _column(where: str, row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if not isinstance(value, str):
        raise ValueError(f"real: {where}: {' or '.join(names)} is {value!r}; it is a text")
    return value


def _checked(where: str, path: Path, prompt: str) -> RealFile:
    prompt = _stated(f"real: {where}", prompt)
    if not path.is_file():
        raise ValueError(f"real: {where}: {path} does not exist; correct the index")
    return RealFile(path, prompt)


def _stated(where: str, caption: str) -> str:
    """A caption in one line; ValueError, which begins with `where`, for an empty one."""
    prompt = " ".join(caption.split())
    if not prompt:
        raise ValueError(f"{where}: its caption is empty; write what it shows")
    return prompt
