"""The benchmark of methods side by side: every arm updates its student as often, cells resume, and the page tells what errors allow."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from instep.bundled import find
from instep.core.files import write_json
from instep.metrics.compare import Row
from instep.metrics.figures import Value

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def plan():
    from methods_on import Plan

    return Plan("moving-digits", steps=2, guidance=1.0, base=3, more=2, batch=8)


def test_every_arm_updates_its_student_as_often(plan):
    from methods_on import ARMS

    for name, arm in ARMS.items():
        stages = [stage for stage in arm.recipe(plan).stages if stage.terms]
        expected = plan.more if arm.start or name == "tuned-teacher" else plan.base + plan.more * (arm.reading_of is not None)
        assert sum(stage.steps for stage in stages) == expected, name
        assert arm.recipe(plan).guidance == 1.0
    assert {name for name, arm in ARMS.items() if arm.reward == "exact"} == {"dmdr-grpo", "dollar", "dollar-without-cd", "tuned-teacher"}
    assert all("reward_gradient" not in arm.recipe(plan).needs for arm in ARMS.values() if arm.reward == "exact")


def test_cells_are_trained_in_order_measured_and_not_run_again(plan, tmp_path, monkeypatch):
    import methods_on

    seen, place = [], methods_on.Place(tmp_path / "runs", tmp_path / "results")

    def train(recipe, family, **given):
        seen.append((recipe.name, given["out"].name, given["start_from"] and given["start_from"].name, given["reward"].differentiable))
        assert family == ("tuned" if given["out"].name.startswith("moving-digits-2-two-stage") else "bundled")

    class Ready:
        family, prompts, monitor = "bundled", (), None
        reward = type("Own", (), {"differentiable": True})

        def real(self):
            return None

    world = type("W", (), {"ready": lambda self: Ready(), "rewards": {"exact": lambda: type("Exact", (), {"differentiable": False})}})()
    monkeypatch.setattr(methods_on, "find", lambda name: world)
    monkeypatch.setattr(methods_on, "load", lambda folder: "tuned")
    monkeypatch.setattr(methods_on, "train", train)
    stored = lambda file, run, recipe, where, name, **more: write_json(file, {"seed": more["seed"], **more["about"]})  # noqa: E731
    monkeypatch.setattr(methods_on, "store", stored)
    for arm in ("dm-align-group", "dollar", "two-stage"):
        methods_on.run_cell(plan, arm, 7, place)
        methods_on.run_cell(plan, arm, 7, place)
    assert seen == [
        ("dmd2", "moving-digits-2-start-7", None, True),
        ("dm-align-group", "moving-digits-2-dm-align-group-7", "moving-digits-2-start-7", True),
        ("dollar", "moving-digits-2-dollar-7", "moving-digits-2-start-7", False),
        ("dance-grpo", "moving-digits-2-tuned-teacher-7", None, False),
        ("dmd2", "moving-digits-2-two-stage-7", None, True),
    ]
    assert json.loads(place.file(plan, "two-stage", 7).read_text())["before"] == "tuned-teacher"
    with pytest.raises(ValueError, match="more 2 there, 9 now"):
        methods_on.run_cell(replace(plan, more=9), "amd", 7, place)
    one = replace(plan, steps=1)
    methods_on.run_cell(one, "dmdr-grpo", 7, place)
    assert not place.file(one, "dmdr-grpo", 7).is_file() and len(seen) == 5


def row(name: str, both: float, fd: float, modes: float = 8.0) -> Row:
    values = {
        "heldout_both": Value(both, 0.02),
        "fd": Value(fd, 0.2),
        "fd_open": Value(2 * fd, 0.2),
        "modes_motion": Value(modes, 0.1),
        "modes_digit": Value(7.0, 0.1),
    }
    return Row(name, "student", values, 2, 2, 1.0, 612)


def test_a_paired_difference_has_the_larger_of_two_errors():
    from results_methods import paired

    control = {0: row("c", 0.7, 8.0), 1: row("c", 0.8, 8.0), 2: row("c", 0.75, 8.0)}
    steady = {0: row("a", 0.8, 8.0), 1: row("a", 0.9, 8.0), 5: row("a", 0.1, 8.0)}
    found = paired(steady, control, "heldout_both")
    assert found is not None and found.value == pytest.approx(0.1) and found.se == pytest.approx((4 * 0.02**2) ** 0.5 / 2), "seeds agree: what samples allow"
    wild = {0: row("a", 0.7, 8.0), 1: row("a", 1.0, 8.0)}
    spread = paired(wild, control, "heldout_both")
    assert spread is not None and spread.value == pytest.approx(0.1) and spread.se == pytest.approx(0.1), "0.0 and 0.2: their deviation over the root of two"
    assert paired(steady, {4: row("c", 0.7, 8.0)}, "heldout_both") is None


def test_the_page_has_a_row_an_arm_and_what_it_costs(plan, tmp_path, monkeypatch):
    import results_methods

    cells = {"start": (0.7, 8.0, 8.0), "control": (0.7, 8.0, 8.0), "dm-align-group": (0.9, 8.0, 7.9), "amd": (0.9, 9.0, 6.0), "rl-after": (0.5, 8.0, 8.0)}
    for arm, figures in {**cells, "dm-align-pair": (0.72, 8.0, 8.0)}.items():
        for seed in (0, 1):
            about = {"plan": asdict(plan), "arm": arm, "before": None if arm == "start" else "start", "seed": seed, "train_cpu_s": 10.0}
            write_json(tmp_path / f"moving-digits-2-{arm}-{seed}.json", {"row": row(arm, *figures).json(), **about})
    (one,) = found = results_methods.read(tmp_path)
    monkeypatch.setattr(results_methods, "read", lambda: found)
    text = "\n".join(results_methods.lines())
    assert text.startswith("## Methods side by side") and "### moving-digits, 2 steps" in text and "| real videos (another draw) | - | - | " in text
    assert "| teacher, 50 steps | 50 | - | " in text and "| teacher, 2 steps | 2 | - | " in text, "rows that ship"
    assert "no larger FD: reached by the default. Of them the default gains most: +0.200 ± 0.020 at 99%." in text
    said = {line.split(" | ")[0].strip("| "): line for line in results_methods.against_control(one)}
    assert said["DM-Align (Group)"].endswith("| +0.200 ± 0.020 | +0.000 ± 0.200 | +0.000 ± 0.200 | 99% ± 1% | better |")
    assert said["AMD"].endswith("75% ± 1% | better, at the cost of modes, FD and FD (open prompts) |") and said["ReFL alone after distillation"].endswith(
        "| worse |"
    )
    assert said["DM-Align (Pair)"].endswith("| no difference |")
    assert "| 20 |" in next(line for line in text.splitlines() if line.startswith("| AMD")), "the start's seconds too"


def test_readings_stand_beside_their_default_on_the_same_seeds(plan, tmp_path):
    import results_methods

    cells = {"control": (0, 1), "dm-align-group": (0, 1), "dm-align-group-low": (0, 1), "dm-align-group-half": (0,), "dm-align-pair": (0, 1)}
    for arm, seeds in cells.items():
        for seed in seeds:
            about = {"plan": asdict(plan), "arm": arm, "before": None, "seed": seed, "train_cpu_s": 10.0}
            gain = {"dm-align-group": 0.1 + 0.3 * seed, "dm-align-group-low": 0.05, "dm-align-group-half": 0.2}.get(arm, 0.0)
            there = row(arm, 0.5 + gain, 8.0, 8 - 10 * gain)
            there.values["monitor_both"] = Value(0.4 + gain / 2, 0.02)
            write_json(tmp_path / f"moving-digits-2-{arm}-{seed}.json", {"row": there.json(), **about})
    (found,) = results_methods.read(tmp_path)
    lines = results_methods.readings(found, "dm-align-group")
    assert "Readings of DM-Align (Group)" in lines[0] and len(lines) == 9
    assert [line.split(" | ")[:4] for line in lines[4:8]] == [
        ["| the default", "0, 1", "+0.125 ± 0.075", "+0.250 ± 0.150"],
        ["| `--weight .15 --matching .85`", "0, 1", "+0.025 ± 0.020", "+0.050 ± 0.020"],
        ["| the default", "0", "+0.050 ± 0.028", "+0.100 ± 0.028"],
        ["| `--weight .5 --matching .5`", "0", "+0.100 ± 0.028", "+0.200 ± 0.028"],
    ]
    assert results_methods.readings(found, "dm-align-pair") == [], "a default alone"
    main = "\n".join([*results_methods.against_control(found), *results_methods.table(found, find(plan.world).evaluation.columns)])
    assert "DM-Align (Group)" in main and "--weight" not in main, "readings have a table of their own"
    assert "`--weight .5 --matching .5` gains most" not in (told := results_methods.asked(found)[0]) and "Of them the default gains most: +0.250" in told


def test_without_arms_every_method_runs_in_its_default_reading(monkeypatch, tmp_path):
    import methods_on

    ran = []
    monkeypatch.setattr(methods_on, "run_cell", lambda plan, name, seed, place: ran.append(name))
    methods_on.main(["moving-digits", "--seeds", "0", "--results", str(tmp_path)])
    assert {"control", "dm-align-group", "two-stage"} <= set(ran) and len(ran) == len(set(ran)) and not [name for name in ran if "group-" in name]
    assert all(methods_on.ARMS[arm.reading_of].reading_of is None for arm in methods_on.ARMS.values() if arm.reading_of)
