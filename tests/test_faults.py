"""Faults that a user or a machine causes: each row of docs/faults.md, and each kind seen to fail where its guard is taken away."""

from __future__ import annotations

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


# a guard, what stands in its place, and the kind whose rows then fail
BREAKS = (
    (1, "instep.cli.pairs.check_output", lambda *args, **kw: None, 1),
    (2, "instep.methods.recipe.check_number", lambda *args, **kw: None, 4),
    (3, "instep.training.manifest.changes", lambda *args: [], 5),
    (4, "instep.methods.recipe.check_whole", lambda *args, **kw: None, 1),
    (5, "instep.data.prompt._is_row", lambda line: False, 1),
    (6, "instep.cli.evaluate.check_output", lambda *args, **kw: None, 2),
    (7, "instep.rewards.base.line_of", lambda error: "", 2),
    (8, "instep.cli.main._saved_traceback", lambda args, error: "", 1),
    (9, "instep.core.json_files.LARGEST", 10**12, 1),
)


@pytest.mark.parametrize(("kind", "guard", "instead", "least"), BREAKS)
def test_rows_of_a_kind_fail_where_its_guard_is_gone(kind, guard, instead, least, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, instead)
    rows = [fault for fault in FAULTS if fault.kind == kind and not fault.slow and HARMLESS.get(kind, "") in fault.what]
    failed = [fault.id for i, fault in enumerate(rows) if not tried(fault, Path(tmp_path) / str(i)).good]
    assert len(failed) >= least, failed


# only these rows are tried without their guard: the others would go on to real work
HARMLESS = {1: "pairs export s.sqlite file", 2: "AdamW", 4: "LoRA", 6: "report", 7: "a function", 9: "MB"}
