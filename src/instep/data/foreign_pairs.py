"""Public preference sets with other column names, which may contain the images themselves."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instep.data.pairs import PreferencePair, rows_of


@dataclass(frozen=True)
class Columns:
    """Names of columns: prompt with chosen and rejected, or with first, second and a label, whose `labels` mean (first, second, tie)."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    first: str | None = None
    second: str | None = None
    label: str | None = None
    labels: tuple[str, str, str] = ("1", "0", "0.5")

    def __post_init__(self) -> None:
        given = {"first-column": self.first, "second-column": self.second, "label-column": self.label}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < 3:
            raise ValueError(f"{missing[0]}: missing; first-column, second-column and label-column go together")

    @property
    def used(self) -> tuple[str, ...]:
        if self.first and self.second and self.label:
            return tuple(dict.fromkeys((self.prompt, self.first, self.second, self.label)))
        return tuple(dict.fromkeys((self.prompt, self.chosen, self.rejected)))


def import_pairs(path: Path, columns: Columns, root: Path, store: Path, question: str = "overall") -> list[PreferencePair]:
    """The pairs of `path`. Relative paths begin at `root`; images in the rows are written to folder `store` under names made from their content.

    Raises ValueError with the row, the column, its value and what is allowed.
    """
    found = []
    for i, row in rows_of(path, columns.used):
        try:
            found.append(_pair(row, columns, root, store, question))
        except ValueError as error:
            raise ValueError(f"pairs: {path}, row {i}: {error}") from error
    return found


def _pair(row: dict[str, Any], columns: Columns, root: Path, store: Path, question: str) -> PreferencePair:
    prompt = row[columns.prompt]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{columns.prompt}: {prompt!r} is not allowed; it is text that is not empty")
    if not (columns.first and columns.second and columns.label):
        return PreferencePair(prompt, _media(row, columns.chosen, root, store), _media(row, columns.rejected, root, store), question)
    first, second = _media(row, columns.first, root, store), _media(row, columns.second, root, store)
    label = row[columns.label]
    matches = [_same(label, target) for target in columns.labels]
    if not any(matches):
        raise ValueError(f"{columns.label}: {label!r} is not allowed; allowed: {', '.join(columns.labels)} (first, second, tie)")
    if matches[2]:
        return PreferencePair(prompt, first, second, question, (0, 0, 1))
    return PreferencePair(prompt, *((first, second) if matches[0] else (second, first)), question)


def _same(label: Any, target: str) -> bool:
    """A label as text, or as a number: 1, 1.0 and "1" are alike."""
    if str(label).strip().casefold() == target.strip().casefold():
        return True
    try:
        return not isinstance(label, bool) and float(label) == float(target)
    except (TypeError, ValueError):
        return False


def _media(row: dict[str, Any], column: str, root: Path, store: Path) -> Path:
    value = row[column]
    if isinstance(value, dict):  # an image column of the datasets library: {"bytes": ..., "path": ...}
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return _written(column, value, store)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError(f"{column}: {str(value)[:60]!r} is not allowed; it is a path, or an image's bytes")
    if "://" in value:
        raise ValueError(f"{column}: {value[:80]!r} is not allowed; fetch the file and give its path")
    file = root / value
    if not file.is_file():
        raise ValueError(f"{column}: {str(file)!r} is not allowed; it is a file that exists (relative paths begin at {root}, see --media)")
    return file


KINDS = ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG\r\n\x1a\n", ".png"), (b"GIF8", ".gif"), (b"\x1aE\xdf\xa3", ".webm"))


def _written(column: str, data: bytes, store: Path) -> Path:
    from instep.core.files import write_bytes

    suffix = next((suffix for magic, suffix in KINDS if data.startswith(magic)), None)
    suffix = suffix or (".webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ".mp4" if data[4:8] == b"ftyp" else None)
    if suffix is None:
        raise ValueError(f"{column}: {data[:12]!r}... is not allowed; it is a JPEG, PNG, GIF, WebP, MP4 or WebM file")
    path = store / f"{hashlib.sha256(data).hexdigest()[:24]}{suffix}"
    if not path.is_file():
        write_bytes(path, data)
    return path
