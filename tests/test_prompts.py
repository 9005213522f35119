"""Prompts as values, their written form, and files of them: what is read, and errors that name the file and the line."""

from __future__ import annotations

import codecs
import json
from dataclasses import replace
from pathlib import Path

import pytest

from instep.data.prompt import Prompt, as_prompts, load_prompts, with_negative


def written(tmp_path, data: bytes, name: str = "prompts.txt"):
    file = tmp_path / name
    file.write_bytes(data)
    return file


def texts(*given):
    return [Prompt(text) for text in given]


WHOLE = Prompt("a cat, [sic] runs", "folder/my cat.png", "blurry [or] dark")


@pytest.mark.parametrize(
    ("prompt", "written_form"),
    [
        (Prompt("a cat, [sic] runs"), "a cat, [sic] runs"),
        (WHOLE, "a cat, [sic] runs [image: folder/my cat.png] [negative: blurry [or] dark]"),
        (replace(WHOLE, image=None), "a cat, [sic] runs [negative: blurry [or] dark]"),
        (replace(WHOLE, negative=None, text=""), " [image: folder/my cat.png]"),
        (Prompt("a cat", negative=""), "a cat [negative: ]"),
        (Prompt(" a cat\n"), " a cat\n"),
        (Prompt("a cat", negative="two\nlines ]"), "a cat [negative: two\nlines ]]"),
    ],
)
def test_the_written_form_and_its_inverse(prompt, written_form):
    assert str(prompt) == written_form and Prompt.parse(written_form) == prompt and hash(Prompt.parse(written_form)) == hash(prompt)


def test_what_people_write_is_read_with_any_spaces():
    assert Prompt.parse("a cat[image:  cat.png ]  [negative: dark] ") == Prompt("a cat", Path("cat.png"), "dark")
    assert Prompt("a cat ", "cat.png") == Prompt("a cat", Path("cat.png"))


def test_values_that_are_no_prompt():
    for name in ("a]b.png", "[a", "", " "):
        with pytest.raises(ValueError, match="image: .* for prompt 'a cat' is not allowed; one name without square brackets"):
            Prompt("a cat", name)
    with pytest.raises(ValueError, match="text: 'a cat .image: cat.png.' is the written form of a prompt; give Prompt.'a cat', image='cat.png'."):
        Prompt("a cat [image: cat.png]")
    with pytest.raises(ValueError, match="text: 'a .negative: b' is not allowed; leave '.image: ' and '.negative: ' out of it"):
        Prompt("a [negative: b", negative="c")
    for fields in ({"text": 3}, {"text": "a", "image": 3}, {"text": "a", "negative": ["b"]}):
        with pytest.raises(ValueError, match=rf"{list(fields)[-1]}: .* is not allowed in a prompt; it is text"):
            Prompt(**fields)


def test_lists_of_prompts():
    assert as_prompts(["a cat", WHOLE]) == as_prompts(("a cat", WHOLE)) == (Prompt("a cat"), WHOLE)
    assert with_negative(["a", WHOLE, Prompt("b", negative="")], "dark") == (Prompt("a", negative="dark"), WHOLE, Prompt("b", negative=""))
    for wrong, message in (
        ("a cat", r"prompts: 'a cat' is one prompt alone; give a list of prompts, \['a cat'\]"),
        (WHOLE, "prompts: Prompt.* is one prompt alone"),
        ((p for p in ["a"]), "prompts: generator is not allowed; give a list of texts or Prompt values"),
        (None, "prompts: NoneType is not allowed"),
        ({"a"}, "prompts: set is not allowed"),
        (b"ab", "prompts: bytes is not allowed"),
        (["a", 3], "prompts: item 1 is 3, which is not allowed"),
        (["a", "b [image: c.png]"], "text: 'b .image: c.png.' is the written form"),
    ):
        with pytest.raises(ValueError, match=message):
            as_prompts(wrong)


def test_text_files_hold_written_forms(tmp_path):
    found = load_prompts(written(tmp_path, b"a cat [image: cat.png]\n a dog [negative: dark]\n"))
    assert found == [
        Prompt("a cat", "cat.png"),
        Prompt("a dog", negative="dark"),
    ]


