"""Prompt files: what is read, and errors that name the file and the line."""

from __future__ import annotations

import codecs
import json

import pytest

from instep.data.prompt import load_prompts


def written(tmp_path, data: bytes, name: str = "prompts.txt"):
    file = tmp_path / name
    file.write_bytes(data)
    return file


def test_one_prompt_a_line(tmp_path):
    file = written(tmp_path, "a seven\n\n   \n  ein Löwe, der läuft  \na seven".encode())
    assert load_prompts(file) == ["a seven", "ein Löwe, der läuft", "a seven"], "blank lines are skipped, repetitions are kept"
    assert load_prompts(str(file)) == load_prompts(file)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["unix", "windows", "old mac"])
def test_line_ends(tmp_path, end):
    assert load_prompts(written(tmp_path, b"one" + end + end + b"two" + end)) == ["one", "two"]


def test_a_byte_order_mark_is_not_part_of_the_prompt(tmp_path):
    assert load_prompts(written(tmp_path, codecs.BOM_UTF8 + b"one\ntwo\n")) == ["one", "two"]
    assert load_prompts(written(tmp_path, codecs.BOM_UTF8 + b'{"prompt": "one"}\n', "p.jsonl")) == ["one"]


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
    assert load_prompts(written(tmp_path, text.encode(), "prompts.jsonl")) == ["a seven", "ein Löwe", "two\u2028paragraphs"]
    # without the name it is text, and a brace is a brace
    assert load_prompts(written(tmp_path, b'{"prompt": "x"}')) == ['{"prompt": "x"}']


@pytest.mark.parametrize("wrong", [b'{"prompt": "x"', b"a seven", b'{"text": "x"}', b'["x"]', b'"x"', b"3", b"null"])
def test_json_lines_of_another_form(tmp_path, wrong):
    file = written(tmp_path, b'{"prompt": "x"}\n\n' + wrong + b"\n", "prompts.jsonl")
    with pytest.raises(ValueError, match=r'prompts: .*prompts.jsonl, line 3 is not of the form \{"prompt": "..."\}'):
        load_prompts(file)


@pytest.mark.parametrize("wrong", [b"3", b"null", b'""', b'"  "', b'["x"]'])
def test_json_prompts_that_are_not_text(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"line 1 holds .*; a prompt is text that is not empty"):
        load_prompts(written(tmp_path, b'{"prompt": ' + wrong + b"}", "prompts.jsonl"))
