"""Rows that never change: what ships holds for the weights and the protocol of today, is what measuring gives, and is measured anew where it does not hold."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import little_drawn
import pytest
import torch
from test_run import PROMPTS
from test_run import family as tiny

from instep.bundled import evaluation as protocol
from instep.bundled import find, settings_of
from instep.bundled.baselines import FILE, TIMES, Baselines, shipped_rows
from instep.cli.evaluate import TEACHER_STEPS, evaluation_of, measured_worlds
from instep.cli.main import main
from instep.data.prompt import as_prompts
from instep.metrics.compare import Row
from instep.models.backbone import Backbone
from instep.models.role import Role
from instep.recipes.common import Common
from instep.recipes.defaults import with_settings
from instep.recipes.dmd import dmd2
from instep.training.loop import Interrupted
from instep.training.probe import TEACHER_STEPS as PROBE_STEPS
from instep.training.probe import Probe, few_of
from instep.training.run import train

# worlds whose rows ship; those of another are measured when they are needed
WORLDS = tuple(name for name in measured_worlds() if (find(name).folder / FILE).is_file())


def taught(name: str) -> float:
    """The guidance at which recipes distil the world's model."""
    return with_settings(Common(), settings_of(name)).guidance


def teachers(name: str) -> list[tuple[int, float]]:
    return [(steps, guidance) for steps in TEACHER_STEPS for guidance in dict.fromkeys((find(name).preset.guidance, taught(name), 1.0))]


def baselines(name: str, shipped=True) -> Baselines:
    measured = evaluation_of(name)
    return Baselines(find(name).load(None), measured, measured.prompts("quick", 0), find(name).folder if shipped else None)


def same(kept: Row, now: Row) -> None:
    """Equal up to what another machine's rounding changes: a twentieth of a standard error, or one sample in a thousand of a share."""
    assert replace(kept, values={}) == replace(now, values={})
    assert kept.values.keys() == now.values.keys() - set(TIMES)
    for key, value in kept.values.items():
        assert value.value == pytest.approx(now.values[key].value, rel=1e-3, abs=max(1e-5, 0.05 * value.se)), key
        assert value.se == pytest.approx(now.values[key].se, rel=0.1, abs=1e-4), key


