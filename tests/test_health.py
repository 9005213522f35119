"""Health checks on made-up histories: each flag where it belongs, silence where it does not."""

from __future__ import annotations

import json
import math

import pytest

from instep.recipes.common import Common
from instep.recipes.dm_align import dm_align_group
from instep.training import health
from instep.training.health import HealthMonitor, examine
from instep.training.log import RunLog

TEACHER = {"mean_brightness_teacher": 0.2, "motion_teacher": 0.05, "diversity_teacher": 0.1, "saturation_teacher": 0.01}
HEALTHY = {"mean_brightness": 0.2, "motion": 0.05, "diversity": 0.1, "saturation": 0.01, "train_score": -0.5, "monitor_both": 0.9, "monitor_score": -0.5}
PROBE_EVERY = 10


def probe(**metrics: float) -> dict[str, float]:
    return {f"probe/{key}": value for key, value in {**TEACHER, **HEALTHY, **metrics}.items()}


def history(distil: int = 60, align: int = 60, *, change=None, probes=None) -> list[dict]:
    """A healthy run of two stages. `change(step)` adds to an iteration's row, `probes(step)` to a probe's metrics."""
    rows = [{"step": 0, "stage": "start", **probe(**((probes or (lambda step: {}))(0)))}]
    for step in range(1, distil + align + 1):
        # losses and norms wobble, as they do
        noise = 0.2 * math.sin(7.0 * step)
        row = {"step": step, "stage": "distil" if step <= distil else "align", "force/dm/norm": 1 + noise, "critic/fake": 0.4 + 0.1 * noise}
        row |= {"grad/student": 1.0, "grad/student/skipped": 0.0, "grad/fake/skipped": 0.0}
        if step > distil:
            row |= {"force/group/norm": 0.5 - noise, "force/cosine/dm~group": noise, "reward/train": -0.5 + noise}
            row |= {"reward/spread": 0.4, "reward/constant_groups": 0.1}
        row |= change(step) if change else {}
        if step % PROBE_EVERY == 0:
            row |= probe(**(probes(step) if probes else {}))
        rows.append(row)
    return rows


def flags(rows: list[dict]) -> set[str]:
    return {finding.flag for finding in examine(rows)}


def all_flags(rows: list[dict]) -> set[str]:
    """Every flag that is up after any row."""
    return set().union(*(flags(rows[: i + 1]) for i in range(len(rows))))


def late(**metrics):
    """Metrics from step 90 on: two probes and more before the end."""
    return lambda step: metrics if step >= 90 else {}


def test_a_healthy_history_is_silent():
    assert all_flags(history()) == set()
    assert examine([]) == []


def test_a_student_on_its_way_in_is_silent():
    """Naive few-step samples are faint, still and alike; each probe lies nearer to the teacher than the one before."""
    closing = lambda step: {"mean_brightness": 0.2 - 0.12 * 0.98**step, "motion": 0.05 - 0.04 * 0.98**step, "diversity": 0.1 - 0.08 * 0.98**step}  # noqa: E731
    assert all_flags(history(probes=closing)) == set()
    # one that stays where it began is not on its way
    assert {"fading", "still", "collapse"} <= flags(history(probes=lambda step: {"mean_brightness": 0.08, "motion": 0.01, "diversity": 0.02}))


ITERATIONS = [
    ("opposed:dm and group", {"force/cosine/dm~group": -0.7}),
    ("silent:group", {"force/group/norm": 1e-3}),
    ("critic:fake", {"critic/fake": 0.9}),
    ("constant_reward", {"reward/constant_groups": 0.9}),
    ("nonfinite", {"grad/student/skipped": 1.0}),
    ("nonfinite:fake", {"grad/fake/skipped": 1.0}),
]


