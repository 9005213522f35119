"""Checkpoints that a thread writes: the same files, of the state as it was, and whole whatever ends the process."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from every_recipe import family, small
from fast import slow_but
from test_checkpoint import is_state_of, state_of
from test_run import EVERY, PROMPTS, SMALL, brightness, same
from test_run import family as wan

from instep.recipes.dm_align import dm_align_group
from instep.training import checkpoint, loop
from instep.training.execution import Execution
from instep.training.loop import Interrupted
from instep.training.run import train
from instep.training.saving import CheckpointWriter, in_background


class Gate:
    """Lets writes of checkpoints begin when it is opened, and notes the threads that write."""

    def __init__(self, monkeypatch) -> None:
        self.opened, self.threads, self.began = threading.Event(), [], threading.Event()
        real = checkpoint.write_state

        def write_state(*args, **kwargs):
            self.threads.append(threading.current_thread())
            self.began.set()
            assert self.opened.wait(30)
            return real(*args, **kwargs)

        monkeypatch.setattr(checkpoint, "write_state", write_state)


def go(out: Path):
    return train(dm_align_group(**SMALL), wan(), out=out, prompts=PROMPTS, reward=brightness, options=EVERY)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_where_a_thread_writes():
    assert in_background(torch.device("cuda"), Execution()) and in_background(torch.device("mps"), Execution())
    assert not in_background(torch.device("cpu"), Execution())
    assert not in_background(torch.device("cuda"), Execution(offload=True)), "the state is in host memory, which has no room for it twice"


def test_the_files_are_the_same(tmp_path):
    """Also of tensors that are shared, not contiguous, empty or in bfloat16; and old checkpoints are removed alike."""
    x = torch.randn(6, 4)
    odd = {"tied": x, "again": {"tied": x}, "part": x[:3], "turned": x.T, "none": torch.zeros(0), "half": x.bfloat16(), "pair": (x[1], 2)}
    for background in (False, True):
        writer = CheckpointWriter(tmp_path / str(background), 2, background=background)
        for step in range(4):
            writer.save(step, {**odd, **state_of(step)}, protect=(0,))
        writer.wait()
    there = files(tmp_path / "True")
    assert there == files(tmp_path / "False")
    assert {name.split("/")[0] for name in there} == {"step-000000", "step-000002", "step-000003"}


def test_the_state_is_that_of_the_step_and_one_is_in_flight(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    writer, state = CheckpointWriter(tmp_path, 5, background=True), state_of(1)
    writer.save(1, state)
    state["a"].add_(1)
    state["list"].append("later")
    assert gate.began.wait(30) and not list(tmp_path.iterdir())
    second = threading.Thread(target=writer.save, args=(2, state_of(2)))
    second.start()
    second.join(0.3)
    assert second.is_alive() and len(gate.threads) == 1, "the second one waits for the first"
    gate.opened.set()
    second.join(30)
    writer.wait()
    assert is_state_of(checkpoint.load(tmp_path / "step-000001"), 1) and is_state_of(checkpoint.load(tmp_path / "step-000002"), 2)
    assert threading.main_thread() not in gate.threads and not gate.threads[0].daemon


def test_what_went_wrong_is_raised_once(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = CheckpointWriter(tmp_path, 5, background=True)
    writer.save(1, state_of(1))
    writer.wait()
    for ask in (writer.wait, lambda: writer.save(3, state_of(3))):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_write", full)
            writer.save(2, state_of(2))
            writer.join()
        with pytest.raises(OSError, match="the disk is full.*step-000002 was not written and the ones before it are intact"):
            ask()
        writer.check()
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    with pytest.raises(ValueError, match="state: 'f' is a"):
        writer.save(3, {"f": object()})


@pytest.mark.parametrize("name", slow_but(["dm-align-group"], ["dmd2", "dm-align-group"]))
def test_a_run_writes_the_same_checkpoints(tmp_path, monkeypatch, name):
    def run(background: bool) -> dict[str, bytes]:
        monkeypatch.setattr(loop, "in_background", lambda device, execution: background)
        out = tmp_path / str(background)
        # a checkpoint holds the global generators too
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        train(small(name), family(), out=out, prompts=PROMPTS, reward=brightness, options=replace(EVERY, keep=9))
        return files(out / "checkpoints")

    assert run(True) == run(False) != {}


def test_a_run_ends_at_the_step_after_a_write_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "in_background", lambda device, execution: True)
    real, steps = checkpoint.write_state, []

    def fails(folder, step, *args, **kwargs):
        if step == 3:
            raise OSError(errno.EIO, "Input/output error")
        return real(folder, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "write_state", fails)
    iteration = loop.iteration
    monkeypatch.setattr(loop, "iteration", lambda *args: steps.append(1) or iteration(*args))
    with pytest.raises(OSError, match="Input/output"):
        go(tmp_path / "run")
    assert len(steps) in (3, 4) and checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-000002"


def test_an_interrupted_run_waits_and_goes_on(tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    go(whole)
    monkeypatch.setattr(loop, "in_background", lambda device, execution: True)
    write, iteration, calls = checkpoint.write_state, loop.iteration, []

    def slow(*args, **kwargs):
        time.sleep(0.3)
        return write(*args, **kwargs)

    def signalled(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return iteration(*args)

    monkeypatch.setattr(checkpoint, "write_state", slow)
    monkeypatch.setattr(loop, "iteration", signalled)
    with pytest.raises(Interrupted, match="SIGINT: saved at step 3"):
        go(out)
    assert checkpoint.latest(out / "checkpoints").name == "step-000003"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    go(out)
    same(whole, out)


ENDLESS = """
import sys, itertools, torch
sys.path.insert(0, {tests!r})
from test_checkpoint import state_of
from instep.training.saving import CheckpointWriter
writer = CheckpointWriter(__import__("pathlib").Path({out!r}), 2, background=True)
for step in itertools.count({first}):
    state = state_of(step)
    writer.save(step, state)
    print(step, flush=True)
    if step == {last}:
        break
"""


def test_killed_at_any_moment_the_newest_whole_one_is_there(tmp_path):
    """SIGKILL in the middle of writes, again and again in one folder; a process that ends by itself waits for its last checkpoint."""
    last = -1
    for delay in torch.rand(2, generator=torch.Generator().manual_seed(0)).tolist():
        code = ENDLESS.format(tests=str(Path(__file__).parent), out=str(tmp_path), first=last + 1, last=-1)
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        begun = [int(child.stdout.readline()) for _ in range(3)]
        time.sleep(0.2 * delay)
        child.send_signal(signal.SIGKILL)
        begun += [int(line) for line in child.stdout.read().split("\n")[:-1]]
        child.wait()
        newest = checkpoint.latest(tmp_path)
        last = checkpoint.step_of(newest)
        # the last that was begun may be torn, and its number not yet be printed
        assert begun[-1] - 1 <= last <= begun[-1] + 1 and is_state_of(checkpoint.load(newest), last)
    code = ENDLESS.format(tests=str(Path(__file__).parent), out=str(tmp_path), first=last + 1, last=last + 3)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    assert is_state_of(checkpoint.load(tmp_path / f"step-{last + 3:06d}"), last + 3)
    assert len(list(tmp_path.iterdir())) == 2, "nothing of the killed ones is left"
