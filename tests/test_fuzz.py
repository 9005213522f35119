"""Readers of other people's files, given anything: each returns what it promises or raises ValueError, and never another exception."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instep.bundled import base_model
from instep.cli.export import read_run
from instep.core.json_lines import read_rows
from instep.core.tensor_file import read_tensors
from instep.data.pairs import read_pairs
from instep.data.prompt import Prompt, load_prompts
from instep.human_eval.guard import LARGEST_BODY, Refused, read_body
from instep.human_eval.store import Store
from instep.models.folder import settings_in
from instep.training import checkpoint, stop

FEW = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
KEYS = st.sampled_from(["prompt", "chosen", "rejected", "image", "step", "config", "x"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
JSON = VALUES.map(lambda value: json.dumps(value).encode())
LINES = st.lists(JSON | st.binary(max_size=30), max_size=4).map(b"\n".join)
ANY = st.binary(max_size=200) | JSON | LINES


def read(reader, name: str, content: bytes) -> object:
    """What a reader makes of a file in a folder of its own; None where it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        with contextlib.suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return reader(file)
    return None


@FEW
@given(st.sampled_from([".txt", ".jsonl", ".json", ".csv"]), ANY)
def test_prompts(suffix, content):
    found = read(load_prompts, f"p{suffix}", content)
    assert found is None or (found and all(isinstance(prompt, Prompt) for prompt in found))  # type: ignore[attr-defined]


@FEW
@given(st.text(max_size=60) | st.lists(st.sampled_from([" [image: ", "a.png", "]", " [negative: ", "a cat", " "]), max_size=8).map("".join))
def test_a_prompt_that_is_read_has_one_written_form(written):
    with contextlib.suppress(ValueError):
        prompt = Prompt.parse(written)
        assert Prompt.parse(str(prompt)) == prompt


@FEW
@given(LINES)
def test_pairs(content):
    read(read_pairs, "p.jsonl", content)


@FEW
@given(ANY)
def test_records_of_runs_and_models(content):
    for reader, name in (
        (lambda f: read_run(f.parent), "recipe.json"),
        (lambda f: settings_in(f.parent), "model_index.json"),
        (lambda f: settings_in(f.parent.parent), "transformer/config.json"),
        (lambda f: stop.read(f.parent), "stopped.json"),
        (lambda f: base_model(f.parent), "instep_export.json"),
    ):
        found = read(reader, name, content)
        assert name != "recipe.json" or found is None or isinstance(found, dict)


@FEW
@given(ANY)
def test_logs(content):
    assert isinstance(read(read_rows, "log.jsonl", content), list)


@FEW
@given(st.binary(max_size=200) | JSON.map(lambda header: len(header).to_bytes(8, "little") + header))
def test_tensor_files(content):
    read(lambda file: list(read_tensors(file)), "x.safetensors", content)


@FEW
@given(st.sampled_from(["state.json", "tensors.safetensors"]), ANY)
def test_checkpoints(name, content):
    assert read(lambda file: checkpoint.latest(file.parents[1]), f"checkpoints/step-00000001/{name}", content) is None


@FEW
@given(ANY)
def test_stores(content):
    read(Store, "s.sqlite", content)


@FEW
@given(st.binary(max_size=12), st.lists(st.binary(max_size=LARGEST_BODY), max_size=4))
def test_bodies_of_requests(length, parts):
    messages = iter([{"type": "http.request", "body": part, "more_body": i < len(parts) - 1} for i, part in enumerate(parts)] or [{"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    with contextlib.suppress(Refused):
        assert len(asyncio.run(read_body({"headers": [(b"content-length", length)]}, receive))) <= LARGEST_BODY


def test_the_fuzz_finds_a_reader_that_lets_another_exception_through():
    with pytest.raises(TypeError):
        read(lambda file: json.loads(file.read_bytes())["prompt"], "p.json", b"3")
