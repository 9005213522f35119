"""The report on synthetic runs: complete, self-contained, patient with gaps, and closed to what strangers write into prompts."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from report_page import Page, one, report
from synthetic_run import make_run

from instep.data.animation import save_animation, sprite_sheet, tile
from instep.report import write_report
from instep.report.charts import Dot, Series, dot_chart, line_chart, rolling
from instep.report.tables import best

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "first")


def test_whole_run_in_one_file(run, tmp_path):
    page, text = report(tmp_path, run)
    assert not re.search(r"https?://", text) and "@import" not in text
    for _, attributes in page.elements:
        for name in ("src", "srcset", "href", "xlink:href", "data", "action"):
            assert (attributes.get(name) or "#").startswith("#"), f"{name}={attributes[name]} would be fetched"
    assert all(uri.startswith("data:") for uri in re.findall(r"url\(\s*[\"']?([^\"')]*)", text))
    for said in (
        "Did it help?",
        "prompt followed",
        "oversaturation",
        "a seven moving left fast",
        "implied target",
        "real videos (another draw)",
        "instep train dm-align-group",
    ):
        assert said in page.text, said
    assert "not recorded" not in page.text and "160 logged iterations" in page.text
    films = [a for tag, a in page.elements if tag == "div" and "film" in (a.get("class") or "")]
    assert len(films) == 3 * 6 + 2 * 5 * 6 + 6 * 4 and all(a["aria-label"] for a in films)
    panels = re.findall(r'<script type="application/json">(.*?)</script>', text)
    assert len(panels) >= 10 and all(json.loads(panel)["series"] for panel in panels)


def test_several_runs_share_table_and_curves(run, tmp_path):
    other, control = make_run(tmp_path / "other", seed=1), make_run(tmp_path / "control", recipe="dmd2")
    page, text = report(tmp_path, run, other, control)
    assert "beside 2 other runs" in page.text
    assert page.text.count("mean of 2 seeds") == 3, "in the verdict and two tables, and of the student alone"
    assert text.count("<th scope='row'>teacher, 4 steps, guided<") == 2, "measured once for all runs: one row in each of two tables"
    assert "dm-align-group · seed 1" in page.text and "the control, student (dmd2)" in page.text
    assert re.findall(r"<tr class='(student|control)'>", text) == ["student", "control"] * 2, "of two seeds one student, of the other run a control"
    same_label, _ = report(tmp_path, run, make_run(tmp_path / "again"))
    assert "(first)" in same_label.text and "(again)" in same_label.text, "equal labels are told apart by folder"


def test_real_videos_are_in_no_competition_with_models(run, tmp_path):
    _, text = report(tmp_path, run, make_run(tmp_path / "other", seed=1))
    tables = re.findall(r"<table class='metrics'>(.*?)</table>", text)
    assert len(tables) == 2
    for found in tables:
        kinds = re.findall(r"<tr class='(\w+)'>", found)
        assert kinds[-2:] == ["real", "real"] and kinds.count("real") == 2, "below the models, once for all runs"
        assert all("class=best" not in row for row in re.findall(r"<tr class='real'>.*?</tr>", found))
    assert "class=best" in tables[0], "nor does a perfect real row keep a model from being the best"


def test_runs_of_one_folder_name_keep_their_own_samples(tmp_path):
    runs = [make_run(tmp_path / parent / "run") for parent in ("left", "right")]
    _, text = report(tmp_path, *runs)
    heads = re.findall(r"<div class='head'>student<small>(.*?)</small>", text)
    assert len(set(heads)) == 2 and any("left" in head for head in heads) and any("right" in head for head in heads)
    twice, _ = report(tmp_path, runs[0], runs[0])
    assert "other run" not in twice.text, "a folder given twice is one run"


def test_teacher_lines_of_two_classifiers_are_told_apart(run, tmp_path):
    _, text = report(tmp_path, run)
    series = {s["name"]: s for s in json.loads(re.search(r"<h3>Reward</h3>.*?json\">(.*?)</script>", text)[1])["series"]}
    for classifier in ("training classifier", "monitor classifier"):
        own, teacher = series[f"{classifier} (probe)"], series[f"teacher, {classifier}"]
        assert teacher["style"].split() == [own["style"].split()[0], "d2"], "the scalar's own colour, dotted"


def test_metrics_that_could_not_be_measured_are_gaps(tmp_path):
    run = make_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["rows"][0]["values"]["fd"] = {"value": None, "se": None}
    metrics["rows"][2]["values"]["fd_open"] = {"value": float("nan"), "se": 0.1}
    (run / "metrics.json").write_text(json.dumps(metrics | {"classifiers": None}))
    page, _ = report(tmp_path, run)
    assert "could not be read" not in page.text and not re.search(r"\b(nan|None|NaN)\b", page.text)
    assert not [a for tag, a in page.elements if tag in ("line", "rect", "circle", "path") and any("nan" in str(v) for v in a.values())]
    recipe = json.loads((run / "recipe.json").read_text())
    for damage in ({"levels": ["a"]}, {"config": {"stages": [{"name": "distil"}]}}, {"config": []}):
        (run / "recipe.json").write_text(json.dumps(recipe | damage))
        page, _ = report(tmp_path, run)
        assert damage == {"config": []} or "recipe.json could not be read" in page.text


def test_gaps_and_damage_are_said_not_raised(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    page, _ = report(tmp_path, empty)
    assert page.text.count("not recorded") >= 5
    broken = make_run(tmp_path / "broken")
    (broken / "samples.safetensors").write_bytes(b"junk")
    (broken / "metrics.json").write_text('{"rows": [{"name": 1}]}')
    (broken / "recipe.json").write_text("[]")
    with open(broken / "log.jsonl", "a") as log:
        log.write('{"step": 161, "force/dm/no')
    page, _ = report(tmp_path, broken, run)
    assert "samples.safetensors could not be read" in page.text and "metrics.json could not be read" in page.text
    for name in ("log.jsonl", "health.jsonl", "views/step-000100.json"):
        (broken / name).unlink()
        report(tmp_path, broken)
    with pytest.raises(ValueError, match="run_dirs"):
        write_report([], tmp_path / "none.html")
    with pytest.raises(ValueError, match="not a folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "none.html")


def test_hostile_text_stays_text(tmp_path):
    run = make_run(tmp_path / "run", prompts=(HOSTILE, "a seven", "an eight"))
    recipe = json.loads((run / "recipe.json").read_text()) | {"recipe": HOSTILE, "command": HOSTILE, "model": HOSTILE}
    (run / "recipe.json").write_text(json.dumps(recipe))
    metrics = json.loads((run / "metrics.json").read_text())
    for row in [*metrics["rows"], metrics["real_vs_real"]]:
        row |= {"name": HOSTILE + row["name"], "note": HOSTILE}
    (run / "metrics.json").write_text(json.dumps(metrics | {"classifiers": {HOSTILE: {HOSTILE: 1.0}}}))
    lines = [{"step": i, "stage": HOSTILE + str(i > 5), f"critic/{HOSTILE}": 1.0, f"force/cosine/{HOSTILE}": 0.1} for i in range(1, 40)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "health.jsonl").write_text(json.dumps({"step": 1, "level": HOSTILE, "flag": HOSTILE, "text": HOSTILE}) + "\n")
    page, text = report(tmp_path, run, make_run(tmp_path / "second"))
    assert [a for tag, a in page.elements if tag == "img" or any(key.startswith("on") for key in a)] == []
    assert "alert(1)" in page.text and "<script>alert" not in text and "onerror=alert(2)>" not in text
    assert all("alert" not in block or "\\u003c" in block for block in re.findall(r"<script[^>]*>(.*?)</script>", text, re.S))


def test_best_is_marked_only_beyond_two_standard_errors():
    assert best([one(0.9, 0.01, "heldout_both"), one(0.8, 0.01, "heldout_both")], "heldout_both").values["heldout_both"].value == 0.9
    assert best([one(0.9, 0.01, "heldout_both"), one(0.88, 0.01, "heldout_both")], "heldout_both") is None
    close = [one(x, 0.01, "heldout_both") for x in (0.9, 0.89, 0.5)]
    assert best(close, "heldout_both") is None, "better than one of the others is not enough"
    assert best([one(1.0, 0.1, "fd"), one(2.0, 0.1, "fd"), one(9.0, 0.1, "fd")], "fd").values["fd"].value == 1.0
    assert best([one(0.1, 0.0, "mean_brightness"), one(0.2, 0.0, "mean_brightness")], "mean_brightness") is None, "brightness has no good end"


def test_charts_hold_their_data():
    series = Series("a<b", tuple((float(i), 2.0**i) for i in range(6)))
    chart = line_chart("t", "c", [series], log=True, stages=[("one", 0), ("two", 3)])
    Page(chart)
    data = json.loads(re.search(r"json\">(.*?)</script>", chart)[1])
    assert data["series"][0]["name"] == "a<b" and data["series"][0]["points"][3] == [3.0, 8.0]
    ys = [float(y) for y in re.search(r'class="line c0 d0" d="M([^"]*)"', chart)[1].replace("L", " ").split()[1::2]]
    steps = [a - b for a, b in zip(ys, ys[1:], strict=False)]
    assert max(steps) - min(steps) < 0.3 and min(steps) > 0, "doubling is a straight rising line on a logarithmic axis"
    assert ">two</text>" in chart
    assert line_chart("t", "c", []) == "" and dot_chart("t", "c", [], None) == ""
    assert rolling([(0, 1.0), (1, 3.0), (2, 5.0)], 2) == ((0, 1.0), (1, 2.0), (2, 4.0))
    flat = dot_chart("t", "c", [Dot(4, 1.0, 0.0, "student", "s")], (1.0, 0.0))
    Page(flat)
    assert "nan" not in flat and "inf" not in flat


def test_animations_keep_every_pixel(tmp_path):
    videos = torch.randint(0, 256, (3, 4, 8, 6, 3), dtype=torch.uint8)
    frames = tile(videos, columns=2, scale=2)
    assert frames.shape == (4, 2 * 18 + 2, 2 * 14 + 2, 3)
    assert torch.equal(frames[:, 2:18:2, 2:14:2], videos[0]) and torch.equal(frames[:, 21:37:2, 3:15:2], videos[2])
    save_animation(tmp_path / "a.webp", frames)
    with Image.open(tmp_path / "a.webp") as image:
        assert image.n_frames == 4
        image.seek(3)
        assert torch.equal(torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).reshape(frames[3].shape), frames[3])
    with pytest.raises(ValueError, match="mp4"):
        save_animation(tmp_path / "a.mp4", frames)
    with pytest.raises(ValueError, match="uint8"):
        tile(videos.float(), 2)


def test_sprite_sheets_are_exact_when_small_and_bounded_when_large():
    videos = torch.randint(0, 256, (2, 3, 8, 8, 3), dtype=torch.uint8)
    uri, frames = sprite_sheet(videos)
    image = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(16, 24, 3)
    assert frames == 3 and torch.equal(pixels[8:16, 16:24], videos[1, 2])
    uri, frames = sprite_sheet(torch.zeros(2, 81, 240, 400, 3, dtype=torch.uint8))
    image = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert frames == 24 and image.size == (24 * 192, 2 * 115)