@pytest.mark.parametrize(("flag", "values"), ITERATIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_flags_of_iterations(flag, values):
    """Raised when twenty iterations say so."""
    assert flags(history(change=lambda step: values if step > 90 else {})) == {flag}


@pytest.mark.parametrize(("flag", "values"), ITERATIONS[:4], ids=lambda v: v if isinstance(v, str) else "")
def test_one_iteration_says_nothing(flag, values):
    """Nor does the first one of a stage, of whose kind there are no others yet."""
    assert all_flags(history(change=lambda step: values if step in (61, 100) else {})) == set()


def test_a_force_that_is_off_altogether():
    rows = history(change=lambda step: {"force/group/norm": 0.0} if step > 60 else {})
    assert flags(rows) == {"silent:group"}
    both = history(change=lambda step: {"force/group/norm": 0.0, "force/dm/norm": 0.0} if step > 60 else {})
    assert flags(both) == set(), "nothing to compare with"


IMAGES = [
    ("oversaturation", {"mean_brightness": 0.27}),
    ("fading", {"mean_brightness": 0.14}),
    ("clipping", {"saturation": 0.08}),
    ("still", {"motion": 0.02}),
    ("flicker", {"motion": 0.1}),
    ("collapse", {"diversity": 0.05}),
]


@pytest.mark.parametrize(("flag", "metrics"), IMAGES, ids=[flag for flag, _ in IMAGES])
def test_flags_of_probes(flag, metrics):
    assert flags(history(probes=late(**metrics))) == {flag}
    assert all_flags(history(probes=lambda step: metrics if step == 90 else {})) == set(), "one noisy probe raises nothing"
    assert all_flags(history(probes=lambda step: metrics if step <= 10 else {})) == set(), "nor do one and the untrained student"


def test_clipping_is_measured_against_the_teacher():
    assert flags(history(probes=late(saturation=0.08, saturation_teacher=0.06))) == set()


def test_images_have_no_motion_to_lose():
    assert all_flags(history(probes=lambda step: {"motion": 0.0, "motion_teacher": 0.0})) == set()


def test_hacking_against_the_monitor():
    """The reward rises by a deviation while the share of right samples falls; a log-probability is negative, and its rise is a rise."""
    hacked = history(probes=late(train_score=-0.1, monitor_both=0.7))
    (found,) = examine(hacked)
    assert (found.flag, found.level) == ("hacking", "alarm") and "from 0.90 to 0.70" in found.text and "rose by 1.0 within-group deviations" in found.text
    assert flags(history(probes=late(train_score=-0.9, monitor_both=0.7))) == set(), "the reward fell: poor, but not hacked"
    assert flags(history(probes=late(train_score=-0.1, monitor_both=0.85))) == set(), "within the noise of 48 samples"
    assert flags(history(probes=late(train_score=-0.45, monitor_both=0.7))) == set(), "the reward's rise is within the noise"
    assert all_flags(history(probes=lambda step: {"train_score": -0.1, "monitor_both": 0.7} if step == 90 else {})) == set()


def hack(**metrics):
    """The reward rises by a deviation from step 90 on, and something else changes."""
    return late(train_score=-0.1, **metrics)


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"monitor_both": 0.7}, "the monitor's share of right samples fell from 0.90 to 0.70"),
        ({"diversity": 0.08}, "samples of one prompt become alike (diversity fell to 80%, 80% of the teacher's)"),
        ({"modes": 4.0}, "fewer kinds of sample (5.0 before, 4.0 now)"),
    ],
    ids=["monitor", "diversity", "modes"],
)
def test_each_sign_of_hacking(metrics, said):
    """One sign is enough beside a rising reward, is named with its metrics, and is nothing without the rise."""
    start = {"modes": 5.0}
    (found,) = examine(history(probes=lambda step: {**start, **hack(**metrics)(step)}))
    assert found.flag == "hacking" and said in found.text and "lower its weight, add matching" in found.text
    assert all_flags(history(probes=lambda step: {**start, **late(**metrics)(step)})) == set(), "the reward is flat"
    assert all_flags(history(probes=lambda step: {**start, **({"train_score": -0.1, **metrics} if step == 90 else {})})) == set(), "one probe"


@pytest.mark.parametrize("metrics", [{"monitor_both": 0.98}, {"monitor_both": 0.86}, {"diversity": 0.094}, {"modes": 4.4}, {"modes": 6.0}])
def test_what_is_no_hacking(metrics):
    """A reward that rises with the monitor; two of 48 samples, a few per cent of diversity or half a mode less."""
    assert all_flags(history(probes=lambda step: {"modes": 5.0, **hack(**metrics)(step)})) == set()


def test_ruined_samples_need_no_rise():
    """A reward that is chased off the data need not be caught; a fall of a third is no noise. One probe of it is, and so is a stage without a reward."""
    ruined = {"train_score": -0.52, "monitor_both": 0.45}
    (found,) = examine(history(probes=late(**ruined)))
    assert (found.flag, found.level) == ("hacking", "alarm") and "fell from 0.90 to 0.45 while a reward trains, which hardly rose" in found.text
    assert all_flags(history(probes=lambda step: ruined if step == 90 else {})) == set()
    assert "hacking" not in all_flags(history(distil=120, align=0, probes=late(**ruined)))


