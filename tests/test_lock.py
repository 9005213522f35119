"""The lock on a run's folder, against real processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from instep.core import files, lock
from instep.core.lock import run_lock

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="this platform has no such lock")

HOLDER = """
import sys
from pathlib import Path
from instep.core.lock import run_lock
with run_lock(Path({folder!r})):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path):
    """Another process that holds `folder` until it is killed or its input ends."""
    child = subprocess.Popen([sys.executable, "-c", HOLDER.format(folder=str(folder))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def test_one_process_a_folder(tmp_path):
    """The second is told who holds it; it is free when the first has ended, and nothing of the lock is left."""
    folder = tmp_path / "runs" / "one"
    with holder(folder) as first:
        with pytest.raises(ValueError, match=rf"out: {folder} is in use by another run \(process {first.pid} on .*choose another --out"), run_lock(folder):
            pytest.fail("held twice")
        with run_lock(tmp_path / "runs" / "other"):
            assert (tmp_path / "runs" / "other" / lock.NAME).is_file(), "another folder is another run"
        first.communicate("")
        assert first.returncode == 0
    assert not folder.exists(), "a folder that was made for the lock goes with it"
    with run_lock(folder):
        (folder / "file").write_text("kept")
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_kill_9_frees_the_folder(tmp_path):
    with holder(tmp_path) as first:
        first.kill()
        first.wait()
        assert str(first.pid) in (tmp_path / lock.NAME).read_text(), "the dead process's file is there still"
        with run_lock(tmp_path):
            assert str(os.getpid()) in (tmp_path / lock.NAME).read_text() and str(first.pid) not in (tmp_path / lock.NAME).read_text()
    assert list(tmp_path.iterdir()) == []


def test_an_error_frees_the_folder_and_an_empty_one_stays(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), run_lock(folder):
            raise KeyboardInterrupt
    assert folder.is_dir() and list(folder.iterdir()) == []


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt is a file; give a folder"), run_lock(tmp_path / "notes.txt"):
        pytest.fail("held a file")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_holder_that_leaves_between_open_and_lock(tmp_path, monkeypatch):
    """What was opened has lost its name by then: a lock on it would hold nothing, because the next process makes a new file."""
    first, real = run_lock(tmp_path / "run"), os.open
    first.__enter__()

    def opens(*args):
        handle = real(*args)
        monkeypatch.setattr(lock.os, "open", real)
        first.__exit__(None, None, None)
        return handle

    monkeypatch.setattr(lock.os, "open", opens)
    with run_lock(tmp_path / "run"), pytest.raises(ValueError, match="in use"), run_lock(tmp_path / "run"):
        pytest.fail("held twice")


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Some network mounts know none: the run goes on without one. Other errors are errors."""

    def refuses(number):
        def flock(*args):
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(lock.fcntl, "flock", refuses(errno.ENOLCK))
    with run_lock(tmp_path), run_lock(tmp_path):
        pass
    monkeypatch.setattr(lock.fcntl, "flock", refuses(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), run_lock(tmp_path):
        pass
    monkeypatch.setattr(lock, "fcntl", None)
    with run_lock(tmp_path), run_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys
from pathlib import Path
from instep.core.files import {kind}
with {kind}(Path(sys.argv[1]), "thing") as there:
    (there / "name" if there.is_dir() else there).write_text("first")
    print("half", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["atomic_dir", "atomic_file"])
def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(kind, tmp_path):
    out = tmp_path / "a[b]"
    command = [sys.executable, "-c", WRITER.format(kind=kind), str(out)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "half\n"
        for killed in (False, True):
            if killed:
                child.kill()
                child.wait()
            with getattr(files, kind)(out, "thing") as there:
                (there / "name" if there.is_dir() else there).write_text("second")
                between = len(list(tmp_path.glob(".*")))
            assert between == 2 - killed, "the half of the other, and this one's"
            assert (out / "name" if out.is_dir() else out).read_text() == "second" and len(list(tmp_path.glob(".*"))) == 1 - killed
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def test_a_folder_that_a_living_writer_moved_aside_is_not_put_back(tmp_path, monkeypatch):
    """Between its two renames nothing has the folder's name."""
    out, real = tmp_path / "out", os.replace

    def meanwhile(old: Path, new: Path) -> None:
        real(old, new)
        if ".old-" in Path(new).name:
            files.recover(out)
            assert not out.exists() and new.is_dir()

    out.mkdir()
    monkeypatch.setattr(os, "replace", meanwhile)
    with files.atomic_dir(out, "thing") as there:
        (there / "name").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "name"]
