"""Kind 7: rewards that fail, alone and in the middle of a run."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import torch

from faults.sandbox import Fault, Outcome, call
from instep.rewards.base import FunctionReward, RewardError, checked_scores
from instep.rewards.external import command
from instep.rewards.remote import HttpReward

THREE = json.dumps({"scores": [1, 2, 3]}).encode()
MEDIA, PROMPTS = torch.zeros(2, 3, 4, 4), ["a cat", "a dog"]


def raises(media, prompts):
    raise KeyError("no\nsuch key")


def exits(media, prompts):
    sys.exit(3)


FUNCTIONS: tuple[tuple[str, Callable[..., object], str], ...] = (
    ("raises an error of two lines", raises, r"raised KeyError: .*, at \S+rewards\.py, line \d+\. It was given media \(2, 3, 4, 4\).*'a cat'"),
    ("calls sys.exit(3)", exits, r"raised SystemExit: 3, at \S+rewards\.py, line \d+"),
    ("returns NaN for the second", lambda m, p: [1.0, float("nan")], r"returned nan for 1 of 2 samples, first for prompt 'a dog' \(sample 1"),
    ("returns infinity", lambda m, p: [float("inf"), 1.0], "returned inf for 1 of 2 samples, first for prompt 'a cat'"),
    ("returns one score for two samples", lambda m, p: [1.0], r"returned \(1,\) for 2 samples"),
    ("returns None", lambda m, p: None, "raised"),
    ("returns text", lambda m, p: ["good", "bad"], "raised"),
)
PROGRAMS = (
    ("ends with status 3", "import sys; sys.exit(3)", "ended with exit status 3"),
    ("prints three scores for any samples", "print(1); print(2); print(3)", "printed 3 scores for 1 samples; it gives one a sample"),
    ("prints words", "print('good'); print('bad')", "printed 'good' for .*every score is a finite number"),
    ("prints NaN", "print(1); print('nan')", "printed 'nan' for"),
    ("never ends", "import time; time.sleep(60)", "did not end within 0.5 seconds"),
)


def function(reward: Callable[..., object], pattern: str, folder: Path) -> Outcome:
    return call(lambda: checked_scores(FunctionReward(reward, "mine"), MEDIA, PROMPTS), pattern, folder, RewardError)


def program(code: str, pattern: str, folder: Path) -> Outcome:
    (folder / "score.py").write_text(code)
    reward = command(f"{sys.executable} -S -E score.py", timeout=0.5 if "sleep" in code else 30, retries=0)
    return call(lambda: reward.score(MEDIA, PROMPTS), pattern, folder, RewardError)


@contextmanager
def server(status: int, body: bytes) -> Iterator[str]:
    """A local server that answers everything alike; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            with suppress(ConnectionError):  # the client has read enough
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    here = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=here.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{here.server_port}/score"
    finally:
        here.shutdown()
        here.server_close()


def served(status: int, body: bytes, pattern: str, folder: Path) -> Outcome:
    with server(status, body) as address:
        return call(lambda: HttpReward(address, retries=0).score(MEDIA, PROMPTS), pattern, folder, RewardError)


def nobody(folder: Path) -> Outcome:
    return call(lambda: HttpReward("http://127.0.0.1:9/score", retries=0).score(MEDIA, PROMPTS), "cannot be asked about", folder, RewardError)


FAULTS = (
    *(Fault(7, f"a function {what}", "one line: reward, sample, prompt, file and line", partial(function, do, found)) for what, do, found in FUNCTIONS),
    *(Fault(7, f"a command {what}", "one line: what it did, on which sample", partial(program, code, found)) for what, code, found in PROGRAMS),
    Fault(7, "a server answers 500", "one line with its status", partial(served, 500, b"oops", "500")),
    Fault(7, "a server answers no JSON", "one line", partial(served, 200, b"<html>", "reward .*http")),
    Fault(
        7,
        "a server answers three scores for any samples",
        "one line",
        partial(served, 200, THREE, "answered 3 scores for 1 samples"),
    ),
    Fault(9, "a server answers 100 MB", "refused beyond the limit", partial(served, 200, b"1" * 100_000_000, "longer than|reward")),
    Fault(7, "no server is there", "one line with the fix", nobody),
)
