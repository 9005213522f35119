"""Held figures: the control law on plants in closed form, its state in checkpoints, and what is refused."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, replace

import pytest
from test_run import PROMPTS, family, interrupted_before, rows, same
from test_stop import Brightness, Mild

from instep.methods.role_config import AdamWConfig
from instep.recipes.amd import amd
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.recipes.dmdr import dmdr
from instep.recipes.refl import refl
from instep.report import write_report
from instep.training.findings import FLAGS
from instep.training.health import examine, flags
from instep.training.hold import LEAST, MARGIN, MOST, OUTSIDE, RISE, START, TOLERANCE, Bound, Controller, Held, Law, check, parse
from instep.training.options import RunOptions
from instep.training.run import train

RECIPE = refl(Common(batch=4, steps=2, critic_updates=1, student=AdamWConfig(2e-3)), distil=2, iterations=6)


def plant(a: float, rate: float, bound: Bound, probes: int = 80, noise: float = 0.0, seed: int = 0) -> list[tuple[float, float]]:
    """(figure as the probe shows it, multiplier) after each probe, of the figure x <- x + rate (1 - a m - x); `a` negative is one that grows with the weight.

    `noise`: standard deviation of a probe.
    """
    law, x, seen, rng = Law(), 1.0, [], random.Random(seed)
    for _ in range(probes):
        x += rate * (1 - a * law.multiplier - x)
        shown = x + rng.gauss(0, noise) if noise else x
        law = law.after(bound.slack(shown))
        seen.append((shown, law.multiplier))
    return seen


@pytest.mark.parametrize("fraction", [0.95, 0.8])
@pytest.mark.parametrize("rate", [1.0, 0.5, 0.2, 0.1, 0.05])
@pytest.mark.parametrize("steep", [1.0, 4.0, 10.0])
def test_a_plant_settles_in_its_band(fraction, rate, steep):
    """1 - a m with a = `steep` widths of the band: x comes to rest MARGIN inside the bound and never leaves it by more than TOLERANCE."""
    width = 1 - fraction
    seen = plant(steep * width, rate, Bound("diversity", fraction), 160)
    slack = [(x - fraction) / width for x, _ in seen]
    assert min(slack) >= -TOLERANCE
    assert slack[-1] == pytest.approx(MARGIN, abs=0.05)
    assert seen[-1][1] == pytest.approx((1 - MARGIN) / steep, rel=0.06), "the weight in closed form: 1 - a m = b + MARGIN (1 - b)"


@pytest.mark.parametrize(("noise", "rest"), [(0.05, 0.35), (0.1, 0.56)])
def test_a_noisy_figure_rests_farther_inside(noise, rest):
    """Noise in widths of the band: the mean slack at the end is that of the module's text, and 98 of 100 runs stay within the tolerance."""
    bound, width = Bound("diversity", 0.9), 0.1
    runs = [
        [bound.slack(x) for x, _ in plant(steep * width, rate, bound, 160, noise * width, seed)]
        for steep in (1.0, 4.0, 10.0)
        for rate in (1.0, 0.5, 0.2, 0.1, 0.05)
        for seed in range(10)
    ]
    assert sum(sum(slacks[-40:]) / 40 for slacks in runs) / len(runs) == pytest.approx(rest, abs=0.03)
    assert sum(min(slacks) < -TOLERANCE for slacks in runs) <= 0.02 * len(runs)


def test_a_bound_from_above_is_the_mirror_image():
    below, above = plant(0.2, 0.5, Bound("diversity", 0.9)), plant(-0.2, 0.5, Bound("matching", 1.1))
    assert [m for _, m in above] == pytest.approx([m for _, m in below])
    assert [x - 1 for x, _ in above] == pytest.approx([1 - x for x, _ in below])


def test_a_figure_that_the_reward_does_not_touch_lets_it_rise_to_the_most():
    seen = plant(0.0, 1.0, Bound("diversity", 0.9))
    assert seen[-1][1] == pytest.approx(MOST) and all(b >= a for (_, a), (_, b) in zip(seen, seen[1:], strict=False))


def test_the_integrator_does_not_wind_up():
    """After 200 probes at a limit the law is as far from the other side as after one."""
    high = Law()
    for _ in range(200):
        high = high.after(1.0)
    assert high.u == math.log(MOST)
    low = Law()
    for _ in range(200):
        low = low.after(-5.0)
    assert low.u == math.log(LEAST) and low.multiplier == 0
    assert low.after(1.0).multiplier == pytest.approx(LEAST * math.exp(RISE * (1 - MARGIN))), "the first probe inside the band raises it at once"


def test_outside_of_its_band_a_figure_switches_the_reward_off():
    assert Law(0.0, 0.0).multiplier == 1
    assert Law(0.0, -OUTSIDE / 2).multiplier == 0.5
    assert Law(0.0, -OUTSIDE).multiplier == 0


