"""Preference pairs on disk: what goes in comes out, and what is wrong is named with its row and field."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from human_eval_helpers import sample_folder

from instep.cli.main import main
from instep.data.pairs import PreferencePair, read_pairs, write_pairs
from instep.human_eval.create import create
from instep.human_eval.pairs import pairs_of
from instep.human_eval.questions import choose
from instep.human_eval.samples import match


@pytest.fixture
def media(tmp_path):
    for name in ("a.webp", "b.webp"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_pairs_survive_a_file_and_move_with_their_media(media, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    a, b = media / "a.webp", media / "b.webp"
    pairs = [
        PreferencePair("ein Küken läuft", a, b, "motion", (2, 1, 1), ("ana", "bo"), 7),
        PreferencePair('a "seven"\u2028moving', b, a, votes=(0, 0, 1)),
    ]
    write_pairs(media / name, pairs)
    assert read_pairs(media / name) == pairs
    moved = media.rename(media.with_name(f"{media.name}-elsewhere"))
    again = read_pairs(moved / name)
    assert again[0].chosen == moved / "a.webp" and again[1].tie and not again[0].tie and again[0].share == 2.5 / 4


def test_a_row_needs_only_prompt_chosen_and_rejected(media):
    rows = [{"prompt": "p", "chosen": "a.webp", "rejected": "b.webp"}, {"prompt": "p", "chosen": "a.webp", "rejected": "b.webp", "tie": True}]
    first, second = read_pairs(write_rows(media / "p.jsonl", *rows))
    assert first.votes == (1, 0, 0) and second.votes == (0, 0, 1) and second.tie


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"prompt": " "}, "prompt: ' ' is not allowed; it is text that is not empty"),
        ({"prompt": 3}, "prompt: 3 is not allowed; it is text that is not empty"),
        ({"chosen": None}, "chosen: None is not allowed; it is the path of an image or a video"),
        ({"chosen": "b.webp"}, "is not allowed; it is another file than chosen"),
        ({"rejected": "none.webp"}, "none.webp' is not allowed; it is a file that exists"),
        ({"question": ""}, "question: '' is not allowed; it is what was asked"),
        ({"tie": "yes"}, "tie: 'yes' is not allowed; it is true or false"),
        ({"tie": True, "votes_chosen": 2}, "tie: True is not allowed; it is false with 2 votes for chosen and 0 for rejected"),
        ({"votes_chosen": 1, "votes_rejected": 2}, "votes: (1, 2, 0) is not allowed; it is at least as many for chosen as for rejected"),
        ({"votes_chosen": -1}, "votes_chosen: -1 is not allowed; it is a whole number of 0 or more"),
        ({"votes_chosen": 0}, "votes: (0, 0, 0) is not allowed"),
        ({"votes_chosen": True}, "votes_chosen: True is not allowed"),
        ({"annotators": "ana"}, "annotators: 'ana' is not allowed; it is a list of names"),
        ({"seed": 1.5}, "seed: 1.5 is not allowed; it is a whole number below 2^63, or none"),
        ({"winner": "a"}, "winner: 'a' is not allowed; it is no field of that name; a row has prompt, chosen"),
    ],
)
def test_a_wrong_row_is_named(media, change, answer):
    good = {"prompt": "p", "chosen": "a.webp", "rejected": "b.webp"}
    path = write_rows(media / "p.jsonl", good, good | change)
    with pytest.raises(ValueError) as caught:
        read_pairs(path)
    assert f"{path}, row 2: " in str(caught.value) and answer in str(caught.value)


def test_files_that_are_no_pairs(media):
    for name, content, answer in (
        ("p.jsonl", b"", "is empty"),
        ("p.jsonl", b'{"prompt": "p"}\n', "row 1: chosen: missing"),
        ("p.jsonl", b"\xff\n", "row 1 is not JSON in UTF-8"),
        ("p.jsonl", b"[" * 100000, "row 1 is not JSON in UTF-8"),
        ("p.jsonl", b"[1]\n", "row 1: [1] is not allowed; it is an object"),
        ("p.csv", b"a,b", "ends in '.csv'; pairs are kept as .jsonl or .parquet"),
    ):
        (media / name).write_bytes(content)
        with pytest.raises(ValueError, match="pairs: ") as caught:
            read_pairs(media / name)
        assert answer in str(caught.value)
    with pytest.raises(ValueError, match="is not a file that exists"):
        read_pairs(media / "absent.jsonl")


def test_parquet_that_is_none(media):
    pytest.importorskip("pyarrow")
    (media / "p.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read_pairs(media / "p.parquet")


def test_without_pyarrow_the_answer_is_the_command_to_run(media, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r'run: pip install "instep\[parquet\]", or use .jsonl'):
        write_pairs(media / "p.parquet", [PreferencePair("p", media / "a.webp", media / "b.webp")])


def test_pairs_need_no_torch():
    code = "import sys, instep.data.pairs, instep.core.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def foreign(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        arrow.parquet.write_table(arrow.Table.from_pylist(rows), path)
        return path
    return write_rows(path, *rows)


@pytest.mark.parametrize("name", ["set.jsonl", "set.parquet"])
def test_a_set_with_other_columns_comes_in(media, name, capsys):
    pytest.importorskip("pyarrow")
    rows = [{"caption": "a hen", "win": "a.webp", "lose": "b.webp", "extra": 1}, {"caption": "a cat", "win": "b.webp", "lose": "a.webp", "extra": 2}]
    set_ = foreign(media / name, rows)
    columns = ["--prompt-column", "caption", "--chosen-column", "win", "--rejected-column", "lose"]
    assert main(["pairs", "import", str(set_), str(media / "out.parquet"), *columns]) == 0
    assert "2 pairs, 0 of them ties" in capsys.readouterr().out
    a, b = media / "a.webp", media / "b.webp"
    assert read_pairs(media / "out.parquet") == [PreferencePair("a hen", a, b), PreferencePair("a cat", b, a)]
    assert main(["pairs", "import", str(set_), str(media / "other.jsonl"), *columns[2:]]) == 2
    assert "prompt: there is no such column; there are caption, win, lose, extra" in capsys.readouterr().err


def test_images_inside_a_table_and_labels(media, capsys):
    png, jpg = b"\x89PNG\r\n\x1a\n one", b"\xff\xd8\xff two"
    rows = [{"caption": "p", "jpg_0": png, "jpg_1": jpg, "label_0": label} for label in (1.0, 0.0, 0.5)]
    set_ = foreign(media / "set.parquet", rows)
    columns = ["--prompt-column", "caption", "--first-column", "jpg_0", "--second-column", "jpg_1", "--label-column", "label_0"]
    assert main(["pairs", "import", str(set_), str(media / "out.jsonl"), *columns]) == 0
    pairs = read_pairs(media / "out.jsonl")
    assert [(p.chosen.read_bytes(), p.rejected.read_bytes(), p.tie) for p in pairs] == [(png, jpg, False), (jpg, png, False), (png, jpg, True)]
    assert {p.chosen.suffix for p in pairs} == {".png", ".jpg"} and pairs[0].chosen.parent == media / "out-media"
    nested = foreign(media / "nested.parquet", [{"prompt": "p", "chosen": {"bytes": png, "path": None}, "rejected": {"bytes": None, "path": "a.webp"}}])
    assert main(["pairs", "import", str(nested), str(media / "n.jsonl")]) == 0
    assert read_pairs(media / "n.jsonl")[0].rejected == media / "a.webp"
    capsys.readouterr()
    for change, said in (
        ({"label_0": 0.3}, "row 1: label_0: 0.3 is not allowed; allowed: 1, 0, 0.5 (first, second, tie)"),
        ({"jpg_0": b"MZ a program"}, "row 1: jpg_0: b'MZ a program'... is not allowed; it is a JPEG, PNG, GIF, WebP, MP4 or WebM file"),
        ({"caption": " "}, "row 1: caption: ' ' is not allowed"),
    ):
        bad = foreign(media / "bad.parquet", [rows[0] | change])
        assert main(["pairs", "import", str(bad), str(media / "bad.jsonl"), *columns]) == 2
        assert said in capsys.readouterr().err and not (media / "bad.jsonl").exists()
    assert main(["pairs", "import", str(set_), str(media / "x.jsonl"), "--first-column", "jpg_0"]) == 2
    assert "first-column, second-column and label-column go together" in capsys.readouterr().err


def test_media_that_are_not_here(media, capsys):
    for value, said in (("https://example.org/a.png", "fetch the file and give its path"), ("gone.webp", "it is a file that exists"), (3, "it is a path, or")):
        bad = write_rows(media / "bad.jsonl", {"prompt": "p", "chosen": value, "rejected": "b.webp"})
        assert main(["pairs", "import", str(bad), str(media / "out.jsonl")]) == 2
        assert "row 1: chosen: " in (err := capsys.readouterr().err) and said in err
    (media / "root").mkdir()
    (media / "root" / "c.webp").write_bytes(b"x")
    good = write_rows(media / "good.jsonl", {"prompt": "p", "chosen": "c.webp", "rejected": str(media / "b.webp")})
    assert main(["pairs", "import", str(good), str(media / "out.jsonl"), "--media", str(media / "root"), "--question", "motion"]) == 0
    assert read_pairs(media / "out.jsonl")[0] == PreferencePair("p", media / "root" / "c.webp", media / "b.webp", "motion")


def test_what_people_preferred_becomes_pairs(tmp_path):
    matched = match(str(sample_folder(tmp_path / "ours", "red")), str(sample_folder(tmp_path / "theirs", "blue")))
    store = create(tmp_path / "j.sqlite", matched, "pairs", choose("pairs", ("overall", "motion")), 0)
    with pytest.raises(ValueError, match="has no answers to make pairs of"):
        pairs_of(store)
    for name, better in (("Ana", 0), ("Bo", 0), ("Cy", 1)):
        store.join(name)
        while (item := store.state(name).item) is not None:
            side = "left" if item.left.run == better else "right"
            store.answer(name, item.id, f"{name}{item.id}", {"overall": side, "motion": side if name == "Bo" else "equal"})
    assert store.undo("Cy", "undo")
    told = pairs_of(store, ("overall",))
    assert Counter(pair.votes for pair in told) == {(2, 1, 0): 5, (2, 0, 0): 1} and all(pair.chosen.parent.name == "ours" for pair in told)
    assert Counter(pair.votes for pair in pairs_of(store, ("motion",))) == {(1, 0, 2): 5, (1, 0, 1): 1}
    each = pairs_of(store, ("motion",), each=True)
    assert Counter((pair.annotators, pair.tie) for pair in each) == {(("Ana",), True): 6, (("Bo",), False): 6, (("Cy",), True): 5}
    assert len(pairs_of(store, each=True, ties=False)) == 17 + 6
    store.close()
    scored = create(tmp_path / "s.sqlite", matched, "score", choose("score", ()), 0)
    with pytest.raises(ValueError, match="holds scores of single samples; pairs come from --mode pairs"):
        pairs_of(scored)
    scored.close()
