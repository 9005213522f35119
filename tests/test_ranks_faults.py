"""A process of several dies or hangs: what it leaves is whole, one of the others reports it, and the same command goes on in any number of processes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
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

from instep.core.files import recover
from instep.core.json_lines import read_rows
from instep.core.ranks import ALONE
from instep.report import write_report
from instep.training import checkpoint
from instep.training.loop import Interrupted
from instep.training.options import RunOptions
from instep.training.state_files import split

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
    assert not list(out.glob(".*")) and not list((out / "checkpoints").glob(".*")), "locks and torn files are gone"


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
    return done(folder, [{"count": 2, "out": folder / "killed", "fault": "checkpoint"}, *goes_on(folder / "state", (2,))])


def test_killed_in_the_middle_of_a_checkpoint_and_resumed_by_one_process(folder, alone, quick, monkeypatch):
    """The torn file is there and passed over; SIGUSR1 saves; neither resuming nor the report unpickles anything."""
    out = folder / "killed"
    torn = list((out / "checkpoints").glob(f".step-{DIES_AT:06d}.*.tmp"))
    assert len(torn) == 1 and (torn[0] / "tensors.safetensors").is_file() and not (torn[0] / "state.json").exists()
    check_left("checkpoint", out, quick[0])
    with nothing_unpickled(monkeypatch):
        with pytest.raises(Interrupted, match=f"SIGUSR1: saved at step {DIES_AT} of {STEPS}"):
            faulty_ranks.run(out, stops_at=DIES_AT)
        faulty_ranks.run(out)
        write_report([out], folder / "report.html")
    check_equal(out, alone)


def test_what_a_killed_export_left_is_removed_or_put_back(tmp_path):
    out, old, torn = (tmp_path / name for name in ("student", ".student.old-1", ".student.writing-1"))
    for there in ((out, old, torn), (old, torn)):
        for folder in there:
            folder.mkdir()
            (folder / "name").write_text(folder.name, encoding="utf-8")
        recover(out)
        assert [path.name for path in tmp_path.iterdir()] == ["student"] and (out / "name").read_text(encoding="utf-8") == there[0].name
        shutil.rmtree(out)


def goes_on(out: Path, counts: Sequence[int]) -> list[dict[str, Any]]:
    """A state after one step here, and jobs that take it on: each number of processes saves again what it has read, into OUT-COUNT, and takes one more step."""
    sharded_state.alone(out, 1)
    both = [({"steps": 0, "to": out.with_name(f"{out.name}-{count}")}, {"steps": 1}) for count in counts]
    return [{"count": count, "out": out, **job} for count, jobs in zip(counts, both, strict=True) for job in jobs]


def check_states(out: Path, counts: Sequence[int], other: Path) -> None:
    """Each number of processes has read the very state that the one before wrote, and the last is that of one process."""
    sharded_state.steps(out, ALONE, 0, out.with_name(f"{out.name}-1"))
    for step, count in enumerate((*counts, 1), 1):
        again = out.with_name(f"{out.name}-{count}") / f"step-{step:06d}"
        for name in ("tensors.safetensors", "state.json"):
            assert (again / name).read_bytes() == (out / again.name / name).read_bytes(), (count, name)
    shutil.copytree(out / "step-000001", other / "step-000001")
    sharded_state.alone(other, len(counts))
    mine, theirs = (split(checkpoint.load(folder / f"step-{len(counts) + 1:06d}")) for folder in (out, other))
    assert mine[0] == theirs[0], "cursor, controller, ratios and generators"
    for name, x in theirs[1].items():
        torch.testing.assert_close(mine[1][name], x, rtol=1e-5, atol=1e-6)


def test_processes_take_their_shards_of_a_state_and_leave_a_whole_one(folder, quick, tmp_path):
    """Weights, moments, averages, the reference, generators, cursor and controller go from one process to two and to one again, bit for bit."""
    assert quick[1:] == [[0, 0], [0, 0]], said(folder / "state", 0) + said(folder / "state", 1)
    check_states(folder / "state", (2,), tmp_path)


@pytest.mark.slow
def test_a_state_goes_from_one_process_to_two_to_four_to_one(tmp_path):
    assert all(status == 0 for ended in done(tmp_path, goes_on(tmp_path / "state", (2, 4))) for status in ended)
    check_states(tmp_path / "state", (2, 4), tmp_path / "alone")


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


REWARD = """
import os, pathlib, signal

died, scored = pathlib.Path("died"), []


def brightness(media, prompts):
    scored.append(len(media))
    if len(scored) == 3 and os.environ.get("RANK") == "1":
        if not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        # what SLURM sends to every process before it ends an allocation
        os.kill(os.getppid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
    return media.flatten(1).mean(1)
"""


@pytest.mark.slow
def test_torchrun_starts_a_run_again_which_goes_on_and_saves_at_a_signal_of_slurm(tmp_path):
    """A process is killed in iteration 2; both start again from the checkpoint of step 1, and save at SIGUSR1 in iteration 3."""
    (tmp_path / "brightness_of.py").write_text(REWARD, encoding="utf-8")
    options = "--model digits --steps 2 --batch 4 --group 2 --top-n 1 --distil 0 --iterations 4 --critic-updates 1 --save-every 1 --probe-every 9"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "instep", "train"]
    command += ["dm-align-group", *options.split(), "--no-evaluate", "--reward", "brightness_of:brightness", "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "OMP_NUM_THREADS": "1"}
    ignoring = ["bash", "-c", 'trap "" USR1; exec "$@"', "bash", *command]
    ended = subprocess.run(ignoring, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500)
    assert (tmp_path / "died").exists() and ended.returncode != 0
    assert ended.stderr.count("stopped by SIGUSR1: saved at step 3 of 4") == 1, ended.stderr
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None and checkpoint.step_of(newest) == 3
    assert [row["step"] for row in read_rows(tmp_path / "run" / "log.jsonl")] == [0, 1, 2, 3]


def test_a_patience_of_no_length_is_refused():
    for minutes in (0, -1, float("nan"), 1e9):
        with pytest.raises(ValueError, match="patience: .* is not allowed; .*minutes"):
            RunOptions(patience=minutes)
