"""Prompts, and files of them: one prompt a line, or JSON lines with a "prompt" and, for image-to-video, an "image".

A prompt of an image-to-video model names its first frame: `a cat runs [image: cat.png]`. So the first frame goes wherever the prompt goes (batches, stored
samples, probes, records), and a prompt stays one string. What only reads text is given the text alone.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path

# a drawn first frame instead of a file: split/seed of a moving-digits video
DRAWN = re.compile(r"(train|monitor|heldout|reference)/(\d+)")
_NAMED = re.compile(r"(.*?)\s*\[image: ([^\[\]]+)\]\s*", re.DOTALL)


def with_first_frame(text: str, first_frame: str | Path) -> str:
    """The prompt that says `text` and whose first frame is `first_frame`: the name of a file, or what `read_first_frame` draws.

    ValueError for a name with square brackets, or a text that names one already.
    """
    prompt = f"{text} [image: {first_frame}]"
    if first_frame_of(text) is not None or text_of(prompt) != text.rstrip():
        raise ValueError(f"image: {str(first_frame)!r} for prompt {text!r} is not allowed; one name without square brackets a prompt")
    return prompt


def first_frame_of(prompt: str) -> str | None:
    """The name of a prompt's first frame; None of a prompt of text alone."""
    found = _NAMED.fullmatch(prompt)
    return found[2].strip() if found else None


def text_of(prompt: str) -> str:
    """What a prompt says, without its first frame."""
    found = _NAMED.fullmatch(prompt)
    return found[1] if found else prompt


def texts_of(prompts: Sequence[str]) -> list[str]:
    return [text_of(prompt) for prompt in prompts]


def other_text(prompt: str, text: str) -> str:
    """`text` with the first frame of `prompt`, if it has one."""
    first_frame = first_frame_of(prompt)
    return text if first_frame is None else with_first_frame(text, first_frame)


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
        row = json.loads(line)
        prompt, image = row["prompt"], row.get("image")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = '{"prompt": "..."}'
        raise ValueError(f"prompts: {path}, line {i} is not of the form {form} ({type(error).__name__}); fix or remove it") from error
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompts: {path}, line {i} holds {prompt!r}; a prompt is text that is not empty")
    if image is None:
        return prompt.strip()
    if not isinstance(image, str) or not image.strip():
        raise ValueError(f"prompts: {path}, line {i} has the image {image!r}; it is the name of a file, from where the prompt file lies")
    # drawn first frames are no files
    return with_first_frame(prompt.strip(), image.strip() if DRAWN.fullmatch(image.strip()) else (path.parent / image.strip()).resolve())
