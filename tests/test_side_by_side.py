"""The benchmark beside nvidia-modelopt: its smallest case of our side runs, and the documents hold what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.slow
def test_the_smallest_case_counts_the_passes_of_the_algorithm():
    command = [sys.executable, str(ROOT / "benchmarks" / "side_by_side.py"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (measured,) = json.loads(done.stdout)["measured"]
    rows = measured["rows"]
    assert set(rows) == {"reused", "fresh", "lora"}
    forward = {name: {role: seen["forward"] for role, seen in row["passes"].items()} for name, row in rows.items()}
    backward = {name: {role: seen["backward"] for role, seen in row["passes"].items()} for name, row in rows.items()}
    # four levels, exits as frequent as one another: 2.5 evaluations a rollout, of which fresh rollouts make five more
    assert forward["reused"] == {"student": 2.5, "fake": 6, "teacher": 2}
    assert forward["fresh"] == {"student": 2.5 + 5 * 2.5, "fake": 6, "teacher": 2}
    assert backward["reused"] == backward["fresh"] == {"student": 1, "fake": 5, "teacher": 0}
    assert all(row["cpu_s"]["median"] > 0 for row in rows.values())
    sizes = {name: sum(row["bytes"].values()) for name, row in rows.items()}
    assert sizes["fresh"] == sizes["reused"] > 2 * sizes["lora"]


def test_memory_counts_each_storage_once(benchmarks):
    from sides import stored_bytes

    a = torch.zeros(10)
    assert stored_bytes([a, a[2:], a.view(2, 5), torch.zeros(3)]) == 4 * 13


def test_draws_of_a_neighbour_are_balanced(benchmarks):
    from sides import balanced_seeds

    drawn = []
    for seed in balanced_seeds(4, 6)[:24]:
        torch.manual_seed(seed)
        drawn.append(int(torch.randint(0, 4, (1,))))
    assert drawn == [0, 1, 2, 3] * 6


def test_an_uneven_batch_is_refused(benchmarks, monkeypatch, capsys):
    import side_by_side

    monkeypatch.setattr(sys, "argv", ["side_by_side.py", "--batch", "6"])
    monkeypatch.setattr(side_by_side, "measure", lambda *args: pytest.fail("it was measured"))
    with pytest.raises(SystemExit):
        side_by_side.main()
    assert "--batch: 6 is not allowed" in capsys.readouterr().err


def test_a_limit_is_held_or_missed_if_every_round_says_so(benchmarks):
    from results_side_by_side import verdict

    spread = {"median": 0.9, "low": 0.8, "high": 1.0}
    assert [verdict(spread, limit) for limit in (1.0, 0.95, 0.79)] == ["0.900 (held)", "0.900 (rounds on both sides of it)", "0.900 (missed)"]
    assert verdict(1.0, 1.0) == "1.000 (held)"


def test_results_hold_what_was_measured(benchmarks):
    """Red where the measurement or its section changed: run `make results`."""
    from results_side_by_side import lines

    assert "\n".join(lines()) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