def test_a_rise_is_measured_by_the_spread_of_the_stages_beginning():
    """Samples that are driven apart spread their rewards, and the rise is no smaller for that."""
    apart = lambda step: {"reward/spread": 0.4 if step <= 80 else 4.0} if step > 60 else {}  # noqa: E731
    (found,) = examine(history(change=apart, probes=late(train_score=-0.1, monitor_both=0.7)))
    assert found.flag == "hacking" and "rose by 1.0 within-group deviations" in found.text


def test_a_student_may_lose_what_variety_it_has_more_than_the_teacher():
    rich = lambda step: {"diversity": 0.12} if step < 90 else {"train_score": -0.1, "diversity": 0.1}  # noqa: E731
    assert all_flags(history(probes=rich)) == set()


def test_hacking_against_the_matching_force():
    """The student moves away from the teacher while the reward rises. Forces that the reward tilts or a schedule anneals do not count."""
    from instep.recipes.after import rl_after
    from instep.recipes.dmdr import dmdr
    from instep.recipes.refl import refl

    away = lambda step: {"force/dm/norm": 1.4 if step > 90 else 1.0}  # noqa: E731
    rows = history(change=away, probes=hack())
    (found,) = examine(rows)
    assert found.flag == "hacking" and "the matching force is 1.4 times what it was" in found.text
    assert all_flags(history(change=away)) == set(), "the reward is flat"
    slightly = lambda step: {"force/dm/norm": 1.1 if step > 90 else 1.0}  # noqa: E731
    assert all_flags(history(change=slightly, probes=hack())) == set()

    def said(recipe, stage, rows):
        return {f.flag for f in examine([{**row, "stage": stage} if row["stage"] == "align" else row for row in rows], recipe)}

    assert said(refl(distil=60, iterations=60), "climb", rows) == {"hacking"}
    assert said(dmdr(warm=60, iterations=60), "tilt", rows) == set(), "tilted"
    fewer = lambda step: {"train_spread": 0.4, "modes": 5.0 - (step >= 90), **hack()(step)}  # noqa: E731
    gradient = history(change=lambda step: {"reward/spread": None}, probes=fewer)
    assert said(rl_after(distil=60, iterations=60), "reinforce", gradient) == {"hacking"}, "a reward's gradient scores no groups: the probe's spread"
    assert said(rl_after(distil=60, iterations=60), "distil", gradient) == set(), "nothing trains on the reward there"


def test_flags_that_can_be_asked_for_are_those_that_are_said():
    import inspect
    import re

    from instep.training import findings

    source = inspect.getsource(findings).partition("CHECKS = ")[0]
    said = set(re.findall(r'yield "(?:warn|alarm)", f?"(\w+)', source)) | {"nonfinite", "still", "collapse"}
    assert said == set(findings.FLAGS)


def test_hacking_does_not_depend_on_where_a_reward_has_its_zero():
    for shift in (-10.0, 0.5, 10.0):
        assert flags(history(probes=lambda s, d=shift: {"train_score": d - 0.5, **(late(train_score=d - 0.1, monitor_both=0.7)(s))})) == {"hacking"}
        # a score that hardly moves near its zero is not a rise of some hundred per cent
        assert flags(history(probes=lambda s, d=shift: {"train_score": 0.001, **(late(train_score=0.01, monitor_both=0.7)(s))})) == set()


def test_hacking_by_variety():
    found = flags(history(probes=late(train_score=-0.1, diversity=0.05)))
    assert found == {"collapse", "hacking"}


def test_distillation_alone_cannot_hack():
    """Without a reward in the stage its score may rise as it likes."""
    rows = history(distil=120, align=0, probes=late(train_score=-0.1, monitor_both=0.7))
    assert "hacking" not in all_flags(rows)


def test_a_stage_is_measured_from_its_own_beginning():
    """What distillation gave the reward is not the reward's doing: the last probe before the stage is the reference."""
    distilled = lambda step: {"train_score": -3.0, "monitor_both": 0.95} if step < 60 else {"train_score": -0.5, "monitor_both": 0.8}  # noqa: E731
    assert "hacking" not in all_flags(history(probes=distilled))
    at_once = lambda step: {"train_score": -0.1, "monitor_both": 0.7} if step > 60 else {}  # noqa: E731
    assert "hacking" in flags(history(probes=at_once)), "hacked before the stage's first probe"


def test_values_that_are_not_finite():
    """A live row holds nan where the log holds null: both are read as missing, and samples of nan are an alarm."""
    for bad in (math.nan, None):
        rows = history(change=lambda step, b=bad: {"force/cosine/dm~group": b if step % 2 else -0.7} if step > 90 else {})
        assert flags(rows) == {"opposed:dm and group"}
        broken = history(probes=lambda step, b=bad: dict.fromkeys(HEALTHY, b) if step == 120 else {})
        assert flags(broken) == {"broken"}


