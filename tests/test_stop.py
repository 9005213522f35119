"""Runs that stop themselves: a real hacked reward on a tiny random Wan, what is kept of it, and that it stays stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from little_drawn import whole_probes
from test_run import PROMPTS, family

from instep.methods.role_config import AdamWConfig
from instep.recipes.after import rl_after
from instep.recipes.common import Common
from instep.training import checkpoint, stop
from instep.training import loop as run_module
from instep.training import run as train_module
from instep.training.health import Finding, flags
from instep.training.options import RunOptions
from instep.training.run import train
from instep.training.stop import Probed

RECIPE = rl_after(Common(batch=4, steps=2, student=AdamWConfig(3e-3)), distil=0, iterations=8)


class Brightness:
    """A reward whose gradient brightens everything, whatever the prompt."""

    name, differentiable, space = "brightness", True, "pixel"

    def score(self, media, prompts):
        return media.mean((1, 2, 3, 4))


class Mild:
    """A monitor that likes what is a little brighter than the untrained student, and nothing brighter than that."""

    def metrics(self, media, prompts):
        return {"monitor_both": float((1 - 40 * (media.mean() - 0.5274).abs()).clamp(0, 1))}


def go(out: Path, stop_on: tuple[str, ...] = ("hacking",)):
    options = RunOptions(probe_every=1, save_every=1, keep=1, stop_on=stop_on)
    with whole_probes():
        return train(RECIPE, family(), out=out, prompts=PROMPTS, reward=Brightness(), monitor=Mild(), options=options)


def steps(out: Path) -> list[int]:
    return sorted(checkpoint.step_of(path) for path in checkpoint.every(out / "checkpoints"))


def exported(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next((out / "student" / "transformer").glob("*.safetensors")))


@pytest.fixture(scope="module")
def hacked(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "hacked"
    return go(out)


def shares(out: Path) -> dict[int, float]:
    return {row["step"]: row["probe/monitor_both"] for row in map(json.loads, (out / "log.jsonl").read_text().splitlines())}


def test_it_stops_goes_back_and_exports_what_it_went_back_to(hacked):
    out, stopped = hacked.out, hacked.stopped
    assert stopped is not None and stopped.flag == "hacking" and stopped.step < RECIPE.steps and shares(out).keys() == set(range(stopped.step + 1))
    before = {step: share for step, share in shares(out).items() if step < stopped.step - 1}  # two probes agree that it is hacked
    assert stopped.kept == max(before, key=before.__getitem__) and 0 < stopped.kept < stopped.step - 1, "neither the first nor the last: the monitor's choice"
    assert steps(out)[-1] == stopped.kept == hacked.state.step and json.loads((out / "stopped.json").read_text())["kept"] == stopped.kept
    ema = checkpoint.load(checkpoint.latest(out / "checkpoints"))["ema"]["student"]
    student = exported(out)
    assert ema.keys() and all(torch.equal(student[key], value) for key, value in ema.items())
    (raised,) = [r for r in flags(out) if r.flag == "hacking"]
    assert (raised.step, raised.cleared) == (stopped.step, None)
    assert f"stopped at step {stopped.step}, hacking: since stage reinforce" in str(stopped)
    assert f"kept the checkpoint of step {stopped.kept}: the monitor" in str(stopped)


def test_the_checkpoint_is_that_of_a_run_that_was_never_stopped(hacked, tmp_path, monkeypatch):
    """The same run without `stop_on` has the same rows and, at the step that was kept, the same weights; it goes on past the finding."""
    free, kept = tmp_path / "free", hacked.stopped.kept
    real = checkpoint.write_state
    monkeypatch.setattr(checkpoint, "write_state", lambda *args, keep, **more: real(*args, keep=99, **more))
    assert go(free, ()).stopped is None and steps(free)[-1] == RECIPE.steps
    assert [r.step for r in flags(free) if r.flag == "hacking"] == [hacked.stopped.step]
    one, other = (checkpoint.load(checkpoint.at(out / "checkpoints", kept)) for out in (free, hacked.out))
    for part in ("roles", "ema"):
        assert all(torch.equal(value, other[part]["student"][key]) for key, value in one[part]["student"].items())
    ours, theirs = ([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (hacked.out, free))
    plain = lambda rows: [{k: v for k, v in row.items() if k not in ("cpu_s", "wall_s")} for row in rows]  # noqa: E731
    assert plain(ours) == plain(theirs[: len(ours)])


def test_the_same_command_again_does_not_train(hacked, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "iteration", lambda *args: pytest.fail("it trained on"))
    before, log = exported(hacked.out), (hacked.out / "log.jsonl").read_bytes()
    again = go(hacked.out)
    assert again.stopped == hacked.stopped and (hacked.out / "log.jsonl").read_bytes() == log
    assert all(torch.equal(before[key], value) for key, value in exported(hacked.out).items())
    assert "stopped at step" in capsys.readouterr().out


class Killed(BaseException):
    pass


def test_killed_at_any_moment_it_ends_the_same(hacked, tmp_path, monkeypatch):
    """One run that dies in turn in the middle of training, with the finding said and nothing decided, while the record is written, with the record and
    the later checkpoints, and before the export."""
    out = tmp_path / "killed"

    def dies_at(module, name, count=1):
        real, calls = getattr(module, name), []

        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == count:
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, call)
            with pytest.raises(Killed):
                go(out)

    dies_at(run_module, "iteration", 3)
    dies_at(checkpoint, "write_state")
    dies_at(stop, "decide")
    assert not (out / "stopped.json").exists() and flags(out)
    dies_at(stop, "write_json")
    assert not (out / "stopped.json").exists()
    dies_at(checkpoint, "drop_after")
    assert (out / "stopped.json").exists() and steps(out)[-1] > hacked.stopped.kept
    dies_at(train_module, "export_role")
    assert go(out).stopped == hacked.stopped and steps(out)[-1] == steps(hacked.out)[-1]
    one, other = exported(out), exported(hacked.out)
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert (out / "health.jsonl").read_bytes() == (hacked.out / "health.jsonl").read_bytes()


CHILD = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from little_drawn import shorten
shorten()
import test_stop as t
t.go(t.Path({out!r}))
"""


