"""WebDataset shards: tar files in which the files of a sample follow each other and share their name up to its first dot.

Python's own tarfile reads them: one pass over the headers says where each medium lies, and a medium is read from there when it is needed. So an interrupted
cache goes on at its sample and every process reads its own share, which a reader of streams (the webdataset package) does not offer. Nothing is unpacked to
the disk, and no link is followed.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

SHARD = ".tar"
MOST_BYTES = 2**30  # of one medium, which is in memory while it is decoded
MOST_CAPTION = 2**20
CAPTIONS = (".txt", ".json")


@dataclass(frozen=True)
class Member:
    """A file inside a shard: its name there, and the bytes it takes."""

    name: str
    start: int
    size: int

    def read(self, shard: Path) -> bytes:
        with open(shard, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


@dataclass(frozen=True)
class Sample:
    """A medium of a shard and the files of the same name beside it, by ending: .txt, .json."""

    medium: Member
    beside: dict[str, bytes]

    def caption(self, columns: tuple[str, ...], where: str) -> str:
        """The text of its .txt, else of one of `columns` of its .json. Raises ValueError, which begins with `where`, if it has neither."""
        if ".txt" in self.beside:
            try:
                return self.beside[".txt"].decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: its caption is not UTF-8 ({error.reason}); save it as UTF-8") from error
        try:
            row = json.loads(self.beside.get(".json", b"{}"))
        except ValueError as error:
            raise ValueError(f"{where}: its .json cannot be read ({error}); correct it") from error
        found = next((row[name] for name in columns if isinstance(row.get(name), str)), None) if isinstance(row, dict) else None
        if found is None:
            raise ValueError(f"{where} has no caption; write it into a .txt of the same name beside it, or into its .json as {columns[0]!r}")
        return found


def samples_of(shard: Path, media: tuple[str, ...]) -> Iterator[Sample]:
    """The samples of a shard in its order; files that end neither in one of `media` nor as a caption are passed over.

    Raises ValueError that names the shard and the file: for what is no uncompressed tar or is cut off, a link, a file beyond its bounds, and two media of one
    sample.
    """
    key: str | None = None
    medium: Member | None = None
    beside: dict[str, bytes] = {}
    for name, member, text in _entries(shard, media):
        path = PurePosixPath(name)
        own = str(path.parent / path.name.split(".")[0])
        if own != key:
            if medium is not None:
                yield Sample(medium, beside)
            key, medium, beside = own, None, {}
        if text is not None:
            beside[path.suffix.lower()] = text
        elif medium is not None:
            raise ValueError(f"real: {shard}: {medium.name} and {name} are two media of one sample; give each a name and a caption of its own")
        else:
            medium = member
    if medium is not None:
        yield Sample(medium, beside)


def _entries(shard: Path, media: tuple[str, ...]) -> Iterator[tuple[str, Member, bytes | None]]:
    """Name and place of each file that is of use, and the bytes of a caption."""
    length = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive:
            while (entry := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all headers otherwise
                suffix = PurePosixPath(entry.name).suffix.lower()
                if entry.isdir() or suffix not in (*media, *CAPTIONS):
                    continue
                where = f"real: {shard}: {entry.name}"
                if not entry.isreg() or entry.issparse():
                    raise ValueError(f"{where} is a link or a special file, and none is followed; pack the file itself")
                most = MOST_CAPTION if suffix in CAPTIONS else MOST_BYTES
                if entry.size > most:
                    raise ValueError(f"{where} has {entry.size:,} bytes, more than {most:,}; reduce it, or take it out")
                if entry.offset_data + entry.size > length:
                    raise ValueError(f"{where} is cut off; copy or download the shard again")
                member = Member(entry.name, entry.offset_data, entry.size)
                yield entry.name, member, member.read(shard) if suffix in CAPTIONS else None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"real: {shard} cannot be read as an uncompressed tar ({error}); copy or unzip it again") from error
