"""A process of several dies or hangs: what it leaves is whole, one of the others reports it, and the same command goes on in any number of processes."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faulty_ranks
import pytest
import sharded_state
import torch
from faulty_ranks import DIES_AT, FAULTS, STEPS
from test_run import same

from instep.core.json_lines import read_rows
from instep.report import write_report
from instep.training import checkpoint
from instep.training.loop import Interrupted

# the fault of each job of the fast suite, and the step of the newest checkpoint that it leaves
LEFT = {"rollout": DIES_AT - 1, "critic": DIES_AT - 1, "checkpoint": DIES_AT - 1, "export": STEPS, "hangs": DIES_AT - 1}


def done(folder: Path, jobs: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The exit status of each process of each job."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs, default=str), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, faulty_ranks.__file__, str(file)], env=environment, start_new_session=True)
    try:
        assert process.wait(timeout=1500) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return json.loads(Path(f"{file}.ended").read_text(encoding="utf-8"))


def said(out: Path, rank: int) -> str:
    return out.with_name(f"{out.name}.{rank}.txt").read_text(encoding="utf-8")


def check_left(fault: str, out: Path, ended: Sequence[int]) -> None:
    """One process was killed, the other reports that in one line; the newest checkpoint is whole, and no export is there in part."""
    who = FAULTS[fault][0]
    assert ended[who] == -signal.SIGKILL and ended[1 - who] == 2, [said(out, rank) for rank in range(2)]
    assert said(out, 1 - who).count("error: another process of this run has ended or does not answer") == 1
    assert "error: " not in said(out, who)
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None and checkpoint.step_of(newest) == LEFT[fault]
    assert all(torch.isfinite(x).all() for x in checkpoint.load(newest)["roles"]["student"].values())
    assert not (out / "student").exists(), "an export is there whole or not at all"
    steps = [row["step"] for row in read_rows(out / "log.jsonl")]
    assert steps[-1] - newest_of(out) in (0, 1) and steps == [*range(steps[-1] + 1)]


def newest_of(out: Path) -> int:
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    return checkpoint.step_of(newest)


def check_equal(out: Path, other: Path, exact: bool = False) -> None:
    """Two runs ended alike: weights, moments, averages and cursors, and an export; exactly, or up to the order in which gradients are added."""
    mine, theirs = (checkpoint.load(checkpoint.latest(folder / "checkpoints")) for folder in (out, other))
    assert mine["step"] == theirs["step"] == STEPS and mine["source"] == theirs["source"] and mine["steps"] == theirs["steps"]
    assert torch.equal(mine["rng"]["run"], theirs["rng"]["run"])
    limits = (0, 0) if exact else (2e-4, 2e-6)
    for part in ("roles", "ema"):
        for name, tensors in theirs[part].items():
            for key, x in tensors.items():
                torch.testing.assert_close(mine[part][name][key], x, rtol=limits[0], atol=limits[1])
    assert (out / "student" / "instep_export.json").is_file()
    assert [path.name for path in out.iterdir() if path.name.startswith(".") and "writing" not in path.name] == [], "locks and torn files are gone"


@contextmanager
def nothing_unpickled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a run's folder was unpickled")

    with monkeypatch.context() as patch:
        for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
            patch.setattr(owner, name, refuse)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    """The run without any fault, in one process."""
    faulty_ranks.run(folder / "alone")
    return folder / "alone"


@pytest.fixture(scope="module")
def quick(folder) -> list[list[int]]:
    """What the fast suite has time for: a kill in the middle of a checkpoint, and a state that two processes take from one."""
    sharded_state.alone(folder / "state", 1)
    return done(folder, [{"count": 2, "out": folder / "killed", "fault": "checkpoint"}, {"count": 2, "out": folder / "state", "steps": 1}])


def test_killed_in_the_middle_of_a_checkpoint_and_resumed_by_one_process(folder, alone, quick, monkeypatch):
    """The torn file is there and passed over; SIGUSR1 saves; neither resuming nor the report unpickles anything."""
    out = folder / "killed"
    torn = [path for path in (out / "checkpoints").glob(f".step-{DIES_AT:06d}.*.tmp")]
    assert len(torn) == 1 and (torn[0] / "tensors.safetensors").is_file() and not (torn[0] / "state.json").exists()
    check_left("checkpoint", out, quick[0])
    with nothing_unpickled(monkeypatch):
        with pytest.raises(Interrupted, match=f"SIGUSR1: saved at step {DIES_AT} of {STEPS}"):
            faulty_ranks.run(out, stops_at=DIES_AT)
        faulty_ranks.run(out)
        write_report([out], folder / "report.html")
    check_equal(out, alone)
    assert not list((out / "checkpoints").glob(".*"))


def test_processes_take_their_shards_of_a_state_and_leave_a_whole_one(folder, quick, tmp_path):
    """Weights, moments, averages, the reference, generators, cursor and controller go on from one process in two and in one again, bit for bit."""
    assert quick[1] == [0, 0], said(folder / "state", 0) + said(folder / "state", 1)
    check_states(folder / "state", tmp_path, 3)


def check_states(folder: Path, other: Path, count: int) -> None:
    """After one more step here the checkpoints are those of one process, byte for byte."""
    sharded_state.alone(folder, 1)
    (other / "step-000001").symlink_to(folder / "step-000001")
    sharded_state.alone(other, count - 1)
    for step in range(1, count + 1):
        for name in ("tensors.safetensors", "state.json"):
            assert (folder / f"step-{step:06d}" / name).read_bytes() == (other / f"step-{step:06d}" / name).read_bytes(), (step, name)


@pytest.mark.slow
def test_a_state_goes_from_one_process_to_two_to_four_to_one(tmp_path):
    out, other = tmp_path / "state", tmp_path / "alone"
    other.mkdir()
    sharded_state.alone(out, 1)
    assert done(tmp_path, [{"count": count, "out": out, "steps": 1} for count in (2, 4)]) == [[0] * 2, [0] * 4]
    check_states(out, other, 4)


@pytest.mark.slow
def test_killed_anywhere_and_resumed_in_any_number(alone, tmp_path):
    """Two processes end with the very results of two that nothing happened to, and one with theirs up to rounding."""
    jobs: list[dict[str, Any]] = [{"count": 2, "out": tmp_path / "whole"}]
    faults = ("rollout", "critic", "checkpoint", "export")
    for fault in faults:
        out = tmp_path / fault
        jobs += [
            {"count": 2, "out": out, "fault": fault},
            {"count": 2, "out": tmp_path / f"{fault}-2", "copy_of": out},
            {"count": 1, "out": tmp_path / f"{fault}-1", "copy_of": out, "stops_at": DIES_AT},
            {"count": 1, "out": tmp_path / f"{fault}-1-1", "copy_of": tmp_path / f"{fault}-1"},
            {"count": 2, "out": tmp_path / f"{fault}-1-2", "copy_of": tmp_path / f"{fault}-1"},
        ]
    ended = done(tmp_path, jobs)
    assert ended[0] == [0, 0]
    check_equal(tmp_path / "whole", alone)
    for i, fault in enumerate(faults):
        killed, two, stopped, one, again = ended[1 + 5 * i : 6 + 5 * i]
        check_left(fault, tmp_path / fault, killed)
        # the run whose export was torn has no iteration left to be stopped in
        assert (two, stopped, one, again) == ([0, 0], [0 if fault == "export" else 130], [0], [0, 0])
        check_equal(tmp_path / f"{fault}-2", tmp_path / "whole", exact=True)
        for way in ("1-1", "1-2"):
            check_equal(tmp_path / f"{fault}-{way}", alone)
    same(tmp_path / "rollout-2", tmp_path / "whole")


@pytest.mark.slow
def test_a_process_that_hangs_is_waited_for_as_long_as_patience_allows(tmp_path):
    """The other one ends after half a minute, with the reason, and leaves the newest checkpoint."""
    (ended,) = done(tmp_path, [{"count": 2, "out": tmp_path / "run", "fault": "hangs", "patience": 0.5, "ends": 3}])
    check_left("hangs", tmp_path / "run", ended)