def test_findings_say_what_and_what_to_do():
    rows = history(change=lambda step: {"force/cosine/dm~group": -0.7} if step > 90 else {}, probes=late(mean_brightness=0.27))
    texts = {finding.flag: finding.text for finding in examine(rows)}
    assert texts["oversaturation"].startswith("samples are 35% brighter than the teacher's: lower")
    assert "cosine -0.70" in texts["opposed:dm and group"]


RUN = dm_align_group(Common(batch=16), distil=60, iterations=60, group=4)


def test_an_exploding_gradient():
    """Finite, far above its median, three steps in a row."""
    exploding = lambda first, last, **more: history(change=lambda step: {"grad/student": 25.0, **more} if first <= step <= last else {})  # noqa: E731
    (found,) = [f for f in examine(exploding(118, 120)) if f.level == "alarm"]
    assert found.flag == "exploded:student" and "its norm is 25 times the median" in found.text
    assert "exploded:student" in all_flags(exploding(100, 102)) and all_flags(exploding(100, 101)) == set(), "two in a row are not three"
    assert all_flags(history(change=lambda step: {"grad/student": 19.0} if step > 90 else {})) == set(), "19 times is not 20"
    assert all_flags(history(change=lambda step: {"grad/student": 25.0} if step > 60 else {})) == set(), "a stage has norms of its own"
    assert all_flags(exploding(62, 79)) == set(), "nor before there is a median to speak of"
    assert all_flags(history(change=lambda step: {"grad/student": 0.0} if step < 100 else {})) == set(), "nor above a gradient of zero"
    assert flags(exploding(118, 120, **{"grad/student/skipped": 1.0})) == {"nonfinite"}, "what was skipped is said elsewhere"
    # its own height becomes the median in time: a level that stays is a level
    assert flags(history(align=120, change=lambda step: {"grad/student": 25.0} if step > 100 else {})) == set()


def moving(by: float):
    """Every metric of the probe drifts by a share of itself over the run, from a start that is off the teacher's."""
    return lambda step: {key: 0.8 * value * (1 + by * step / 120) for key, value in HEALTHY.items()}


def test_nothing_learned():
    """An untouched student repeats its metrics; said from a third of the run on, and only where the run's length is known."""
    still = history(probes=moving(1e-5))
    said = [[f.flag for f in examine(still[: i + 1], RUN)] for i in range(len(still))]
    assert [step for step, now in enumerate(said) if "stuck" in now] == list(range(40, 121)) and "stuck" not in all_flags(still)
    (found,) = examine(still, RUN)
    assert found.level == "warn" and "nothing learned: at step 120 of 120" in found.text
    for run in (history(probes=moving(0.1)), history(probes=lambda step: {"train_score": -0.5 - step / 100})):
        assert not any(examine(run[: i + 1], RUN) for i in range(len(run))), "a tenth in all, or one metric alone, is enough"
    flips = history(probes=lambda step: {"monitor_both": 0.9 + step / 10000})
    assert {f.flag for f in examine(flips, RUN)} == {"stuck"}, "one sample more or less is no movement"
    missing = history(probes=lambda step: {"mean_brightness": math.nan} if step else {})
    assert not {f.flag for f in examine(missing, RUN)} & {"stuck"}, "what cannot be compared is not said to be equal"


def test_groups_without_an_advantage_are_counted():
    rows = history(change=lambda step: {"reward/constant_groups": 0.75} if step > 60 else {}, probes=moving(0.1))
    (found,) = examine(rows, RUN)  # 16 samples in groups of 4, 20 iterations
    assert found.text.startswith("reward: 60 of 80 groups had equal rewards in the last 20 iterations and gave no advantage: the reward does not tell")
    assert examine(rows)[0].text.startswith("reward: 75% of the groups had equal rewards")
    assert all_flags(history(change=lambda step: {"reward/constant_groups": 0.45} if step > 60 else {})) == set()


def test_a_run_tells_its_monitor_how_long_it_is(tmp_path):
    """Resumed before and after the finding: said once, and not forgotten."""
    still = history(probes=moving(0.0))
    for resume in (0, 30, 70):
        log = RunLog(tmp_path, resume_step=resume)
        monitor = HealthMonitor(tmp_path, resume_step=resume, recipe=RUN)
        for row in still[resume + 1 if resume else 0 : {0: 35, 30: 80, 70: 121}[resume]]:
            scalars = {k: v for k, v in row.items() if k != "step"}
            log.row(row["step"], scalars)
            monitor.row(row["step"], scalars)
        log.close()
    kept = [json.loads(line) for line in (tmp_path / "health.jsonl").read_text().splitlines()]
    assert [(row["step"], row["flag"]) for row in kept] == [(40, "stuck")]


