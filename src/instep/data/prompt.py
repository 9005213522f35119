"""Prompts: the conditions of a sample, as values; and files of prompts, one a line or as JSON lines.

A prompt has one written form, `a cat runs [image: cat.png] [negative: blurry]`, in which either bracket may be missing. It is parsed where people write
prompts (text files, the command line) and where prompts were stored as text (records, pairs, samples); everything else carries `Prompt` values.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

# bytes of a file of prompts, and characters of one prompt: text encoders read 77 to 512 tokens
LARGEST, LONGEST = 256_000_000, 20_000
COLUMNS = ("prompt", "image", "negative", "negative_prompt")
_FORM = re.compile(r"(.*?)\s*(?:\[image: ([^\[\]]+)\]\s*)?(?:\[negative: (.*)\]\s*)?", re.DOTALL)
_NAME = re.compile(r"[^\[\]]+")


@dataclass(frozen=True)
class Prompt:
    """A text, the first frame of an image-to-video model, and the negative prompt for guidance.

    `image` is the name of a file, or a name that the model itself defines; it is kept as text. `negative` is None where there is none, so that a
    run's own may fill it in; an empty text stays empty. Raises ValueError for a value that its written form would not give back: an image's name with
    square brackets, or a text that is itself written with an image.
    """

    text: str
    image: Path | str | None = None
    negative: str | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (("text", self.text, str), ("image", self.image, Path | str | None), ("negative", self.negative, str | None)):
            if not isinstance(value, allowed):
                raise ValueError(f"{name}: {value!r} is not allowed in a prompt; it is text{' or None' if name != 'text' else ''}")
        if self.image is not None:
            object.__setattr__(self, "image", str(self.image).strip())
        if self.image is not None or self.negative is not None:
            object.__setattr__(self, "text", self.text.rstrip())
        if _parts(self.text) != (self.text, None, None):
            text, image, negative = _parts(self.text)
            given = "".join(f", {name}={value!r}" for name, value in (("image", image), ("negative", negative)) if value is not None)
            raise ValueError(f"text: {self.text!r} is the written form of a prompt; give Prompt({text!r}{given}), or Prompt.parse of it")
        if self.image is not None and not _NAME.fullmatch(str(self.image)):
            raise ValueError(f"image: {str(self.image)!r} for prompt {self.text!r} is not allowed; one name without square brackets a prompt")
        if _parts(str(self)) != (self.text, self.image, self.negative):
            raise ValueError(f"text: {self.text!r} is not allowed; leave '[image: ' and '[negative: ' out of it")

    def __str__(self) -> str:
        """The written form; `parse` is its inverse."""
        image = "" if self.image is None else f" [image: {self.image}]"
        return f"{self.text}{image}" + ("" if self.negative is None else f" [negative: {self.negative}]")

    @classmethod
    def parse(cls, written: str) -> Self:
        """The prompt of a written form; spaces before and after the brackets do not count."""
        return cls(*_parts(written))


def _parts(written: str) -> tuple[str, str | None, str | None]:
    found = _FORM.fullmatch(written)
    if found is None or (found[2] is None and found[3] is None):
        return written, None, None
    return found[1], found[2] and found[2].strip(), found[3]


def as_prompts(given: Sequence[Prompt | str]) -> tuple[Prompt, ...]:
    """Prompts of a list or tuple of prompts and plain texts; ValueError for anything else, such as one text alone or a generator."""
    if isinstance(given, str | Prompt):
        raise ValueError(f"prompts: {given!r} is one prompt alone; give a list of prompts, [{given!r}]")
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise ValueError(f"prompts: {type(given).__name__} is not allowed; give a list of texts or Prompt values (of a generator: list(...))")
    for i, prompt in enumerate(given):
        if not isinstance(prompt, str | Prompt):
            raise ValueError(f"prompts: item {i} is {prompt!r}, which is not allowed; every prompt is a text or a Prompt value")
    return tuple(prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in given)


def texts_of(prompts: Sequence[Prompt | str]) -> list[str]:
    """The texts alone."""
    return [prompt.text if isinstance(prompt, Prompt) else prompt for prompt in prompts]


def negatives_of(prompts: Sequence[Prompt | str]) -> list[str]:
    """The negative prompt of each, an empty text where it has none."""
    return [prompt.negative or "" for prompt in as_prompts(prompts)]


def with_negative(prompts: Sequence[Prompt | str], negative: str | None) -> tuple[Prompt, ...]:
    """The prompts, `negative` filled in where a prompt has none of its own."""
    found = as_prompts(prompts)
    return found if negative is None else tuple(replace(p, negative=negative) if p.negative is None else p for p in found)


def is_file_name(image: Path | str) -> bool:
    """Whether an image is a file name with an ending (cat.png); other names are defined by the model."""
    return bool(Path(image).suffix)


def load_prompts(path: Path | str) -> list[Prompt]:
    """The prompts of a .txt (one a line in their written form, blank lines skipped), .jsonl, .json or .csv file.

    A line of .jsonl is an object with "prompt" and, if it has them, "image" (a file, from where the prompt file lies) and "negative" (or
    "negative_prompt"). A .json file is a list of texts or of such objects, and the first line of a .csv file names such columns. A .txt file whose lines
    are all such objects is read as .jsonl. ValueError names the file and the line that is wrong, and a file or a prompt that is too long (`LARGEST`,
    `LONGEST`).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prompts: {path} is not a file that exists; give a text file with one prompt a line")
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"prompts: {path} has {size / 1e6:.0f} MB, and at most {LARGEST / 1e6:.0f} MB are read; split the file")
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ValueError(f"prompts: {path} cannot be read ({error.strerror}); see to its permissions, or give another file") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"prompts: {path}, line {line} is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    # not splitlines(), which also breaks at separators that are ordinary characters inside a JSON string
    lines = [(i, line.strip()) for i, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"prompts: {path} is empty; write at least one prompt, one a line")
    kind = path.suffix.lower()
    if kind in (".json", ".csv"):
        lines = _json_list(path, text) if kind == ".json" else _csv_rows(path, text)
    in_json = kind in (".json", ".jsonl", ".csv") or all(_is_row(line) for _, line in lines)
    found = [_from_json(path, i, line) if in_json else _written(path, i, line) for i, line in lines]
    for (i, _), prompt in zip(lines, found, strict=True):
        if len(prompt.text) > LONGEST or len(prompt.negative or "") > LONGEST:
            raise ValueError(f"prompts: {path}, line {i} holds a prompt of more than {LONGEST} characters, far beyond what a text encoder reads; shorten it")
    return found


