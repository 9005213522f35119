"""The benchmark of the hacking flag: the laboratory through the real probe, and what its page makes of the runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def stored(folder, name, meant, before, after, flagged=None):
    """A run as it is stored, with `before` and `after` as (quality, tv)."""
    figures = lambda pair: {"quality": pair[0], "tv": pair[1], "reached": 8.0}  # noqa: E731
    findings = [{"step": flagged, "level": "alarm", "flag": "hacking", "text": ""}] if flagged else []
    cleared = [{"step": 90, "level": "ok", "flag": "hacking", "text": "cleared: hacking"}]
    found = {"meant": meant, "seed": 0, "before": figures(before), "after": figures(after), "findings": findings + cleared, "probes": []}
    (folder / f"{name}-0.json").write_text(json.dumps(found))


def test_what_is_true_follows_from_the_exact_figures_alone(tmp_path):
    """A run that kept its samples is clean whatever it was meant to be, and one that lost them is hacked."""
    from results_hacking import lines

    stored(tmp_path, "refl-right", "hacked", (0.9, 0.0), (0.7, 0.0), 60)
    stored(tmp_path, "refl-half", "hacked", (0.9, 0.0), (0.9, 0.3))
    stored(tmp_path, "alone-right", "hacked", (0.9, 0.0), (0.85, 0.05))
    stored(tmp_path, "amd-on-mode", "clean", (0.9, 0.0), (0.95, 0.0), 40)
    stored(tmp_path, "amd-density", "clean", (0.9, 0.0), (0.95, 0.0))
    page = "\n".join(lines(tmp_path))
    assert "- Misses: 1 of 2 (95 % interval 9% to 91%); asked: at most 10%, **not reached**" in page
    assert "- False alarms: 1 of 3" in page
    assert "| refl-right | hacked | 1 of 1 | 1 of 1 | 60 | 0.90 to 0.70 | 8.0 to 8.0 | 0.00 to 0.00 |" in page
    assert "| alone-right | hacked | 0 of 1 | 0 of 1 | - |" in page
    assert lines(tmp_path / "none") == []


def test_the_probe_sees_the_points_themselves():
    """Exact samples through pixels and back: nearly all on a mode, and eight draws of four modes reach 4 (1 - (3/4)^8) of them."""
    from hacking import WORLD, ModesMonitor, to_media, to_points

    monitor, rng = ModesMonitor(), torch.Generator().manual_seed(0)
    names = [prompt for prompt in monitor.open_prompts * 20 for _ in range(monitor.open_copies)]
    x = WORLD.mixture.sample(torch.tensor([int(name) for name in names]), rng)
    torch.testing.assert_close(to_points(to_media(x)), x)
    media = to_media(x).clamp(0, 1)
    assert monitor.metrics(media, names)["monitor_both"] == pytest.approx(1 - 0.0111, abs=0.01)  # exp(-9 / 2) lie farther than three deviations
    assert monitor.modes(media) == pytest.approx(4 * (1 - 0.75**8), abs=0.1)
    swapped = ["1" if name == "0" else "0" for name in names]
    assert monitor.metrics(media, swapped)["monitor_both"] < 0.01


def test_twenty_runs_of_each_kind_from_a_run_of_its_own():
    """Every arm is one stage at the start's number of steps."""
    from hacking import ALIGN, ARMS, SEEDS, STEPS, options

    for truth in ("hacked", "clean"):
        assert len(SEEDS) * sum(arm.meant == truth for arm in ARMS.values()) == 20
    for arm in ARMS.values():
        (stage,) = arm.recipe(options()).stages
        assert stage.steps == ALIGN and len(stage.rollout.levels) == STEPS