def bad_then_good() -> list[dict]:
    """Opposed forces and bright samples from 90 on, healthy again before and at the probe of step 130."""
    change = lambda step: {"force/cosine/dm~group": -0.7} if 70 < step < 123 else {}  # noqa: E731
    return history(align=140, change=change, probes=lambda step: {"mean_brightness": 0.27} if 90 <= step < 130 else {})


def feed(folder, rows, *, resume_step: int = 0) -> list:
    log, monitor, said = RunLog(folder, resume_step=resume_step), HealthMonitor(folder, resume_step=resume_step), []
    for row in rows:
        scalars = {k: v for k, v in row.items() if k != "step"}
        log.row(row["step"], scalars)
        said += monitor.row(row["step"], scalars)
    log.close()
    return said


@pytest.fixture(autouse=True)
def no_board(monkeypatch):
    monkeypatch.setattr("instep.training.log._tensorboard", lambda folder, step: None)


def test_a_finding_is_said_once_and_so_is_its_clearing(tmp_path):
    said = [(f.level, f.flag) for f in feed(tmp_path, bad_then_good())]
    assert sorted(said) == [("ok", "opposed:dm and group"), ("ok", "oversaturation"), ("warn", "opposed:dm and group"), ("warn", "oversaturation")]
    kept = [json.loads(line) for line in (tmp_path / "health.jsonl").read_text().splitlines()]
    assert [(row["level"], row["flag"]) for row in kept] == said and set(kept[0]) == {"step", "level", "flag", "text"}
    assert [row["step"] for row in kept if row["flag"] == "oversaturation"] == [100, 130], "raised by the second probe that agrees"


@pytest.mark.parametrize("saved", [25, 100, 105, 130])
def test_a_resumed_monitor_is_an_uninterrupted_one(tmp_path, saved):
    """Killed a few steps after the checkpoint at `saved`, with a half-written line; the same health.jsonl in the end."""
    rows = bad_then_good()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    feed(whole, rows)
    feed(killed, rows[: saved + 8])
    for name in ("log.jsonl", "health.jsonl"):
        with open(killed / name, "a") as file:
            file.write('{"step": 99')
    feed(killed, rows[saved + 1 :], resume_step=saved)
    assert (killed / "health.jsonl").read_bytes() == (whole / "health.jsonl").read_bytes()
    assert (killed / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    rows = bad_then_good()
    feed(tmp_path, [{**rows[0], "probe/mean_brightness": math.nan}, *rows[1:115]])
    assert (tmp_path / "health.jsonl").stat().st_size > 0
    feed(tmp_path, rows[:20])
    assert (tmp_path / "health.jsonl").read_text() == "" and len((tmp_path / "log.jsonl").read_text().splitlines()) == 20


def test_probes_write_the_names_that_checks_read():
    from instep.training import probe as module

    source = module.__loader__.get_source(module.__name__)
    for key in ("mean_brightness", "saturation", "motion", "diversity", "train_score"):
        assert f'"{key}"' in source


def test_a_long_run_is_read_in_part_and_says_the_same(tmp_path, monkeypatch):
    def off(step):
        return {"critic/fake": 2.0} if 500 <= step < 700 else {"grad/student/skipped": 1.0} if 900 <= step < 905 else {}

    rows = history(400, 1000, change=off, probes=lambda step: {"motion": 0.01} if 800 <= step < 1000 else {})

    def said(folder):
        folder.mkdir()
        monitor = HealthMonitor(folder)
        findings = [f for row in rows for f in monitor.row(row["step"], {k: v for k, v in row.items() if k != "step"})]
        return findings, len(monitor._rows)

    thinned, kept = said(tmp_path / "thinned")
    monkeypatch.setattr(health, "thin", list)
    whole, length = said(tmp_path / "whole")
    assert kept < length / 2 and length == len(rows)
    assert thinned == whole
    assert {finding.flag for finding in whole} == {"critic:fake", "nonfinite", "still"}


def test_flags_of_a_run_that_was_never_measured(tmp_path):
    from instep.training.health import Raised
    from instep.training.health import flags as raised

    assert raised(tmp_path) == []
    feed(tmp_path, bad_then_good())
    got = [(r.flag, r.level, r.step, r.cleared) for r in raised(tmp_path)]
    assert sorted(got) == [("opposed:dm and group", "warn", 84, 130), ("oversaturation", "warn", 100, 130)], got
    assert isinstance(raised(tmp_path)[0], Raised)