def _json_list(path: Path, text: str) -> list[tuple[int, str]]:
    """The items of a JSON list, numbered from 1, each as an object in JSON."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"prompts: {path} is no JSON ({error}); write a list of texts, or one prompt a line in a .txt file") from error
    if not isinstance(found, list) or not found:
        raise ValueError(f'prompts: {path} holds no list with items; write a list of texts, or of objects with a "prompt"')
    return [(i, json.dumps({"prompt": item} if isinstance(item, str) else item)) for i, item in enumerate(found, 1)]


def _csv_rows(path: Path, text: str) -> list[tuple[int, str]]:
    """The rows of a table with a header, each as an object in JSON, with the number of its last line."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if "prompt" not in (reader.fieldnames or ()):
            raise ValueError(f'prompts: {path} has the columns {", ".join(reader.fieldnames or ())}; its first line names a column "prompt"')
        rows = [(reader.line_num, json.dumps({key: value for key, value in row.items() if key in COLUMNS and value})) for row in reader]
    except csv.Error as error:
        raise ValueError(f"prompts: {path}, line {reader.line_num} is no row of a CSV file ({error}); fix or remove it") from error
    if not rows:
        raise ValueError(f"prompts: {path} has no row below its header; write at least one prompt")
    return rows


def _is_row(line: str) -> bool:
    """Whether a line of a text file is an object in JSON that has a prompt."""
    try:
        return line.startswith("{") and "prompt" in json.loads(line)
    except (ValueError, RecursionError):
        return False


def _written(path: Path, i: int, line: str) -> Prompt:
    try:
        return Prompt.parse(line)
    except ValueError as error:
        raise ValueError(f"prompts: {path}, line {i}: {error}") from error


def _from_json(path: Path, i: int, line: str) -> Prompt:
    try:
        row: dict[str, Any] = json.loads(line)
        text, image = row["prompt"], row.get("image")
        negatives = [row[name] for name in ("negative", "negative_prompt") if row.get(name) is not None]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        form = '{"prompt": "..."}'
        raise ValueError(f"prompts: {path}, line {i} is not of the form {form} ({type(error).__name__}); fix or remove it") from error
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"prompts: {path}, line {i} holds {text!r}; a prompt is text that is not empty")
    if image is not None and (not isinstance(image, str) or not image.strip()):
        raise ValueError(f"prompts: {path}, line {i} has the image {image!r}; it is the name of a file, from where the prompt file lies")
    if len(negatives) > 1 or not all(isinstance(negative, str) for negative in negatives):
        raise ValueError(f'prompts: {path}, line {i} has the negative prompt {negatives!r}; it is one text, as "negative" or as "negative_prompt"')
    name = image and image.strip()
    try:
        return Prompt(text.strip(), (path.parent / name).resolve() if name and is_file_name(name) else name, negatives[0] if negatives else None)
    except ValueError as error:
        raise ValueError(f"prompts: {path}, line {i}: {error}") from error
