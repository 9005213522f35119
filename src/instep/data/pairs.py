"""Preference pairs: people's preferences between two samples of a prompt, and their JSONL and Parquet files, which may hold preferred samples alone.

This file does not import torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

FIELDS = ("prompt", "chosen", "rejected", "question", "tie", "votes_chosen", "votes_rejected", "votes_tie", "annotators", "seed")
REQUIRED = FIELDS[:3]
FORMATS = (".jsonl", ".parquet")


@dataclass(frozen=True)
class PreferencePair:
    """Two media of one prompt and how many people preferred which.

    `chosen` and `rejected` are paths of images or videos. `votes` counts who voted (for chosen, for rejected, equal), at least one in all and
    never more for `rejected` than for `chosen`. A pair with equal numbers of both is a tie, and its order has no meaning.
    """

    prompt: str
    chosen: Path
    rejected: Path
    question: str = "overall"
    votes: tuple[int, int, int] = (1, 0, 0)
    annotators: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        _must(isinstance(self.prompt, str) and bool(self.prompt.strip()), "prompt", self.prompt, "text that is not empty")
        for name, value in (("chosen", self.chosen), ("rejected", self.rejected)):
            _must(isinstance(value, Path) and bool(value.name), name, value, "the path of an image or a video")
        _must(self.chosen != self.rejected, "rejected", str(self.rejected), "another file than chosen")
        _must(isinstance(self.question, str) and bool(self.question.strip()), "question", self.question, "what was asked, text that is not empty")
        _must(
            isinstance(self.votes, tuple) and len(self.votes) == 3 and all(_whole(n) and n >= 0 for n in self.votes) and sum(self.votes) >= 1,
            "votes",
            self.votes,
            "three whole numbers (for chosen, for rejected, equal) of 0 or more, at least one in all",
        )
        _must(self.votes[0] >= self.votes[1], "votes", self.votes, "at least as many for chosen as for rejected; exchange the two")
        _must(
            isinstance(self.annotators, tuple) and all(isinstance(name, str) and name.strip() for name in self.annotators),
            "annotators",
            self.annotators,
            "names, none of them empty",
        )
        _must(self.seed is None or (_whole(self.seed) and abs(self.seed) < 2**63), "seed", self.seed, "a whole number below 2^63, or none")

    @property
    def tie(self) -> bool:
        """Whether both have equal numbers of votes."""
        return self.votes[0] == self.votes[1]

    @property
    def share(self) -> float:
        """Share of the votes for `chosen`, with equal as half, in [0.5, 1]."""
        return (self.votes[0] + self.votes[2] / 2) / sum(self.votes)

    def row(self, base: Path) -> dict[str, Any]:
        """The pair as a row of a file in folder `base`: paths below it are relative, so that both can move together."""
        chosen, rejected, equal = self.votes
        return {
            "prompt": self.prompt,
            "chosen": _relative(self.chosen, base),
            "rejected": _relative(self.rejected, base),
            "question": self.question,
            "tie": self.tie,
            "votes_chosen": chosen,
            "votes_rejected": rejected,
            "votes_tie": equal,
            "annotators": list(self.annotators),
            "seed": self.seed,
        }

    @classmethod
    def of_row(cls, row: Mapping[str, Any], base: Path) -> PreferencePair:
        """The pair of a row; paths are relative to folder `base`. ValueError names the field, its value and what is allowed."""
        _check_row(row, REQUIRED)
        tie = row.get("tie")
        _must(tie is None or isinstance(tie, bool), "tie", tie, "true or false")
        usual = {"votes_chosen": 0 if tie else 1, "votes_rejected": 0, "votes_tie": 1 if tie else 0}
        given = {name: row[name] for name in usual if row.get(name) is not None}
        for name, value in given.items():
            _must(_whole(value) and value >= 0, name, value, "a whole number of 0 or more")
        counted = usual if not given else dict.fromkeys(usual, 0) | given
        names = row.get("annotators")
        _must(names is None or isinstance(names, (list, tuple)), "annotators", names, "a list of names")
        pair = cls(
            prompt=row["prompt"],
            chosen=base / row["chosen"],
            rejected=base / row["rejected"],
            question="overall" if row.get("question") is None else row["question"],
            votes=(counted["votes_chosen"], counted["votes_rejected"], counted["votes_tie"]),
            annotators=tuple(names or ()),
            seed=row.get("seed"),
        )
        _must(tie is None or tie == pair.tie, "tie", tie, f"{str(pair.tie).lower()} with {pair.votes[0]} votes for chosen and {pair.votes[1]} for rejected")
        return pair


@dataclass(frozen=True)
class PreferredSample:
    """A medium that people prefer for its prompt: the chosen half of a pair, or one without a rejected half."""

    prompt: str
    chosen: Path

    @classmethod
    def of_row(cls, row: Mapping[str, Any], base: Path) -> PreferredSample | None:
        """The preferred sample of a row, which may have no `rejected` one; None for a tie. Otherwise as `PreferencePair.of_row`."""
        if isinstance(row, Mapping) and row.get("rejected") is not None:
            pair = PreferencePair.of_row(row, base)
            return None if pair.tie else cls(pair.prompt, pair.chosen)
        _check_row(row, REQUIRED[:2])
        for name in ("tie", "votes_rejected", "votes_tie"):
            _must(not row.get(name), name, row.get(name), "left out where there is no rejected sample")
        return cls(row["prompt"], base / row["chosen"])


def read_pairs(path: Path | str) -> list[PreferencePair]:
    """The pairs of a .jsonl or .parquet file, all of them sound and their media there; ValueError names file, row, field and what is allowed."""
    return [pair for pair in _read(path, PreferencePair.of_row, REQUIRED[1:]) if pair is not None]


def read_preferred(path: Path | str) -> list[PreferredSample]:
    """The preferred samples of a .jsonl or .parquet file whose rows need no rejected one; without the ties. ValueError as `read_pairs`, and if none is left."""
    found = [sample for sample in _read(path, PreferredSample.of_row, REQUIRED[1:2]) if sample is not None]
    if not found:
        raise ValueError(f"pairs: all rows of {path} are ties, which carry no preference; give at least one with a preferred sample")
    return found


def read_labelled(path: Path | str) -> tuple[list[PreferencePair], list[PreferredSample]]:
    """The pairs of a file whose rows need no rejected sample, and the preferred samples of all its rows. ValueError as `read_preferred`."""
    preferred = read_preferred(path)

    def pair(row: Mapping[str, Any], base: Path) -> PreferencePair | None:
        return PreferencePair.of_row(row, base) if row.get("rejected") is not None else None

    return [one for one in _read(path, pair, REQUIRED[1:]) if one is not None], preferred


def _read(path: Path | str, parse: Callable[[Mapping[str, Any], Path], T | None], media: Sequence[str]) -> list[T | None]:
    """What `parse` makes of each row and the file's folder; the files named by its fields in `media` are there."""
    path, found = Path(path), []
    for i, row in rows_of(path):
        try:
            one = parse(row, path.parent)
            for name in media if one is not None else ():
                file = getattr(one, name)
                _must(file.is_file(), name, str(file), "a file that exists")
        except ValueError as error:
            raise ValueError(f"pairs: {path}, row {i}: {error}") from error
        found.append(one)
    return found


