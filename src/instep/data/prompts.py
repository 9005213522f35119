"""Prompt files: one prompt a line, or JSON lines with a "prompt"."""

from __future__ import annotations

import codecs
import json
from pathlib import Path


def load_prompts(path: Path | str) -> list[str]:
    """The prompts of a .txt (one a line, blank lines skipped) or .jsonl file; ValueError names the file and the line that is wrong."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prompts: {path} is not a file that exists; give a text file with one prompt a line")
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"prompts: {path}, line {line} is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    # not splitlines(), which also breaks at separators that are ordinary characters inside a JSON string
    lines = [(i, line.strip()) for i, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"prompts: {path} is empty; write at least one prompt, one a line")
    return [_from_json(path, i, line) for i, line in lines] if path.suffix.lower() == ".jsonl" else [line for _, line in lines]


def _from_json(path: Path, i: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        form = '{"prompt": "..."}'
        raise ValueError(f"prompts: {path}, line {i} is not of the form {form} ({type(error).__name__}); fix or remove it") from error
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompts: {path}, line {i} holds {prompt!r}; a prompt is text that is not empty")
    return prompt.strip()
