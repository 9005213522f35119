"""Reading a JSON object from a file, whose size is looked at first and whose name stands in every error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# bytes; the largest that a run or a model folder holds is an index of shards, some 200 kB
LARGEST = 64_000_000


def read_object(file: Path, field: str, fix: str) -> dict[str, Any]:
    """The object in a JSON file. `field` is the option that led to it, and `fix` is what a user can do about a damaged file.

    Raises ValueError, which names the file, if it is larger than `LARGEST`, is no UTF-8 or no JSON, or holds something else than an object.
    """
    size = file.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{field}: {file} has {size / 1e6:.0f} MB, and at most {LARGEST / 1e6:.0f} MB are read; {fix}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        why = "it is empty" if size == 0 else " ".join(str(error).split())
        raise ValueError(f"{field}: {file} is damaged ({why}); {fix}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{field}: {file} holds a {type(found).__name__}, not an object; {fix}")
    return found