@pytest.mark.slow
def test_kill_9_at_random_moments(hacked, tmp_path):
    """SIGKILL after random delays, the same command again until it is done: the same record, checkpoint and export."""
    out = tmp_path / "killed"
    code, kills = CHILD.format(tests=str(Path(__file__).parent), out=str(out)), 0
    for delay in [*(torch.rand(8, generator=torch.Generator().manual_seed(1)) * 3).tolist(), None]:
        child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        if delay is None:
            assert child.wait(timeout=300) == 0
            break
        while not (out / "log.jsonl").exists() and child.poll() is None:
            time.sleep(0.01)
        time.sleep(3 + delay)  # past the imports
        if child.poll() is None:
            kills += 1
            child.send_signal(signal.SIGKILL)
        child.wait()
    assert kills >= 3 and stop.read(out) == hacked.stopped and steps(out)[-1] == hacked.stopped.kept
    one, other = exported(out), exported(hacked.out)
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_without_the_flag_it_trains_on_from_what_was_kept(tmp_path):
    out = tmp_path / "run"
    kept = go(out).stopped.kept
    assert kept < RECIPE.steps and go(out, ()).state.step == RECIPE.steps
    assert not (out / "stopped.json").exists() and list(shares(out)) == list(range(RECIPE.steps + 1))
    # asked for again, of a run that is done: nothing is left to stop
    assert go(out).stopped is None


def test_flags_that_are_none():
    with pytest.raises(ValueError, match=r"stop_on: 'hackign' is not allowed; allowed: .*collapse, held, tilt, hacking"):
        RunOptions(stop_on=("hacking", "hackign"))


def finding(step: int, flag: str = "hacking") -> Finding:
    return Finding(step, "alarm", flag, "text")


@pytest.fixture
def kept(tmp_path):
    """A run's folder with checkpoints at every tenth step."""
    for step in range(0, 60, 10):
        checkpoint.save(tmp_path / "checkpoints", step, {"x": torch.ones(1)}, keep=9)
    return tmp_path


def at(*shares_: float | None) -> list[Probed]:
    return [Probed(10 * i, share, True) for i, share in enumerate(shares_)]


