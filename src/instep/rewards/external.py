"""Any command as a reward: it gets the paths of PNG files and their prompts, and prints a number for each sample."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from instep.rewards.base import RewardError
from instep.rewards.samples import BatchFailed, Sample, count, finite, isolated, png, positive, samples_of, span, tail


@dataclass(frozen=True)
class CommandReward:
    """Runs `argv` once a batch, without a shell, in the working directory.

    Standard input is one line of JSON a sample: {"index": 0, "prompt": "a seven", "files": ["/.../0/0000.png", ...]}, one file for an image, one a frame
    for a video (animated formats merge equal frames). Standard output is one number a line, in the same order, or one JSON list; a command
    writes all other output to standard error. The files are deleted when it ends.

    `timeout` in seconds is for one batch: its process group is killed then. A command that ends with another status than 0, or in no time, is run again
    `retries` times. Then the batch is split in halves, so that the error names the sample (not after a time-out, since that could take hours).
    """

    argv: tuple[str, ...]
    timeout: float = 300.0
    retries: int = 1
    differentiable = False
    space: ClassVar[Literal["pixel", "latent"]] = "pixel"

    def __post_init__(self) -> None:
        if not self.argv:
            raise ValueError("command: it is empty; write for example command:python score.py")
        if shutil.which(self.argv[0]) is None:
            raise ValueError(f"command: the program {self.argv[0]!r} of {shlex.join(self.argv)!r} is not found or not executable; give its path")
        positive(timeout=self.timeout)
        count(retries=self.retries)

    @property
    def name(self) -> str:
        """The command; the time-out is not part of the name."""
        return "command:" + shlex.join(self.argv)

    def score(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] of media [B, 3, H, W] or [B, 3, F, H, W] in [0, 1]."""
        return torch.tensor(isolated(self.name, self._attempt, samples_of(media, prompts), self.retries), device=media.device)

    def _attempt(self, samples: Sequence[Sample], retries: int) -> list[float]:
        with tempfile.TemporaryDirectory(prefix="instep-reward-", ignore_cleanup_errors=True) as folder:
            given = "".join(json.dumps(_files(sample, Path(folder))) + "\n" for sample in samples)
            for left in range(retries, -1, -1):
                try:
                    return finite(self.name, samples, self._numbers(self._run(given, samples)), "the command printed")
                except (_Crashed, _TooSlow) as failure:
                    if left:
                        continue
                    times = "" if not retries else f", {retries + 1} times"
                    if isinstance(failure, _TooSlow):
                        raise RewardError(
                            f"reward {self.name!r}: {failure}{times}, on {span(samples)}; give it more time (timeout) or smaller batches"
                        ) from None
                    raise BatchFailed(f"{failure}{times}") from None
        raise AssertionError("unreachable")

    def _run(self, given: str, samples: Sequence[Sample]) -> str:
        """Standard output of one run."""
        try:
            process = subprocess.Popen(
                self.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise RewardError(f"reward {self.name!r} cannot be started for {span(samples)}: {error}") from error
        try:
            out, err = process.communicate(given, timeout=self.timeout)
        except subprocess.TimeoutExpired as slow:
            stderr = _end(process) or (slow.stderr or b"").decode("utf-8", "replace")
            raise _TooSlow(f"the command did not end within {self.timeout:g} seconds" + _stderr_text(stderr)) from None
        except BaseException:
            _end(process)
            raise
        if process.returncode:
            how = f"exit status {process.returncode}" if process.returncode > 0 else f"signal {signal.Signals(-process.returncode).name}"
            raise _Crashed(f"the command ended with {how}" + _stderr_text(err))
        return out

    def _numbers(self, out: str) -> list[object]:
        if not out.lstrip().startswith("["):
            return [line.strip() for line in out.splitlines() if line.strip()]
        try:
            return list(json.loads(out))
        except (ValueError, RecursionError) as error:
            raise BatchFailed(f"the command printed {tail(out, 1, 80)!r}, which begins like a JSON list and is none ({error})") from None


class _Crashed(Exception):
    pass


class _TooSlow(Exception):
    pass


def command(text: str, timeout: float = 300.0, retries: int = 1) -> CommandReward:
    """A command line as a reward, quoted as for a POSIX shell, although no shell runs it: no pipes, no variables, no wildcards."""
    try:
        argv = tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"command: {text!r} cannot be read ({error}); close every quote") from None
    if shell := next((word for word in shlex.split(text, posix=False) if word in ("|", "||", "&&", "&", ";", ">", ">>", "<")), None):
        raise ValueError(f"command: {text!r} holds {shell!r}, which only a shell understands, and none runs; put the line into a script and name that")
    return CommandReward(argv, timeout, retries)


def _files(sample: Sample, folder: Path) -> dict[str, object]:
    """One line of what the command reads, and the files it names."""
    own = folder / str(sample.index)
    own.mkdir()
    files = [own / f"{i:04d}.png" for i in range(len(sample.frames))]
    for file, frame in zip(files, sample.frames, strict=True):
        file.write_bytes(png(frame))
    return {"index": sample.index, "prompt": sample.prompt, "files": [str(file) for file in files]}


def _end(process: subprocess.Popen[str]) -> str:
    """Kills a command and its child processes; returns its standard error so far."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # a grandchild in a session of its own may keep the pipe open for ever
    with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
        return process.communicate(timeout=2)[1]
    return ""


def _stderr_text(err: str) -> str:
    return f" and wrote to standard error: {tail(err)}" if err.strip() else " and wrote nothing to standard error"
