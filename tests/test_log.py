"""A run's log: rows, what a resume drops, TensorBoard's copy, and what is shown without a terminal."""

from __future__ import annotations

import errno
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from instep.core.json_lines import read_rows, trim
from instep.training.health import Finding, HealthMonitor
from instep.training.log import RunLog


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def board(folder) -> dict[str, dict[int, float]]:
    """Scalars of the TensorBoard files: name -> step -> value."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen = accumulator.EventAccumulator(str(folder / "tensorboard"))
    seen.Reload()
    return {tag: {event.step: event.value for event in seen.Scalars(tag)} for tag in seen.Tags()["scalars"]}


def test_rows_are_appended_and_readable_at_once(tmp_path):
    log = RunLog(tmp_path)
    log.row(0, {"stage": "start", "probe/mean_brightness": 0.25})
    assert rows(tmp_path) == [{"step": 0, "stage": "start", "probe/mean_brightness": 0.25}], "before the log is closed"
    log.row(1, {"stage": "distil", "critic/fake": 0.5})
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [0, 1]


def test_values_that_are_not_finite_are_null(tmp_path):
    """JSON has no nan; a reader in any language gets null, and the other values are whole."""
    log = RunLog(tmp_path)
    log.row(1, {"stage": "distil", "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1 + 0.2, "n": 3})
    log.close()
    text = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert rows(tmp_path) == [{"step": 1, "stage": "distil", "a": None, "b": None, "c": None, "d": 0.1 + 0.2, "n": 3}]


def test_a_resume_drops_what_will_be_repeated(tmp_path):
    """Rows after the checkpoint, and a line that a kill left half written."""
    log = RunLog(tmp_path)
    for step in range(6):
        log.row(step, {"x": step / 3})
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "x": 2.')
    again = RunLog(tmp_path, resume_step=3)
    again.row(4, {"x": 40.0})
    again.close()
    assert [(row["step"], row["x"]) for row in rows(tmp_path)] == [(0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 40.0)]


@pytest.mark.parametrize("torn", [b'{"step": 2, "te', b"\0\0\0\0", b'{"step": 2, "x": "\xc3'])
def test_torn_lines(tmp_path, torn):
    """Cut in a name, zeros that a crashed disk leaves, and half a character."""
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"step": 1, "x": 0.1}\n' + torn)
    assert read_rows(file) == [{"step": 1, "x": 0.1}]
    trim(file, 5)
    assert file.read_bytes() == b'{"step": 1, "x": 0.1}\n'


def test_trim_without_a_file(tmp_path):
    trim(tmp_path / "log.jsonl", 3)
    assert list(tmp_path.iterdir()) == [] and read_rows(tmp_path / "log.jsonl") == []


def test_a_new_run_in_an_old_log_begins_anew(tmp_path):
    for _ in range(2):
        log = RunLog(tmp_path)
        log.row(0, {"x": 1.0})
        log.close()
    assert len(rows(tmp_path)) == 1


@pytest.fixture
def counted(monkeypatch):
    """Event files of one process and second are told apart by a counter, and read in the order of their names: 10 before 9."""
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(0))


def test_tensorboard_has_the_same_scalars(tmp_path):
    log = RunLog(tmp_path)
    log.row(1, {"stage": "distil", "critic/fake": 0.5, "bad": math.nan})
    log.row(2, {"stage": "distil", "critic/fake": 0.25, "force/dm/norm": 3})
    assert board(tmp_path) == {"critic/fake": {1: 0.5, 2: 0.25}, "force/dm/norm": {2: 3.0}}, "what a killed run leaves: it never closes"
    log.close()


def test_tensorboard_forgets_what_a_resume_repeats(tmp_path, counted):
    log = RunLog(tmp_path)
    for step in range(5):
        log.row(step, {"x": float(step)})
    log.close()
    again = RunLog(tmp_path, resume_step=2)
    again.row(3, {"x": 30.0})
    again.close()
    assert board(tmp_path)["x"] == {0: 0.0, 1: 1.0, 2: 2.0, 3: 30.0}


def test_tensorboard_forgets_a_run_without_a_checkpoint(tmp_path, counted):
    for value, steps in ((1.0, 3), (2.0, 2)):
        log = RunLog(tmp_path)
        for step in range(steps):
            log.row(step, {"x": value})
        log.close()
    assert board(tmp_path)["x"] == {0: 2.0, 1: 2.0}


def test_a_run_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = RunLog(tmp_path)
    log.row(1, {"x": 1.0})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_plain_lines_without_a_terminal(tmp_path, capsys):
    """One line at the start, one at the end, none in between within seconds; no control characters."""
    log = RunLog(tmp_path)
    with log.progress(4, initial=0):
        log.row(0, {"stage": "start", "probe/monitor_both": 0.5})
        for step in range(1, 5):
            log.row(step, {"stage": "distil", "wall_s": 0.5, "critic/fake": 0.1 * step, "force/cosine/dm~group": -0.25})
    log.close()
    out, err = capsys.readouterr()
    first, last = err.splitlines()
    assert out == "" and "\x1b" not in err and "\r" not in err
    assert first == "start    0/4  eta ?  monitor 0.5"
    assert re.fullmatch(r"distil   4/4  eta 0:00  s/it 0\.5  fake 0\.25  monitor 0\.5  cos\(dm~group\) -0\.25", last)


def test_held_figures_are_shown_with_their_bounds(tmp_path):
    log = RunLog(tmp_path)
    log.row(5, {"hold/multiplier": 0.5, "hold/diversity": 0.97, "hold/diversity/bound": 0.95, "hold/matching": 1.02, "hold/matching/bound": 1.1})
    log.row(6, {"wall_s": 1.0})
    log.close()
    assert log.metrics() == "s/it 1  multiplier 0.5  diversity 0.970 (≥ 0.95)  matching 1.020 (≤ 1.1)"


def test_time_left_counts_from_where_a_run_resumed(tmp_path, monkeypatch):
    import instep.training.log as module

    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    log = RunLog(tmp_path, resume_step=100)
    with log.progress(160, initial=100):
        assert log._left(100) == "?"
        now[0] += 30.0
        assert log._left(110) == "2:30", "ten iterations took 30 s and 50 are left"
    log.close()


def test_findings_are_said_whole(tmp_path, capsys):
    """On one line however long, and brackets in a text are text."""
    log = RunLog(tmp_path)
    text = "media [B, 3, F, H, W] " + "and so on " * 20
    log.say(Finding(3, "warn", "some", text.strip()))
    log.close()
    assert capsys.readouterr().err == f"warn {text.strip()}\n"


def test_a_tracker_gets_every_row_and_cannot_cost_the_run(tmp_path, capsys):
    seen = []
    (tmp_path / "a").mkdir()
    log = RunLog(tmp_path / "a", tracker=lambda step, scalars: seen.append((step, dict(scalars))))
    log.row(1, {"stage": "distil", "loss": 0.5, "bad": float("nan")})
    log.row(2, {"loss": 0.25})
    log.close()
    assert seen == [(1, {"loss": 0.5}), (2, {"loss": 0.25})]

    calls = []

    def breaks(step, scalars):
        calls.append(step)
        raise ConnectionError("no route to host")

    (tmp_path / "b").mkdir()
    log = RunLog(tmp_path / "b", tracker=breaks)
    for step in (1, 2):
        log.row(step, {"loss": 0.5})
    log.close()
    assert calls == [1] and len((tmp_path / "b" / "log.jsonl").read_text().splitlines()) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the tracker raised ConnectionError: no route to host; it is not called again, log.jsonl goes on" in said


FULL = Path("/dev/full")  # takes nothing: "no space left on device", from the kernel itself


@pytest.mark.skipif(not FULL.exists(), reason="this platform has no /dev/full")
@pytest.mark.parametrize("name", ["log.jsonl", "health.jsonl"])
def test_a_full_disk_is_said_in_one_line(tmp_path, name):
    """What was not written, what is intact, what to do; and closing the log afterwards does not hide it."""
    (tmp_path / name).symlink_to(FULL)
    log, monitor = RunLog(tmp_path), HealthMonitor(tmp_path)
    broken = {"probe/mean_brightness": math.nan}  # a row with a finding
    with pytest.raises(OSError) as caught:
        try:
            log.row(1, broken)
            monitor.row(1, broken)
        finally:
            log.close()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.strerror == (
        f"the disk is full: a row of {tmp_path / name} was not written and the checkpoints are intact; free some space and repeat the same command"
    )


LIMITED = """
import resource, sys
from pathlib import Path
from instep.core.files import append_text
file = Path({file!r})
append_text(file, "first\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
try:
    append_text(file, "second\\n")
except OSError as error:
    print(error.strerror)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
append_text(file, "third\\n")
"""


def test_a_row_is_whole_or_not_there(tmp_path):
    """A limit of 10 bytes takes 4 of the 7 of the second row: they are taken back."""
    pytest.importorskip("resource")
    file = tmp_path / "log.jsonl"
    child = subprocess.run([sys.executable, "-c", LIMITED.format(file=str(file))], capture_output=True, text=True, check=True)
    assert child.stdout.startswith(f"File too large: a row of {file} was not written") and "raise the limit on the size of files (ulimit -f)" in child.stdout
    assert file.read_text() == "first\nthird\n"


def test_tensorboard_on_a_full_disk(tmp_path, monkeypatch):
    class Full:
        def add_scalar(self, *args):
            pass

        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

        close = flush

    monkeypatch.setattr("instep.training.log._tensorboard", lambda *args: Full())
    log = RunLog(tmp_path)
    with pytest.raises(OSError, match="the disk is full: TensorBoard's copy of the log in .*tensorboard was not written and the checkpoints are intact"):
        log.row(1, {"x": 1.0})
    log.close()
    assert rows(tmp_path) == [{"step": 1, "x": 1.0}]