def _check_row(row: Any, required: Sequence[str]) -> None:
    """Raises ValueError unless a row is an object with these fields and no unknown ones, whose prompt and media are texts."""
    if not isinstance(row, Mapping):
        raise ValueError(f"row: {_short(row)} is not allowed; it is an object with {', '.join(required)}")
    for name in row:
        _must(name in FIELDS, str(name), row[name], f"no field of that name; a row has {', '.join(FIELDS)}")
    for name in required:
        if name not in row:
            raise ValueError(f"{name}: missing; a row has {', '.join(required)}, and may have {', '.join(name for name in FIELDS if name not in required)}")
    _must(isinstance(row["prompt"], str) and bool(row["prompt"].strip()), "prompt", row["prompt"], "text that is not empty")
    for name in required[1:]:
        _must(isinstance(row[name], str) and bool(row[name].strip()) and "\0" not in row[name], name, row[name], "the path of an image or a video")


def write_pairs(path: Path | str, pairs: Sequence[PreferencePair]) -> None:
    """All pairs to a .jsonl or .parquet file, atomically."""
    from instep.core.files import write_bytes

    path = Path(path)
    check_format(path)
    rows = [pair.row(path.parent) for pair in pairs]
    if path.suffix.lower() == ".jsonl":
        write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8"))
        return
    arrow, parquet = _pyarrow()
    whole, text = arrow.int64(), arrow.string()
    types = {
        "prompt": text,
        "chosen": text,
        "rejected": text,
        "question": text,
        "tie": arrow.bool_(),
        "votes_chosen": whole,
        "votes_rejected": whole,
        "votes_tie": whole,
        "annotators": arrow.list_(text),
        "seed": whole,
    }
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.Table.from_pylist(rows, schema=arrow.schema(list(types.items()))), sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def rows_of(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows (from 1; lines of a JSONL) of a file, `columns` alone where they are given; ValueError names the file and the row that cannot be read."""
    check_format(path)
    if not path.is_file():
        raise ValueError(f"pairs: {path} is not a file that exists")
    found = _lines(path) if path.suffix.lower() == ".jsonl" else _table(path, columns)
    empty = True
    for i, row in found:
        empty = False
        for name in columns:
            if name not in row:
                raise ValueError(f"pairs: {path}, row {i}: {name}: there is no such column; there are {', '.join(map(str, row))}")
        yield i, row
    if empty:
        raise ValueError(f"pairs: {path} is empty; it needs at least one row")


def check_format(path: Path) -> None:
    """ValueError unless the name ends in .jsonl or .parquet, and for Parquet unless pyarrow is there."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"pairs: {path.name!r} ends in {path.suffix!r}; pairs are kept as {' or '.join(FORMATS)}")
    if path.suffix.lower() == ".parquet":
        _pyarrow()


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, "rb") as file:
        for i, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if i == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"pairs: {path}, row {i} is not JSON in UTF-8 ({type(error).__name__}); fix or remove it") from error
            if not isinstance(row, dict):
                raise ValueError(f"pairs: {path}, row {i}: {_short(row)} is not allowed; it is an object with {', '.join(REQUIRED)}")
            yield i, row


def _table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    arrow, parquet = _pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for name in columns:
                if name not in names:
                    raise ValueError(f"pairs: {path}: {name}: there is no such column; there are {', '.join(names)}")
            i = 0
            for batch in file.iter_batches(batch_size=256, columns=list(columns) or None):
                for row in batch.to_pylist():
                    i += 1
                    yield i, row
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"pairs: {path} cannot be read as Parquet ({str(error).splitlines()[0]})") from error


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError('pairs: Parquet needs pyarrow, which is not installed; run: pip install "instep[parquet]", or use .jsonl') from error
    return pyarrow, pyarrow.parquet


def _relative(path: Path, base: Path) -> str:
    there, here = Path(os.path.abspath(path)), Path(os.path.abspath(base))
    return there.relative_to(here).as_posix() if there.is_relative_to(here) else there.as_posix()


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:20]}...{text[-57:]}"  # the end of a path is its most informative part


def _must(fine: bool, name: str, value: Any, allowed: str) -> None:
    if not fine:
        raise ValueError(f"{name}: {_short(value)} is not allowed; it is {allowed}")