@pytest.mark.parametrize("name", WORLDS)
def test_what_ships_holds_and_is_read_instead_of_measured(name, tmp_path, monkeypatch):
    """Red where weights, classifiers or the protocol changed: run benchmarks/baselines.py."""
    monkeypatch.setenv("INSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("instep.bundled.protocol.generate_all", lambda *given: pytest.fail("measured"))
    for module in ("evaluation", "words_evaluation"):
        monkeypatch.setattr(f"instep.bundled.{module}.measure", lambda *given: pytest.fail("measured"))
    rows = baselines(name)
    found = {f"teacher-{teacher[0]}-{teacher[1]:g}": rows.teacher(*teacher) for teacher in teachers(name)} | {"real": rows.real(), "decoded": rows.decoded()}
    assert found == shipped_rows(find(name).folder, rows.fingerprint) and len(found) == len(teachers(name)) + 2
    assert all(row.n == len(rows.eval_set.prompts) and not set(TIMES) & row.values.keys() for row in found.values())
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def anew(tmp_path, monkeypatch):
    """Baselines of a world that have nothing to read."""
    monkeypatch.setenv("INSTEP_CACHE", str(tmp_path / "empty"))
    return lambda name: baselines(name, shipped=False)


def test_a_row_that_ships_is_what_measuring_gives(anew):
    """Red where the code that samples or measures gives other numbers: raise `VERSION` in bundled/evaluation.py and run benchmarks/baselines.py."""
    same(baselines("moving-digits").teacher(1, 1.0), anew("moving-digits").teacher(1, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_every_row_that_ships_is_what_measuring_gives(name, anew):
    rows, measured = baselines(name), anew(name)
    for teacher in teachers(name):
        same(rows.teacher(*teacher), measured.teacher(*teacher))
    same(rows.real(), measured.real())
    same(rows.decoded(), measured.decoded())


def test_the_fingerprint_goes_stale_with_weights_prompts_classifiers_and_version(monkeypatch):
    rows = baselines("moving-digits")
    marks = [rows.fingerprint, replace(rows, eval_set=rows.evaluation.prompts("quick", 1)).fingerprint]
    marks += [
        replace(rows, eval_set=rows.evaluation.prompts("full", 0)).fingerprint,
        replace(rows, eval_set=replace(rows.eval_set, negative="blurry")).fingerprint,
    ]
    with monkeypatch.context() as changed:
        changed.setattr(protocol, "VERSION", protocol.VERSION + 1)
        marks.append(replace(rows).fingerprint)
    with monkeypatch.context() as changed:
        changed.setattr(protocol, "_classifier_files", lambda: b"other weights")
        marks.append(replace(rows).fingerprint)
    assert replace(rows).fingerprint == marks[0], "and only then"
    for part in ("transformer", "vae", "text_encoder"):
        weight = next(getattr(rows.family.pipe, part).parameters())
        before = weight.detach().clone()
        with torch.no_grad():
            weight.view(-1)[0] += 1
        marks.append(replace(rows).fingerprint)
        with torch.no_grad():
            weight.copy_(before)
    assert len(set(marks)) == len(marks) == 9


def test_rows_of_another_fingerprint_are_measured_and_kept(tmp_path, monkeypatch):
    """A damaged fingerprint stands for any change: the row is measured, kept in the cache, and read from there."""
    monkeypatch.setenv("INSTEP_CACHE", str(tmp_path / "cache"))
    rows = baselines("moving-digits")
    about = json.loads((find("moving-digits").folder / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(about | {"fingerprint": "0" * 16}))
    stale, real, made = replace(rows, shipped=tmp_path), rows.real(), []
    monkeypatch.setattr(protocol, "real_vs_real_row", lambda *given, **more: made.append(1) or real)
    assert stale.real() == stale.real() == real and made == [1]
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [f"{rows.fingerprint}-real.json"]
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / FILE).write_text(json.dumps(about))
    assert stale.real() == real and made == [1], "and what holds again is read again"


def test_eval_without_runs_shows_the_rows_that_ship(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(protocol, "measure", lambda *given: pytest.fail("measured"))
    assert main(["eval", "--teacher", "moving-digits-i2v"]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("teacher, 50 steps, guided", "real videos (another draw)", "motions of 9", "first frame"))
    assert main(["eval", "--teacher", "digits"]) == 2
    assert "teacher: 'digits' is not measured; allowed: moving-digits, moving-digits-i2v" in capsys.readouterr().err


def run_probe(name: str, **other) -> tuple[Probe, object]:
    own = find(name).ready()
    return Probe(**{"family": own.family, "prompts": few_of(own.prompts, 12), "reward": own.reward, "monitor": own.monitor} | other), own


@pytest.mark.parametrize("name", WORLDS)
def test_the_teacher_s_probe_that_ships_holds_for_a_run_s_own_probe_alone(name):
    """Red where weights, classifiers or probes changed: run benchmarks/baselines.py."""
    probe, own = run_probe(name)
    known = own.known_teacher(probe, taught(name))
    teacher = Role("teacher", Backbone(own.family, own.family.pretrained))
    few = replace(probe, prompts=probe.prompts[:1], copies=2).teacher(teacher, taught(name), steps=1)
    assert known is not None and known.keys() == few.keys() and 0 < known["monitor_both"] <= 1
    assert own.known_teacher(probe, 2.5) is None, "another guidance"
    for key, value in {"seed": 5, "copies": 2, "prompts": probe.prompts[:5], "reward": None, "monitor": None, "negative": "blurry"}.items():
        assert own.known_teacher(replace(probe, **{key: value}), taught(name)) is None, key
    with torch.no_grad():
        next(own.family.pretrained.parameters()).mul_(1.01)
    assert own.known_teacher(probe, taught(name)) is None, "another model"


@pytest.mark.parametrize("known", [{"mean_brightness": 0.25, "saturation": 0.0, "motion": 0.1, "diversity": 0.2}, None])
def test_a_run_keeps_the_teacher_s_metrics_that_are_known_and_measures_others(tmp_path, monkeypatch, known):
    asked, measured, metrics = [], [], Probe.teacher
    monkeypatch.setattr(Probe, "teacher", lambda self, *given: measured.append(1) or metrics(self, *given, steps=1))
    run = {"prompts": PROMPTS, "out": tmp_path / "run", "known_teacher": lambda probe, guidance: asked.append((probe.prompts, guidance)) or known}
    train(dmd2(Common(steps=1, batch=2, guidance=2.0), iterations=1), tiny(), **run)
    assert asked == [(few_of(as_prompts(PROMPTS), little_drawn.PROMPTS), 2.0)] and measured == [1] * (known is None)
    kept = json.loads((tmp_path / "run" / "teacher_probe.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert known in (kept, None) and rows[0]["probe/mean_brightness_teacher"] == kept["mean_brightness"]


def test_the_command_hands_on_what_ships(tmp_path, monkeypatch):
    seen = {}

    def stop(*given, **more):
        seen.update(more)
        raise Interrupted("here")

    monkeypatch.setattr("instep.cli.train.train", stop)
    assert main(["train", "dmd2", "--out", str(tmp_path / "run")]) == 130
    probe, _ = run_probe("moving-digits", reward=seen["reward"], monitor=seen["monitor"])
    assert seen["known_teacher"](probe, 3.0) == json.loads((find("moving-digits").folder / "teacher_probe.json").read_text())["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_the_teacher_s_probe_that_ships_is_what_measuring_gives(name):
    probe, own = run_probe(name)
    guidance = find(name).preset.guidance
    teacher = Role("teacher", Backbone(own.family, own.family.pretrained))
    assert dict(own.known_teacher(probe, guidance)) == pytest.approx(probe.teacher(teacher, guidance, PROBE_STEPS), rel=1e-3, abs=1e-4)
