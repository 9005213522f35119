"""The first question of the report, did it help: the sentence, the table, the terms, the samples, and how they look on a phone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from report_page import Page, one, report, words_of
from synthetic_run import make_run

from instep.bundled.evaluation import COLUMNS
from instep.metrics.compare import Row
from instep.metrics.figures import Value
from instep.report import write_report
from instep.report.verdict import against, opponents, outcome, table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "first")


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
