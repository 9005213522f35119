"""The report on synthetic runs: complete, self-contained, patient with gaps, and closed to what strangers write into prompts."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from synthetic_run import make_run

from instep.bundled.evaluation import COLUMNS
from instep.data.animation import save_animation, sprite_sheet, tile
from instep.metrics.compare import Row
from instep.metrics.figures import Value
from instep.report import write_report
from instep.report.charts import Dot, Series, dot_chart, line_chart, rolling
from instep.report.tables import best
from instep.report.verdict import against, opponents, outcome, table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "link", "img", "br", "hr", "input", "line", "rect", "circle", "path"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Page(HTMLParser):
    """Collects elements and text, and insists that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


def words_of(html: str) -> str:
    return " ".join(Page(html.replace("<small>", " <small>")).text.split())


def report(tmp_path: Path, *runs: Path) -> tuple[Page, str]:
    write_report(list(runs), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    return Page(text), text


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
    assert len(films) == 3 * 6 + 2 * 5 * 6 and all(a["aria-label"] for a in films)
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


def one(value: float, se: float, key: str, kind: str = "naive") -> Row:
    return Row(f"{kind} {value}", kind, {key: Value(value, se)}, 4, 4, 1.0, 10)  # type: ignore[arg-type]


def test_best_is_marked_only_beyond_two_standard_errors():
    assert best([one(0.9, 0.01, "heldout_both"), one(0.8, 0.01, "heldout_both")], "heldout_both").values["heldout_both"].value == 0.9
    assert best([one(0.9, 0.01, "heldout_both"), one(0.88, 0.01, "heldout_both")], "heldout_both") is None
    close = [one(x, 0.01, "heldout_both") for x in (0.9, 0.89, 0.5)]
    assert best(close, "heldout_both") is None, "better than one of the others is not enough"
    assert best([one(1.0, 0.1, "fd"), one(2.0, 0.1, "fd"), one(9.0, 0.1, "fd")], "fd").values["fd"].value == 1.0
    assert best([one(0.1, 0.0, "mean_brightness"), one(0.2, 0.0, "mean_brightness")], "mean_brightness") is None, "brightness has no good end"


def test_outcome_says_what_the_errors_allow():
    real_vs_real = one(0.08, 0.001, "mean_brightness", "real")
    student, near, far = one(0.081, 0.0005, "mean_brightness", "student"), one(0.0815, 0.0005, "mean_brightness"), one(0.1, 0.0005, "mean_brightness")
    assert outcome(student, near, "mean_brightness", real_vs_real) == "even" and outcome(student, far, "mean_brightness", real_vs_real) == "better"
    assert outcome(far, student, "mean_brightness", real_vs_real) == "worse" and outcome(far, student, "mean_brightness", None) == "differs"


def test_verdict_table_names_the_opponents_that_matter():
    student = row_of("student", 0.95, 5.0, kind="student")
    weak, strong = row_of("teacher, 4 steps", 0.6, 15.0), row_of("teacher, 2 steps, guided", 0.7, 14.0)
    twice, dear = row_of("teacher, 4 steps, guided", 0.9, 9.0, nfe=8), row_of("teacher, 16 steps", 0.9, 6.0, nfe=16)
    teacher = row_of("teacher, 50 steps", 0.96, 5.0, kind="teacher", nfe=100, steps=50)
    rows = [student, weak, strong, twice, dear, teacher]
    assert [o.row.name for o in opponents(student, rows, COLUMNS)] == [strong.name, twice.name, teacher.name], (
        "the strongest naive row of each cost, up to twice"
    )
    text = table(student, rows, None, COLUMNS)
    Page(text)
    assert "<td class='better'><span class='of'>naive sampling, NFE 4</span>0.700<em><i title='better'>▲</i> +0.250 <small>± 0.028</small>" in text
    assert "<td class='even'><span class='of'>teacher, NFE 100</span>0.960<em><i title='no difference'>=</i> −0.010" in text
    assert "nothing to compare" in table(student, [student], None, COLUMNS)


def row_of(name: str, both: float, fd: float, *, kind: str = "naive", nfe: int = 4, steps: int = 4, se: float = 0.01) -> Row:
    return Row(name, kind, {"heldout_both": Value(both, se), "fd": Value(fd, 0.3)}, nfe, steps, 1.0, 242)  # type: ignore[arg-type]


TEACHER = row_of("teacher, 50 steps", 0.95, 5.0, kind="teacher", nfe=50, steps=50)


def test_the_answer_is_one_sentence_with_gain_and_error():
    student, naive = row_of("student", 0.9, 6.0, kind="student"), row_of("teacher, 4 steps", 0.6, 14.0)
    better = against(student, naive, TEACHER, None, COLUMNS)
    assert better.outcome == "better" and words_of(better.sentence) == (
        "Yes: prompt followed is 0.900, which is 0.300 ± 0.028 above naive sampling at the same 4 network evaluations (0.600); the 50-step teacher has 0.950."
    )
    control = row_of("student (dmd2)", 0.903, 6.0, kind="control", se=0.003)
    even = against(row_of("student", 0.9, 6.0, kind="student", se=0.005), control, TEACHER, None, COLUMNS)
    assert even.outcome == "even" and words_of(even.sentence) == (
        "No difference beyond two standard errors: prompt followed differs by −0.003 ± 0.012 from the control, student (dmd2) (0.900 against 0.903); "
        "the 50-step teacher has 0.950."
    )
    worse = against(student, row_of("student (dmd2)", 0.95, 6.0, kind="control", nfe=8), None, None, COLUMNS)
    assert worse.outcome == "worse" and words_of(worse.sentence) == (
        "No, it is worse: prompt followed is 0.900, which is 0.050 ± 0.028 below the control, student (dmd2), at 8 network evaluations instead of 4 (0.950)."
    )


@pytest.mark.parametrize(
    ("both", "fd", "outcome", "said"),
    [
        (0.95, 9.0, "better", "(0.800), but it is worse in FD."),
        (0.80, 9.0, "even", "(0.800 against 0.800), but it is worse in FD."),
        (0.80, 3.0, "even", "(0.800 against 0.800), but it is better in FD."),
        (0.70, 9.0, "worse", "(0.800), and it is worse in FD."),
        (0.70, 3.0, "worse", "(0.800), but it is better in FD."),
        (0.95, 3.0, "better", "(0.800)."),
    ],
)
def test_the_answer_hides_no_other_loss_or_gain(both, fd, outcome, said):
    found = against(row_of("student", both, fd, kind="student"), row_of("student (dmd2)", 0.8, 6.0, kind="control"), None, None, COLUMNS)
    assert found.outcome == outcome and words_of(found.sentence).endswith(said)


def test_the_answer_is_unknown_where_nothing_was_measured(tmp_path):
    student = row_of("student", 0.9, 6.0, kind="student")
    assert against(student, None, TEACHER, None, COLUMNS).outcome == "unknown"
    run = make_run(tmp_path / "run")
    (run / "metrics.json").unlink()
    page, text = report(tmp_path, run, make_run(tmp_path / "control", recipe="dmd2"))
    assert "class='answer unknown'" in text and "Unknown: metrics of dm-align-group · seed 0 are not recorded." in page.text


def test_the_page_begins_with_the_answer_and_then_the_table(run, tmp_path):
    for runs, beside in (
        ([run], "naive sampling at the same 4 network evaluations"),
        ([run, make_run(tmp_path / "control", recipe="dmd2")], "the control, student"),
    ):
        page, text = report(tmp_path, *runs)
        text = text[text.index("<body") :]
        places = [text.index(part) for part in ("Did it help?", "class='answer", "<table class='verdict'", "id='health'", "id='samples'", "id='curves'")]
        assert places == sorted(places) and beside in words_of(re.search(r"<p class='answer.*?</p>", text)[0])
        assert page.text.count("Did it help?") == 1 and "50-step teacher has 0." in page.text


def test_a_control_of_another_protocol_is_left_out_and_named(run, tmp_path):
    control = make_run(tmp_path / "control", recipe="dmd2")
    metrics = json.loads((control / "metrics.json").read_text())
    (control / "metrics.json").write_text(json.dumps(metrics | {"protocol": "full"}))
    page, text = report(tmp_path, run, control)
    assert "naive sampling at the same" in words_of(re.search(r"<p class='answer.*?</p>", text)[0])
    assert "dmd2 · seed 0 is not compared: it was measured by another protocol (full)." in page.text


def test_terms_are_explained_in_sight_where_they_first_stand(run, tmp_path):
    page, text = report(tmp_path, run, make_run(tmp_path / "control", recipe="dmd2"))
    meanings = {
        "network evaluations": "passes through the model for one sample",
        "naive sampling": "the teacher itself in as few steps",
        "control": "that the student is compared with",
        "±": "two standard errors, which",
        "FD": "Fréchet distance: how far",
        "held-out classifier": "which neither training nor its watchers ever used",
        "motions seen": "Modes covered: different motions",
        "wobble": "Change of shape from frame to frame",
        "Vendi": "the effective number of different samples",
        "Real-vs-real": "measured as if a model had made them",
    }
    for term, meaning in meanings.items():
        first, explained = page.text.lower().index(term.lower()), page.text.index(meaning)
        assert explained - first < 900, f"{term} is explained {explained - first} characters after it first stands"
    assert not [a for tag, a in page.elements if tag in ("th", "dt") and "title" in a], "an explanation that only a mouse finds"


def test_samples_stand_beside_control_and_teacher(run, tmp_path):
    _, text = report(tmp_path, run, make_run(tmp_path / "control", recipe="dmd2"))
    grid = re.search(r"id='samples'.*?</section>", text, re.S)[0]
    heads = [words_of(head) for head in re.findall(r"<div class='head'>(.*?)</div>", grid)]
    assert heads[:4] == ["student dm-align-group · seed 0", "control dmd2 · seed 0", "naive sampling, 4 steps", "teacher, 50 steps"]
    tiles = [words_of(head) for head in re.findall(r"<span class='of'>(.*?)</span>", grid)]
    assert tiles == heads[:4] * 6, "every tile carries its model's name, for where the headings are out of sight"
    shown = re.search(r"style=\"background-position-y:([\d.]+)%", grid)
    samples = json.loads((run / "samples.json").read_text())
    rows = 4 * len(samples["prompts"])
    assert float(shown[1]) == 0 and len(re.findall(r"class=\"film", grid)) == rows


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: the layout itself is not tried")
def test_nothing_is_cut_or_covered_on_a_phone(run, tmp_path):
    from browser import Browser

    write_report([run, make_run(tmp_path / "control", recipe="dmd2")], tmp_path / "report.html")
    browser = Browser(str(CHROMIUM), tmp_path / "profile")
    try:
        for width, phone in ((390, True), (1280, False)):
            tab = browser.tab((tmp_path / "report.html").as_uri(), width, 844, phone=phone)
            tab.run("document.querySelectorAll('details').forEach((d) => { d.open = true })")
            assert tab.run("innerWidth") == width and tab.run("document.documentElement.scrollWidth") == width
            # a wide table may scroll inside its own box on a desktop; on a phone nothing may
            inside = "pre, svg, script, style" + ("" if phone else ", .scroll")
            beyond = f"!e.closest('{inside}') && e.getBoundingClientRect().right > innerWidth"
            assert tab.run(f"[...document.querySelectorAll('main *, header *, nav *')].filter((e) => {beyond}).map((e) => e.outerHTML.slice(0, 90))") == []
            cut = "[...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth).length"
            assert tab.run(cut) == 0 or not phone, "a table that a phone cuts"
            covered = tab.run(
                "[...document.querySelectorAll('nav a, nav button')].filter((e) => { const b = e.getBoundingClientRect(); "
                "const top = document.elementFromPoint(b.x + b.width / 2, b.y + b.height / 2); "
                "const right = document.elementFromPoint(b.right - 2, b.y + b.height / 2); "
                "return top !== e || right !== e }).map((e) => e.textContent)"
            )
            assert covered == [], "links that something lies over"
            moves = "getComputedStyle(document.querySelector('.film')).backgroundPositionX"
            first = tab.run(moves)
            tab.until(f"{moves} !== {json.dumps(first)}", 5)
            tab.tap("#play")
            assert tab.run("getComputedStyle(document.querySelector('.film')).animationPlayState") == "paused"
        assert browser.problems() == []
    finally:
        browser.close()


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
