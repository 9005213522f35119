"""Faults that a user or a machine causes: each row of docs/faults.md, and each kind seen to fail where its guard is taken away."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from faults.all import FAULTS
from faults.sandbox import KINDS, tried


@pytest.mark.parametrize("fault", [pytest.param(f, id=f.id, marks=[pytest.mark.slow] if f.slow else []) for f in FAULTS])
def test_fault(fault, tmp_path):
    outcome = tried(fault, tmp_path)
    assert outcome.good, f"{fault.what}: {outcome.happened}; must: {fault.must}"


def test_there_are_enough_of_each_kind():
    count = Counter(fault.kind for fault in FAULTS)
    assert len(FAULTS) >= 120 and all(count[kind] >= 10 for kind in KINDS), count
    names = [(fault.kind, fault.what) for fault in FAULTS]
    assert len(set(names)) == len(names)


# a kind, a guard, what stands in its place, what a row is called that is tried without it (others would go on to real work), and how many must fail
BREAKS = (
    (1, "instep.cli.pairs.check_output", lambda *args, **kw: None, "pairs export s.sqlite file", 1),
    (1, "instep.cli.sample.sampling_settings", lambda *args: None, "sample student", 3),
    (2, "instep.methods.role_config.check_number", lambda *args, **kw: None, "AdamW", 4),
    (3, "instep.training.manifest.changes", lambda *args: [], "", 5),
    (4, "instep.methods.role_config.check_whole", lambda *args, **kw: None, "LoRA", 1),
    (4, "faults.bounds.shift_note", lambda recipe, family: None, "shift 1", 2),
    (5, "instep.data.prompt._is_row", lambda line: False, "", 1),
    (5, "instep.data.latent_cache.read_object", lambda file, *args: json.loads(file.read_text()), "latents.json", 1),
    (6, "instep.cli.evaluate.check_output", lambda *args, **kw: None, "report", 2),
    (7, "instep.rewards.base.line_of", lambda error: "", "a function", 2),
    (8, "instep.cli.main._saved_traceback", lambda args, error: "", "", 1),
    (9, "instep.core.json_files.LARGEST", 10**12, "MB", 1),
    (9, "instep.models.prompt_cache.FEW", -1, "texts need", 1),
    (9, "instep.models.prompt_cache.make_room", lambda *args, **kw: None, "beyond its limit", 1),
)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "guard", "instead", "named", "least"), BREAKS)
def test_rows_of_a_kind_fail_where_its_guard_is_gone(kind, guard, instead, named, least, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, instead)
    rows = [fault for fault in FAULTS if fault.kind == kind and not fault.slow and named in fault.what]
    failed = [fault.id for i, fault in enumerate(rows) if not tried(fault, Path(tmp_path) / str(i)).good]
    assert len(failed) >= least, failed
