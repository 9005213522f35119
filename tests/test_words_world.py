"""The moving-words world through the command line, on weights trained for nothing; rewards by name; a control that ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from words_world import register, write_pipeline

from instep.bundled import MOVING_WORDS, WORLDS, find, folder_of, load, with_weights
from instep.bundled.baselines import Baselines
from instep.bundled.controls import FILE, NAME, control_file, setup_of, shipped_control
from instep.bundled.digits import full_prompts, parse, render
from instep.bundled.moving_words import SHOWN
from instep.bundled.words import training_prompts
from instep.cli.evaluate import evaluation_of
from instep.cli.export import read_run
from instep.cli.main import main
from instep.cli.train import TrainArgs, prepare
from instep.core.files import write_json
from instep.metrics.compare import Row
from instep.recipes.dmdr import dmdr

FEW = ["--steps", "1", "--batch", "2", "--critic-updates", "1", "--threads", "1", "--terms-every", "0", "--save-every", "1"]


def few(out: Path) -> list[str]:
    """Options of a run of a moment in `out`."""
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(training_prompts()[:4]))
    return ["--model", MOVING_WORDS, "--prompts", str(prompts), *FEW, "--out", str(out)]


def group(out: Path) -> list[str]:
    """The command of two updates, the second one with the reward."""
    return ["train", "dm-align-group", *few(out), *["--group", "2", "--top-n", "1", "--distil", "1", "--iterations", "1"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("words") / "moving-words"
    write_pipeline(out)
    return out


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def run(folder, module_patch, tmp_path_factory):
    """Two updates of DM-Align (Group) through the command line, measured; and what was printed."""
    register(module_patch, folder)
    cache = tmp_path_factory.mktemp("cache")
    module_patch.setenv("INSTEP_CACHE", str(cache))
    out = tmp_path_factory.mktemp("runs") / "group"
    assert main(group(out)) == 0
    return out


def test_a_world_without_weights_is_not_listed(tmp_path):
    (tmp_path / "digits" / "transformer").mkdir(parents=True)
    (tmp_path / MOVING_WORDS / "readers").mkdir(parents=True)
    assert list(with_weights(lambda name: tmp_path / name)) == ["digits"]
    assert with_weights(folder_of).keys() <= {*WORLDS, MOVING_WORDS}


def test_train_measures_and_reports_the_world(run, capsys):
    found = json.loads((run / "metrics.json").read_text())
    (student, *rest) = found["rows"]
    assert student["kind"] == "student" and student["n"] == 14 and {"monitor_word", "monitor_motion", "modes_font", "fd"} <= student["values"].keys()
    assert {row["name"] for row in rest} >= {"student after stage 'distil'", "teacher, 50 steps, guided", "real videos through the VAE"}
    assert found["control"] is None and "PP-OCR is not installed" in found["notice"] and found["classifiers"]["monitor"] == {"word": 0.0}
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "words right (monitor)" in page and "PP-OCR is not installed" in page and "the word" in page
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {"probe/monitor_both", "probe/modes", "probe/train_score"} <= log[0].keys()
    assert main(["report", str(run), "-o", str(run / "again.html")]) == 0


def test_an_export_is_checked_at_a_size_that_stock_diffusers_takes(run):
    small = load(MOVING_WORDS).smallest()
    assert (small.height, small.width) == (32, 32), "3 tokens of 8 px are 24, which 16 does not divide"


def test_samples_of_world_and_student(run, tmp_path):
    assert main(["sample", MOVING_WORDS, "--prompts", SHOWN[0], "--copies", "1", "--steps", "1", "--out", str(tmp_path / "t.webp")]) == 0
    assert main(["sample", str(run), "--copies", "1", "--out", str(tmp_path / "s.webp")]) == 0
    assert (tmp_path / "s.webp").stat().st_size > 500


def test_the_first_line_is_the_gain_over_the_control_that_ships(run, folder, capsys, monkeypatch, tmp_path):
    record, evaluation = read_run(run), evaluation_of(MOVING_WORDS)
    baselines = Baselines(load(MOVING_WORDS), evaluation, evaluation.prompts("quick", 0), folder)
    assert shipped_control(baselines, record) is None
    row = Row.of_json(json.loads((run / "metrics.json").read_text())["rows"][0])
    longer = tmp_path / "dmd2"
    assert main(["train", "dmd2", *few(longer), "--iterations", "2", "--no-evaluate"]) == 0
    write_json(folder / FILE, control_file(baselines, [read_run(longer)] * 2, [row, row]))
    try:
        capsys.readouterr()
        kept = shipped_control(baselines, record)
        assert kept is not None and kept.kind == "control" and kept.n == 14 and kept.note == "mean of 2 seeds, 28 videos" and "seconds" not in kept.values
        monkeypatch.setattr("instep.cli.train.final_samples", lambda run, prompts: None)
        assert main(group(run)) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if "standard errors" in line or line.startswith(("Yes", "No"))]
        assert f"from the control, {NAME}" in said[0] and "words right (monitor)" in said[0] and "50-step teacher" in said[0]
        found = json.loads((run / "metrics.json").read_text())
        assert found["control"] == NAME and not any("after stage" in row["name"] for row in found["rows"]), "the control answers what they stand in for"
        for key, value in (("levels", [1.0, 0.5]), ("prompts", "others"), ("weights", "others")):
            assert shipped_control(baselines, {**record, key: value}) is None, key
        record["config"]["stages"][0]["steps"] += 1
        assert shipped_control(baselines, record) is None, "trained for longer"
    finally:
        (folder / FILE).unlink()


def test_a_control_is_of_runs_that_differ_in_their_seed_alone(run):
    record = read_run(run)
    other = json.loads(json.dumps(record))
    other["seed"] = 7
    assert setup_of(record) == setup_of(other)
    other["config"]["roles"]["student"]["optim"]["lr"] = 1.0
    with pytest.raises(ValueError, match="runs: their setups differ"):
        control_file(None, [record, other], [])  # type: ignore[arg-type]


def test_the_black_box_reward_is_chosen_by_name(run):
    for model in (MOVING_WORDS, "moving-digits"):
        found = prepare(dmdr(rl="grpo"), TrainArgs(model=model, reward="exact"))
        assert found.reward.differentiable is False
    digits = find("moving-digits").rewards["exact"]()
    prompts = full_prompts()[:12]
    media = render("train", list(map(parse, prompts)), 0)
    scores = digits.score(media, [*prompts[:6], *prompts[:6]])
    assert scores.tolist()[:6] == [1.0] * 6 and not scores[6:].any(), "right, and asked for something else"
    both = prepare(dmdr(rl="grpo"), TrainArgs(model=MOVING_WORDS, reward="exact,0.5*compressible")).reward
    assert both.weights == (1.0, 0.5)
    with pytest.raises(ValueError, match="none of exact, clipscore"):
        prepare(dmdr(rl="grpo"), TrainArgs(model=MOVING_WORDS, reward="exactly"))


def test_recipes_know_the_world_and_eval_names_it(run, capsys):
    assert main(["recipes", "--model", MOVING_WORDS]) == 0
    assert "guidance" in capsys.readouterr().out