def test_the_smallest_slack_counts_and_matching_is_its_mean_between_probes():
    stage = RECIPE.stages[1]
    controller = Controller(parse("diversity=0.9,matching=1.2"))
    held, none = controller.probed(Held(), stage, {"diversity": 0.5})
    assert held.active and held.multiplier == pytest.approx(START) and none == {"hold/multiplier": held.multiplier}
    for norm in (1.0, 3.0):
        held = controller.trained(held, stage, {"force/dm/norm": norm})
    held, first = controller.probed(held, stage, {"diversity": 0.5})
    assert held.start == {"diversity": 0.5, "matching": 2.0} and first["hold/matching"] == first["hold/diversity"] == 1
    held = controller.trained(held, stage, {"force/dm/norm": 2.3})
    held, second = controller.probed(held, stage, {"diversity": 0.49})
    assert second["hold/matching"] == pytest.approx(1.15) and second["hold/diversity"] == pytest.approx(0.98)
    assert held.law.slack == pytest.approx(0.25), "matching has used three quarters of its room, diversity a fifth"
    plain, _ = controller.probed(held, replace(stage, name="next", terms=stage.terms[:1]), {"diversity": 0.6})
    assert plain.multiplier == 1 and plain.start == {"diversity": 0.6}, "a stage without reward terms starts anew and is left alone"
    assert Held.of_json(json.loads(json.dumps(asdict(held)))) == held


def test_health_tells_of_a_figure_outside_its_band():
    rows = [
        {"step": n, "stage": "climb", "hold/multiplier": 0.1, "hold/diversity": x, "hold/diversity/bound": 0.95} for n, x in enumerate([1.0, 0.94, 0.93, 0.92])
    ]
    assert not [f for f in examine(rows[:3]) if f.flag.startswith("held")], "two probes are no finding"
    (finding,) = [f for f in examine(rows) if f.flag.startswith("held")]
    assert finding.flag == "held:diversity" and "diversity left its band (0.92 of its start, 0.95 is held) for 3 probes" in finding.text
    above = [{**row, "hold/diversity": 2 - row["hold/diversity"], "hold/diversity/bound": 1.05} for row in rows]
    assert [f.flag for f in examine(above)] == ["held:diversity"]
    assert not examine([{**row, "hold/diversity/bound": 0.9} for row in rows]) and "held" in FLAGS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("diversity", "'diversity' is not figure=fraction"),
        ("diversity=high", "'diversity=high' is not figure=fraction"),
        ("diversity=1.2", "more of it is better"),
        ("matching=0.9", "less of it is better"),
        ("mean_brightness=1", "below 1"),
        ("motion=-0.5", "below 1"),
        ("motion=0.9,motion=0.8", "names a figure twice"),
    ],
)
def test_bounds_that_cannot_be(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_recipes_and_figures_that_cannot_be():
    bounds = parse("diversity=0.95")
    for recipe in (dmd2(), amd()):
        with pytest.raises(ValueError, match="has no reward term"):
            check(bounds, recipe, {"diversity"})
    with pytest.raises(ValueError, match="'variety' is not a figure of this run's probes; allowed: diversity, matching, motion"):
        check(parse("variety=0.9"), dmdr(), {"diversity", "motion"})
    check(parse("matching=1.1"), dmdr(), {"diversity"})
    with pytest.raises(ValueError, match="saturation is 0.0 at the start"):
        Controller(parse("saturation=2")).probed(Held(), RECIPE.stages[0], {"saturation": 0.0})


OPTIONS = RunOptions(save_every=1, probe_every=2, hold=parse("diversity=0.99,matching=1.5"), terms_every=2)


def held_run(out):
    return train(RECIPE, family(), out=out, prompts=PROMPTS, reward=Brightness(), monitor=Mild(), options=OPTIONS)


def test_a_held_run_resumes_to_the_same_weights(tmp_path):
    """The controller and the ratios of shares are in the checkpoint: killed twice, each time between two probes, it ends the same, log and weights."""
    held_run(tmp_path / "whole")
    for step in (3, 5):
        with interrupted_before(step):
            held_run(tmp_path / "stopped")
    held_run(tmp_path / "stopped")
    same(tmp_path / "whole", tmp_path / "stopped")
    seen = rows(tmp_path / "whole")
    assert {"hold/multiplier", "hold/diversity", "hold/diversity/bound", "hold/matching"} <= seen[4].keys()
    assert "hold/multiplier" not in seen[0] and seen[2]["hold/multiplier"] == pytest.approx(START), "the stage before has no reward"
    assert {"term/dm/gradient", "term/reward/gradient"} <= seen[4].keys()
    write_report([tmp_path / "whole"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Held figures" in page and "diversity, bound" in page and 'class="allowed"' in page and "Gradient of each term" in page
    with pytest.raises(ValueError, match="hold"):
        train(RECIPE, family(), out=tmp_path / "whole", prompts=PROMPTS, reward=Brightness(), monitor=Mild(), options=replace(OPTIONS, hold=()))


def test_what_is_refused_comes_before_the_run(tmp_path):
    with pytest.raises(
        ValueError, match="'modes' is not a figure.*allowed: diversity, matching, mean_brightness, monitor_both, motion, saturation, train_score"
    ):
        train(RECIPE, family(), out=tmp_path / "run", prompts=PROMPTS, reward=Brightness(), monitor=Mild(), options=RunOptions(hold=parse("modes=0.9")))
    assert not (tmp_path / "run" / "log.jsonl").exists() and not flags(tmp_path / "run")


def test_probes_come_oftener_where_figures_are_held():
    assert RunOptions().probe_interval == 20 and RunOptions(hold=parse("motion=0.9")).probe_interval == 5
    assert RunOptions(hold=parse("motion=0.9"), probe_every=7).probe_interval == 7
