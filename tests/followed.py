"""Pages of the documentation, typed as they stand: their shell commands and their Python, in the order of the page, in the working folder."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from instep.cli.main import main

DOCS = Path(__file__).parents[1] / "docs" / "how_to"
# that a page starts with `&`; whoever follows it ends them
SERVERS: list[subprocess.Popen] = []
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# appended to the commands that take a model: the last value of an option counts
SMALL: Mapping[str, str] = {
    "train": "--batch 4 --accumulate 1 --critic-updates 1 --iterations 1 --probe-every 50 --no-evaluate",
    "plan": "--batch 4 --accumulate 1",
}


def follow(
    page: str,
    models: Mapping[str, Callable[[Path], None]] | None = None,
    size: str = "",
    written: Mapping[str, str] | None = None,
    smaller: Mapping[str, str] | None = None,
) -> list[str]:
    """Does what a page says; the kinds of block that it had.

    models: what is written where `hf download NAME` would put it. size: the value of --size for `train` and `plan`, which with `models` also
    get `SMALL` numbers. written: texts of the Python blocks and what takes their place. smaller: the same, of all blocks.
    """
    seen = []
    for language, file, text in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")):
        seen.append(f"{language}{' file' if file else ''}")
        for before, after in {**(smaller or {}), **((written or {}) if language == "python" else {})}.items():
            text = text.replace(before, after)
        if file:
            Path(file).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, page, "exec"), {})
        elif language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                _typed(line, models or {}, size)
    return seen


def _typed(line: str, models: Mapping[str, Callable[[Path], None]], size: str) -> None:
    program, *args = shlex.split(line)
    if args[0] == "download" and program == "hf":
        models[args[1]](Path(args[args.index("--local-dir") + 1]))
        return
    if program == "python" and args[-1] == "&":
        SERVERS.append(subprocess.Popen([sys.executable, *args[:-1]]))
        _wait_for(int(args[-2]))
        return
    if program == "torchrun":
        subprocess.run([sys.executable, "-m", "torch.distributed.run", *args], check=True)
        return
    assert program == "instep"
    try:
        small = f"{SMALL[args[0]]} {f'--size {size}' if size else ''}".split() if models and args[0] in SMALL else []
        status = main([*args, *small])
    except SystemExit as stop:  # --help
        status = stop.code
    assert status == 0, line


def _wait_for(port: int) -> None:
    """Returns once something listens at a port of this machine."""
    until = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < until, f"nothing listens at {port}"
            time.sleep(0.05)
