"""What people answered is kept: whole, once, for the samples it was given for; undone answers are marked, not deleted."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from human_eval_helpers import PROMPTS, sample_folder
from PIL import Image

from instep.core.files import write_json
from instep.human_eval import frames
from instep.human_eval.create import create
from instep.human_eval.questions import choose
from instep.human_eval.samples import match, read_samples
from instep.human_eval.store import Conflict, Store

ALL = {"visual_quality": "left", "text_alignment": "right", "motion": "equal", "overall": "left"}


@pytest.fixture
def folders(tmp_path):
    return str(sample_folder(tmp_path / "ours", "red")), str(sample_folder(tmp_path / "theirs", "blue"))


@pytest.fixture
def store(tmp_path, folders):
    made = create(tmp_path / "human_eval.sqlite", match(*folders), "pairs", choose("pairs", ()), seed=0)
    yield made
    made.close()


def answer_all(store: Store, name: str, answers: dict[str, str] = ALL) -> int:
    done = 0
    while (item := store.state(name).item) is not None:
        store.answer(name, item.id, f"{name}-{item.id}", answers)
        done += 1
    return done


def test_answers_are_kept_and_told_by_run_not_by_side(store):
    store.join("Ana")
    while (item := store.state("Ana").item) is not None:
        better = "left" if item.left.run == 0 else "right"
        store.answer("Ana", item.id, item.id, dict.fromkeys(ALL, better))
    assert Counter(vote.value for vote in store.votes()) == {"a": 24}
    assert store.state("ana ").done == 6, "a name is the same whatever its case and spaces"
    assert Counter(vote.swapped for vote in store.votes() if vote.question == "overall") == {True: 3, False: 3}, "each side as often"


def test_orders_differ_between_annotators_and_not_between_openings(store):
    seen = {}
    for name in ("Ana", "Bo"):
        store.join(name)
        seen[name] = store._db.execute(
            "SELECT item, swapped FROM assignment JOIN annotator n ON n.id = annotator WHERE n.name = ? ORDER BY position", (name,)
        ).fetchall()
    assert seen["Ana"] != seen["Bo"] and sorted(row[0] for row in seen["Ana"]) == sorted(row[0] for row in seen["Bo"])
    again = Store(store.path)
    again.join("Ana")
    assert again.state("Ana").item == store.state("Ana").item
    again.close()


def test_a_repeated_answer_changes_nothing_and_another_is_refused(store):
    store.join("Ana")
    item = store.state("Ana").item.id
    for _ in range(3):
        store.answer("Ana", item, "r1", ALL)
    store.answer("Ana", item, "r2", ALL)  # from a page that never heard of its first answer
    assert len(store.votes()) == 4 and store.state("Ana").done == 1
    with pytest.raises(Conflict, match="undo it first"):
        store.answer("Ana", item, "r3", ALL | {"overall": "right"})
    with pytest.raises(Conflict):
        store.answer("Ana", store.state("Ana").item.id, "r1", ALL)


def test_undo_marks_and_a_late_repeat_does_not_bring_it_back(store):
    store.join("Ana")
    item = store.state("Ana").item.id
    store.answer("Ana", item, "r1", ALL)
    assert store.undo("Ana", "u1") and store.undo("Ana", "u1")
    assert store.votes() == [] and store.state("Ana").item.id == item and store.state("Ana").item.before == ALL
    store.answer("Ana", item, "r1", ALL)
    assert store.votes() == [], "what was undone stays undone"
    store.answer("Ana", item, "r2", ALL | {"overall": "right"})
    assert len(store.votes()) == 4
    rows = store._db.execute("SELECT request, undone IS NOT NULL FROM judgement ORDER BY id").fetchall()
    assert rows == [("r1", 1), ("r2", 0)], "marked, not deleted"
    store.join("Bo")
    assert not store.undo("Bo", "u2"), "nobody undoes another's answers"


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"overall": "best"}, "answers: overall: 'best' is not allowed; allowed: left, equal, right"),
        ({"extra": "left"}, "answer each of visual_quality, text_alignment, motion, overall once"),
    ],
)
def test_answers_that_fit_no_question(store, change, answer):
    store.join("Ana")
    item = store.state("Ana").item.id
    with pytest.raises(ValueError) as caught:
        store.answer("Ana", item, "r", ALL | change)
    assert answer in str(caught.value) and store.votes() == []
    for name, what, said in (("Ana", "nothing", "item: 'nothing' is not one"), ("Bo", item, "name: 'Bo' has not joined")):
        with pytest.raises(ValueError, match=said):
            store.answer(name, what, "r", ALL)
    for name in ("", " ", "x" * 41, "a\0b", "a\u202eb"):
        with pytest.raises(ValueError, match="name: .* is not allowed"):
            store.join(name)


def test_many_at_once(store):
    names = [f"person {i}" for i in range(6)]
    for name in names:
        store.join(name)
    threads = [threading.Thread(target=answer_all, args=(store, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.votes()) == 6 * 6 * 4 and store.progress() == [(name, 6, 6) for name in names]


CHILD = """
import sys
from pathlib import Path
from instep.human_eval.store import Store
store = Store(Path(sys.argv[1]))
store.join("Ana")
for i in range(10**9):
    item = store.state("Ana").item
    if item is None:
        store.undo("Ana", f"u{i}")
        continue
    store.answer("Ana", item.id, f"r{i}", {"visual_quality": "left", "text_alignment": "right", "motion": "equal", "overall": "left"})
    print(i, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL on Windows")
def test_a_kill_loses_nothing_that_was_acknowledged_and_leaves_nothing_half(store):
    for wait in (1, 3, 7, 40):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(store.path)], stdout=subprocess.PIPE, text=True)
        heard = [int(child.stdout.readline()) for _ in range(wait)]
        child.send_signal(signal.SIGKILL)
        heard += [int(line) for line in child.stdout if line.endswith("\n")]
        child.wait()
        again = Store(store.path)
        kept = {row[0] for row in again._db.execute("SELECT request FROM judgement")}
        assert {f"r{i}" for i in heard} <= kept
        per = again._db.execute("SELECT count(*) FROM answer GROUP BY judgement").fetchall()
        assert set(per) == {(4,)} and len(per) == len(kept), "each judgement has its four answers"
        with again._transaction():
            again._db.execute("DELETE FROM answer")
            again._db.execute("DELETE FROM judgement")
        again.close()