def test_which_checkpoint_is_the_best(kept):
    go_back = lambda step, known, **more: stop.decide(kept, finding(step, **more), known, ("hacking", "critic"))  # noqa: E731
    assert go_back(40, at(0.7, 0.8, 0.9, 1.0, 0.6)).kept == 20, "the probe at 30 agreed with the finding at 40"
    assert go_back(40, at(0.7, 0.9, 0.9, 1.0, 0.6)).kept == 20, "of equal ones the later"
    assert go_back(45, at(0.7, 0.8, 0.9, 1.0, 0.6), flag="critic:fake").kept == 30, "a finding of iterations takes nothing from the probes"
    assert go_back(40, at(None, None, None, None, None)).kept == 20 and "the last probe" in stop.read(kept).why
    assert go_back(10, at(0.7, 0.8)).kept == 0 and "may show it already" in stop.read(kept).why
    assert go_back(45, []).kept == 40 and "the last checkpoint before" in stop.read(kept).why
    assert go_back(5, [Probed(0, 0.9, False)]).kept == 0
    lines = [{"step": 20, "level": "alarm", "flag": "hacking", "text": "t"}, {"step": 30, "level": "ok", "flag": "hacking", "text": "t"}]
    (kept / "health.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert go_back(50, at(0.7, 0.8, 0.9, 0.6, 0.6, 0.6)).kept == 10, "the flag was open at 20"
    os.remove(kept / "checkpoints" / "step-000010" / "tensors.safetensors")
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert go_back(50, at(0.7, 0.8, 0.9, 0.6, 0.6, 0.6)).kept == 0


def test_what_a_stop_may_need_is_protected():
    """Whatever the next probe brings: the checkpoint that it would go back to is among the protected ones."""
    assert stop.protected([]) == () and stop.protected(at(0.9)) == (0,)
    assert set(stop.protected(at(0.7, 0.9, 0.8))) == {10}
    assert set(stop.protected(at(0.7, 0.9, 0.8, 0.95))) == {10, 30}
    assert stop.protected([Probed(0, 0.9, True), Probed(10, 1.0, False)]) == (0, 0)


def test_stopping_asked_for_after_the_finding(tmp_path):
    """A run that was hacked without anyone asking, interrupted, and repeated with `stop_on`: it stops where it stands."""
    out, options = tmp_path / "run", {"probe_every": 1, "save_every": 1, "keep": 9}
    real, calls = run_module.iteration, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 7:
            raise Killed
        return real(*args)

    parts = {"prompts": PROMPTS, "reward": Brightness(), "monitor": Mild(), "out": out}
    run_module.iteration = dies
    try:
        with pytest.raises(Killed):
            train(RECIPE, family(), options=RunOptions(**options), **parts)
    finally:
        run_module.iteration = real
    (raised,) = [r for r in flags(out) if r.flag == "hacking"]
    stopped = train(RECIPE, family(), options=RunOptions(**options, stop_on=("hacking",)), **parts).stopped
    assert stopped.step == raised.step and stopped.kept < raised.step - 1


def test_what_metrics_say_of_a_run(tmp_path, monkeypatch):
    """Flags that were open at the end, all that were raised and when, whether the reward was hacked, and where the run stopped."""
    from synthetic_run import made_up, make_run

    from instep.cli import evaluate as module

    def row(*args, **more):
        return made_up("x", "student", 4, 4, 0.9, 6.0, 7.0, random.Random(0))

    for name in ("teacher", "real", "decoded"):
        monkeypatch.setattr(f"instep.bundled.baselines.Baselines.{name}", row)
    monkeypatch.setattr("instep.bundled.evaluation.evaluate", row)
    for name in ("load", "student_of", "sampler_of"):
        monkeypatch.setattr(module, name, lambda *args, **more: None)
    run = make_run(tmp_path / "run")

    def written():
        module.measure_run(run)
        return json.loads((run / "metrics.json").read_text())

    got = written()
    assert got["flags"] == ["hacking"] and got["hacking"] is True and got["stopped"] is None
    assert got["health"] == [
        {"flag": "oversaturation", "level": "warn", "step": 60, "cleared": 100},
        {"flag": "hacking", "level": "alarm", "step": 120, "cleared": None},
    ]
    checkpoint.save(run / "checkpoints", 100, {"x": torch.ones(1)}, keep=9)
    stop.decide(run, finding(120), [Probed(100, 0.9, True)], ("hacking",))
    assert written()["stopped"]["kept"] == 100
    (run / "health.jsonl").unlink()
    (run / "stopped.json").unlink()
    got = written()
    assert (got["flags"], got["health"], got["hacking"], got["stopped"]) == ([], [], False, None)
