"""Logs of one JSON object a line: reading them and dropping rows after a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from instep.core.files import write_text


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines log, up to a line that was only half written; none where there is no file."""
    rows: list[dict[str, Any]] = []
    for line in file.read_bytes().split(b"\n") if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def trim(file: Path, step: int) -> None:
    """Drops rows after `step` (they will be repeated) and a half-written last line."""
    if file.is_file():
        write_text(file, "".join(json.dumps(row) + "\n" for row in read_rows(file) if row["step"] <= step))