SUICIDE = """
import os, signal, sys
from pathlib import Path
from instep.human_eval.store import Store
store, seen = Store(Path(sys.argv[1])), []
store.join("Ana")
def look(statement):
    seen.extend([1] if statement.startswith("INSERT INTO answer") else [])
    if len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
store._db.set_trace_callback(look)
store.answer("Ana", store.state("Ana").item.id, "r", {"visual_quality": "left", "text_alignment": "right", "motion": "equal", "overall": "left"})
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL on Windows")
def test_a_kill_in_the_middle_of_an_answer_leaves_none_of_it(store):
    assert subprocess.run([sys.executable, "-c", SUICIDE, str(store.path)], timeout=60).returncode == -signal.SIGKILL
    again = Store(store.path)
    assert again.votes() == [] and again.state("Ana").done == 0
    assert again._db.execute("SELECT count(*) FROM judgement").fetchone() == again._db.execute("SELECT count(*) FROM answer").fetchone() == (0,)
    again.answer("Ana", again.state("Ana").item.id, "r", ALL)
    assert again.state("Ana").done == 1
    again.close()


def test_durable(store):
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"


def test_a_store_is_for_its_samples_mode_and_questions_alone(store, folders, tmp_path):
    matched, questions = match(*folders), choose("pairs", ())
    store.check_same(matched, "pairs", questions)
    store.check_media()
    with pytest.raises(ValueError, match="out: .* was begun for other samples .of 'ours' and 'theirs', in this order.; choose another file with --out"):
        store.check_same(match(*reversed(folders)), "pairs", questions)
    other = str(sample_folder(tmp_path / "green", "green"))
    with pytest.raises(ValueError, match="was begun for other samples"):
        store.check_same(match(folders[0], other), "pairs", questions)
    with pytest.raises(ValueError, match="mode: 'score' does not fit .* begun with 'pairs'"):
        store.check_same(matched, "score", choose("score", ()))
    with pytest.raises(ValueError, match="was begun with visual_quality, text_alignment, motion, overall"):
        store.check_same(matched, "pairs", choose("pairs", ("overall",)))
    with pytest.raises(ValueError, match="out: .* exists"):
        create(store.path, matched, "pairs", questions, 0)
    file = next(iter(store.media.values())).path
    Image.new("RGB", (8, 8)).save(file)
    with pytest.raises(ValueError, match="is no longer what was shown"):
        store.check_media()
    file.unlink()
    with pytest.raises(ValueError, match="which is gone"):
        store.check_media()


def test_files_that_are_no_store(tmp_path):
    (tmp_path / "text.sqlite").write_text("not a database, but long enough to look at" * 30)
    sqlite3.connect(tmp_path / "other.sqlite").execute("CREATE TABLE t (x)").connection.commit()
    for name, said in (("text", "is not a store"), ("other", "is not a store"), ("none", "does not exist")):
        with pytest.raises(ValueError, match=said):
            Store(tmp_path / f"{name}.sqlite")


def test_an_interrupted_creation_begins_again(tmp_path, folders):
    path = tmp_path / "j.sqlite"
    db = sqlite3.connect(path)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("CREATE TABLE t (x)")
    db.execute("DROP TABLE t")
    db.commit()
    db.close()
    create(path, match(*folders), "pairs", choose("pairs", ()), 0).close()


def make_run(folder: Path, shade: int, prompts: tuple[str, ...] = PROMPTS, seed: int = 5) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir()
    models = ["teacher_50", "naive_4", "student"]
    videos = np.random.default_rng(shade).integers(0, 255, (3 * len(prompts), 9, 12, 16, 3)).astype(np.uint8)
    save_file({"samples": videos}, folder / "samples.safetensors")
    write_json(folder / "samples.json", {"models": models, "prompts": list(prompts), "seed": seed, "rows": []})
    return folder


def test_runs_are_compared_pixel_by_pixel(tmp_path):
    from safetensors.numpy import load_file

    a, b = make_run(tmp_path / "a", 1, (*PROMPTS, "only a", PROMPTS[0])), make_run(tmp_path / "b", 2)
    matched = match(str(a), str(b))
    assert len(matched.pairs) == 3 and matched.alone == (2, 0) and (matched.a.name, matched.b.name) == ("a", "b")
    store = create(tmp_path / "j.sqlite", matched, "score", choose("score", ()), 0)
    store.join("Ana")
    assert store.state("Ana").total == 6 and store.state("Ana").item.right is None
    videos = load_file(b / "samples.safetensors")["samples"]
    shown = [media for media, _ in store.items().values() if media.run == 1]
    for i, media in enumerate(shown):
        read, durations = frames.read(media.path)
        assert np.array_equal(np.stack([np.asarray(frame) for frame in read]), videos[6 + i]) and durations == [125] * 9
        assert media.path.parent.name == "j-media" and media.path.stem == media.id and media.clip.kind == "frames"
    store.close()
    # the store and its media can move together
    (tmp_path / "moved").mkdir()
    for part in ("j.sqlite", "j-media"):
        (tmp_path / part).rename(tmp_path / "moved" / part)
    Store(tmp_path / "moved" / "j.sqlite").check_media()


def test_other_models_of_a_run(tmp_path):
    run = make_run(tmp_path / "a", 1)
    matched = match(str(run), f"{run}:teacher_50")
    assert (matched.a.name, matched.b.name) == ("a", "a:teacher_50") and matched.pairs[0][0].digest != matched.pairs[0][1].digest
    with pytest.raises(ValueError, match="has no samples of 'critic'; allowed: teacher_50, naive_4, student"):
        read_samples(f"{run}:critic")
    with pytest.raises(ValueError, match="holds the same samples as"):
        match(str(run), str(run))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "has no rows"),
        ([{"file": "red-0-0.webp"}], "row 1: .* is not allowed; a row is"),
        ([{"file": "../x.webp", "prompt": "p"}], "file: '../x.webp' is not allowed; it is a file inside"),
        ([{"file": "samples.json", "prompt": "p"}], "it ends in .webp, .gif, .png, .mp4, .webm"),
        ([{"file": "none.webp", "prompt": "p"}], "none.webp does not exist"),
        ([{"file": "red-0-0.webp", "prompt": "p", "seed": "x"}], "seed: 'x' is not allowed"),
        ([{"file": "red-0-0.webp", "prompt": "p"}] * 2, "is there twice"),
        ({"models": 3}, "is neither a list of rows"),
    ],
)
def test_manifests_that_are_wrong(tmp_path, rows, said):
    folder = sample_folder(tmp_path / "ours", "red")
    (folder / "samples.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=said):
        read_samples(str(folder))


def test_media_that_are_none(tmp_path, folders):
    for name, said in (("red-0-0.webp", "cannot be read as an image"), ("clip.mp4", "does not begin as a mp4 file does")):
        (Path(folders[0]) / name).write_bytes(b"no image, no video")
        (Path(folders[0]) / "samples.jsonl").unlink(missing_ok=True)
        (Path(folders[0]) / "samples.json").write_text(json.dumps([{"file": name, "prompt": PROMPTS[0]}]))
        with pytest.raises(ValueError, match=said):
            create(tmp_path / f"{name}.sqlite", match(*folders), "pairs", choose("pairs", ()), 0)
    with pytest.raises(ValueError, match="has neither samples.json nor samples.jsonl"):
        read_samples(str(tmp_path))


def test_questions():
    assert [q.key for q in choose("pairs", ("overall", "text-alignment", "hands=Which hands look right?"))] == ["overall", "text_alignment", "hands"]
    assert choose("score", ("hands=Are the hands right?",))[0].choices == ("0", "1", "2")
    for wanted, said in (("nice", "is not known"), ("overall=x", "asked already"), ("A b=x", "is not allowed"), ("x=", "is not allowed")):
        with pytest.raises(ValueError, match=f"questions: .*{said}"):
            choose("pairs", (wanted,))
    with pytest.raises(ValueError, match="given twice"):
        choose("pairs", ("motion", "motion"))


def test_samples_written_one_by_one_belong_together(tmp_path):
    """What `instep sample --each` writes is what `instep human-eval` reads."""
    import torch

    from instep.cli.sample import save_each

    videos = torch.randint(0, 255, (4, 5, 16, 16, 3), dtype=torch.uint8)
    for name, of in (("a", videos), ("b", 255 - videos)):
        save_each(tmp_path / name, of, ["p", "p", "q", "q"], copies=2, seed=7)
    matched = match(str(tmp_path / "a"), str(tmp_path / "b"))
    assert [first.key for first, _ in matched.pairs] == [("p", 7, 0), ("p", 8, 0), ("q", 7, 0), ("q", 8, 0)]
    read, _ = frames.read(matched.pairs[2][1].path)
    assert np.array_equal(np.stack([np.asarray(frame) for frame in read]), 255 - videos[2].numpy())
