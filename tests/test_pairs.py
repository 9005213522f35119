"""Preference pairs on disk: what goes in comes out, and what is wrong is named with its row and field."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from instep.data.pairs import PreferencePair, read_pairs, write_pairs


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
        ({"chosen": None}, "chosen: None is not allowed; it is the path of a picture or a video"),
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
    code = "import sys, instep.data.pairs, instep.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