def test_json_lines_name_images_from_where_they_lie_and_negative_prompts(tmp_path):
    lines = [
        {"prompt": "a cat ", "image": "cat.png"},
        {"prompt": "a seven", "image": "train/7", "negative": "dark"},
        {"prompt": "alone", "negative_prompt": ""},
        {"prompt": "a dog", "image": None, "negative": None},
    ]
    found = load_prompts(written(tmp_path, "\n".join(map(json.dumps, lines)).encode(), "prompts.jsonl"))
    expected = [Prompt("a cat", tmp_path / "cat.png"), Prompt("a seven", "train/7", "dark"), Prompt("alone", negative=""), Prompt("a dog")]
    assert found == expected, "a name without an ending is no file's: the model gives it a meaning"
    for row, message in (
        ({"prompt": "a cat", "image": 3}, "line 1 has the image 3; it is the name of a file"),
        ({"prompt": "a cat", "negative": 3}, r"line 1 has the negative prompt \[3\]; it is one text"),
        ({"prompt": "a cat", "negative": "a", "negative_prompt": "b"}, "line 1 has the negative prompt .*; it is one text"),
        ({"prompt": "a cat", "image": "a[1].png"}, "prompts.jsonl, line 1: image: .* one name without square brackets"),
        ({"prompt": "a cat [image: b.png]"}, "prompts.jsonl, line 1: text: .* is the written form"),
    ):
        with pytest.raises(ValueError, match=message):
            load_prompts(written(tmp_path, json.dumps(row).encode(), "prompts.jsonl"))


def test_one_prompt_a_line(tmp_path):
    file = written(tmp_path, "a seven\n\n   \n  ein Löwe, der läuft  \na seven".encode())
    assert load_prompts(file) == texts("a seven", "ein Löwe, der läuft", "a seven"), "blank lines are skipped, repetitions are kept"
    assert load_prompts(str(file)) == load_prompts(file)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["unix", "windows", "old mac"])
def test_line_ends(tmp_path, end):
    assert load_prompts(written(tmp_path, b"one" + end + end + b"two" + end)) == texts("one", "two")


def test_a_byte_order_mark_is_not_part_of_the_prompt(tmp_path):
    assert load_prompts(written(tmp_path, codecs.BOM_UTF8 + b"one\ntwo\n")) == texts("one", "two")
    assert load_prompts(written(tmp_path, codecs.BOM_UTF8 + b'{"prompt": "one"}\n', "p.jsonl")) == texts("one")


def test_missing(tmp_path):
    with pytest.raises(ValueError, match=r"prompts: .*nowhere.txt is not a file that exists; give a text file"):
        load_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="is not a file"):
        load_prompts(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\n \n\t\n", codecs.BOM_UTF8], ids=["nothing", "blank lines", "mark"])
def test_empty(tmp_path, data):
    with pytest.raises(ValueError, match=r"prompts: .*prompts.txt is empty; write at least one prompt"):
        load_prompts(written(tmp_path, data))


@pytest.mark.parametrize(("before", "line"), [(b"", 1), (b"one\n\ntwo\n", 4), (codecs.BOM_UTF8 + b"a\n", 2)])
def test_not_utf8(tmp_path, before, line):
    with pytest.raises(ValueError, match=rf"prompts: .*prompts.txt, line {line} is not UTF-8 \(.*\); save the file as UTF-8"):
        load_prompts(written(tmp_path, before + "café".encode("latin-1") + b"\nlast\n"))
    with pytest.raises(ValueError, match="line 1 is not UTF-8"):
        load_prompts(written(tmp_path, "a seven".encode("utf-16")))


def test_json_lines(tmp_path):
    lines = [{"prompt": " a seven "}, {"id": 3, "prompt": "ein Löwe"}, {"prompt": "two\u2028paragraphs"}]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    assert load_prompts(written(tmp_path, text.encode(), "prompts.jsonl")) == texts("a seven", "ein Löwe", "two\u2028paragraphs")
    # without the name too, if all lines are such objects; otherwise it is text, and a brace is a brace
    assert load_prompts(written(tmp_path, b'{"prompt": "x"}\n{"prompt": "y"}')) == texts("x", "y")
    assert load_prompts(written(tmp_path, b'{"prompt": "x"}\na seven')) == texts('{"prompt": "x"}', "a seven")


@pytest.mark.parametrize("wrong", [b'{"prompt": "x"', b"a seven", b'{"text": "x"}', b'["x"]', b'"x"', b"3", b"null"])
def test_json_lines_of_another_form(tmp_path, wrong):
    file = written(tmp_path, b'{"prompt": "x"}\n\n' + wrong + b"\n", "prompts.jsonl")
    with pytest.raises(ValueError, match=r'prompts: .*prompts.jsonl, line 3 is not of the form \{"prompt": "..."\}'):
        load_prompts(file)


@pytest.mark.parametrize("wrong", [b"3", b"null", b'""', b'"  "', b'["x"]'])
def test_json_prompts_that_are_not_text(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"line 1 holds .*; a prompt is text that is not empty"):
        load_prompts(written(tmp_path, b'{"prompt": ' + wrong + b"}", "prompts.jsonl"))


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    file = written(tmp_path, b"a hen")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"prompts: .*prompts.txt cannot be read \(Permission denied\); see to its permissions"):
        load_prompts(file)
