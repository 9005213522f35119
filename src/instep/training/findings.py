"""The health checks: pure functions of a run's logged rows, one function for each kind of finding.

They may use the training reward and the *monitor* classifier; a held-out classifier is reserved for reported metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Literal

from instep.methods.matching import DistributionMatching
from instep.methods.operators import RewardTilted
from instep.training.hacking import hacking
from instep.training.history import PERSIST, WINDOW, History, Row, mean, number

Level = Literal["ok", "warn", "alarm"]
Findings = Iterator[tuple[Level, str, str]]

OPPOSED = -0.5  # cosine of two forces below which most of each is spent on undoing the other
SILENT = 0.01  # share of the strongest force below which another one does nothing
BRIGHTNESS_OFF = 0.25  # relative deviation of mean brightness from the teacher's that is visible as over- or under-saturation
CLIPPED = 0.05  # share of pixels more than 0.05 outside [0, 1] (real videos through the VAE: well below 0.01) ...
CLIPPED_MORE = 2.0  # ... and this many times the teacher's own: a family whose teacher overshoots is not the student's fault
HALVED = 0.6  # a metric below this share of its reference has visibly collapsed
FLICKER = 1 / HALVED  # frames that differ this many times more than the teacher's flicker, or are noise (DM-Align, Section 4.1)
CRITIC_UP = 2.0  # critic loss over its stage's early value; less is normal: a student that sharpens is harder to denoise than a blurred one
CONSTANT = 0.5  # share of groups without any spread in reward: healthy runs of the bundled model have below 0.03
EXPLODED = 20.0  # gradient norm over its running median: single batches of 53 runs on the bundled model stay below 7
EXPLODED_ROWS = 3  # of them in a row: one bad batch is clipped and forgotten
# spread of a prompt's rewards over their size: below it the factors exp(r / rms) of its samples differ by less than a tenth
FLAT = 0.1
OUT_OF_BAND = 3  # probes in a row with a held figure outside its band
MEDIAN_OF = 50  # rows of that running median
# relative change of every probe metric below which nothing was learned. Prompts and noise of a probe are fixed, so an untouched student repeats
# them: 1e-6 at a learning rate of 1e-9; of 53 runs on the bundled model the metric that had moved most had moved by 0.04 and more
STUCK = 0.01


def _forces(seen: History) -> Findings:
    recent = seen.stage[-WINDOW:]
    if len(recent) < WINDOW:
        return
    for key in sorted({k for row in recent for k in row if k.startswith("force/cosine/")}):
        cosine = mean(recent, key)
        if cosine is not None and cosine < OPPOSED:
            pair = key.removeprefix("force/cosine/").replace("~", " and ")
            text = f"the forces {pair} oppose each other (cosine {cosine:.2f}): lower the weight of one of them"
            yield "warn", f"opposed:{pair}", text
    norms = {k.split("/")[1]: mean(recent, k) or 0.0 for k in recent[-1] if k.startswith("force/") and k.endswith("/norm")}
    for name, norm in norms.items():
        share = norm / (max(norms.values()) or 1.0)
        # a held figure may switch the reward off
        if share < SILENT and max(norms.values()) > 0 and not any("hold/multiplier" in row for row in recent):
            yield "warn", f"silent:{name}", f"the force {name} is {share:.1e} of the strongest one: it does nothing; raise its weight or drop it"


def _finite(seen: History) -> Findings:
    recent = seen.rows[-WINDOW:]
    for key in sorted({k for row in recent for k in row if k.startswith("grad/") and k.endswith("/skipped")}):
        name, share = key.split("/")[1], mean(recent, key) or 0.0
        if share > 0:
            text = f"{share:.0%} of the last {len(recent)} steps of the {name} had a gradient that is not finite and were skipped"
            fix = "lower the learning rate, or look for a reward with an infinite gradient"
            yield "alarm", "nonfinite" if name == "student" else f"nonfinite:{name}", f"{text}: {fix}"
    # a single one counts: samples that are not numbers are never noise
    if any("probe/mean_brightness" in row and number(row, "probe/mean_brightness") is None for row in seen.rows[-1:]):
        yield "alarm", "broken", "the student's samples hold values that are not finite: go back to an earlier checkpoint, lower the learning rate"


def _critic(seen: History) -> Findings:
    stage = seen.stage
    for key in sorted(k for k in stage[-1] if k.startswith("critic/")):
        early, late = mean(stage[:WINDOW], key), mean(stage[-WINDOW:], key)
        if len(stage) >= 3 * WINDOW and early and late and late > CRITIC_UP * early:
            name = key.removeprefix("critic/")
            text = f"the loss of the critic {name} is {late / early:.1f} times its early value: it no longer follows the student"
            yield "warn", f"critic:{name}", f"{text}; raise its updates or lower the student's learning rate"


def _reward(seen: History) -> Findings:
    recent = seen.stage[-WINDOW:]
    constant = mean(recent, "reward/constant_groups")
    if constant is not None and len(recent) == WINDOW and constant > CONSTANT:
        stage = seen.recipe_stage
        groups = stage.accumulate * stage.batch // stage.group * WINDOW if stage else None
        share = f"{constant:.0%} of the groups" if groups is None else f"{round(constant * groups)} of {groups} groups"
        text = f"reward: {share} had equal rewards in the last {WINDOW} iterations and gave no advantage: the reward does not tell samples apart"
        yield "warn", "constant_reward", f"{text}; use prompts that leave more open, or another reward"


def _tilt(seen: History) -> Findings:
    """The printed form of reward-tilted matching weighs all samples nearly alike where the rewards' spread is small beside their size."""
    stage, recent = seen.recipe_stage, seen.stage[-WINDOW:]
    if stage is None or len(recent) < WINDOW or not any(isinstance(f, DistributionMatching) and _literal(f) for f in stage.forces):
        return
    spread, size = mean(recent, "reward/spread"), mean(recent, "reward/train")
    if spread is not None and size and spread / abs(size) < FLAT:
        text = f"rewards of a prompt differ by {spread / abs(size):.1%} of their size, so literal reward-tilted matching weighs all samples nearly alike"
        yield "warn", "tilt", f"{text}; use --tilt zscore or weight"


def _literal(force: DistributionMatching) -> bool:
    return isinstance(force.operator, RewardTilted) and force.operator.form == "literal"


def _held(seen: History) -> Findings:
    """A held figure outside its band, relative to the start of the stage, in the last probes."""
    last = [row for row in seen.stage if number(row, "hold/multiplier") is not None][-OUT_OF_BAND:]
    held = sorted({k for row in last for k in row if k.startswith("hold/") and k.endswith("/bound")})
    for key in held if len(last) == OUT_OF_BAND else ():
        figure = key.removeprefix("hold/").removesuffix("/bound")
        pairs = [(number(row, f"hold/{figure}"), number(row, key)) for row in last]
        if all(value is not None and bound is not None and (value - bound) * (1 - bound) < 0 for value, bound in pairs):
            (value, bound), multiplier = pairs[-1], number(last[-1], "hold/multiplier")
            text = f"{figure} left its band ({value:.2f} of its start, {bound:g} is held) for {OUT_OF_BAND} probes, with the reward's weight multiplied by"
            why = "something else moves it, or it does not recover; raise the weight of matching"
            yield "warn", f"held:{figure}", f"{text} {multiplier:.2g}: {why}"


def _exploded(seen: History) -> Findings:
    """Finite gradients far above the norm of the stage so far. (Steps with gradients that are not finite are skipped, and `_finite` reports them.)"""
    for key in sorted(k for k in seen.stage[-1] if k.startswith("grad/") and not k.endswith("/skipped")):
        known = [(number(row, key) or 0.0, number(row, f"{key}/skipped") or 0.0) for row in seen.stage[-MEDIAN_OF - EXPLODED_ROWS :]]
        last, before = known[-EXPLODED_ROWS:], [norm for norm, skipped in known[:-EXPLODED_ROWS] if not skipped]
        usual = median(before) if len(before) >= WINDOW else 0.0
        if usual > 0 and all(norm > EXPLODED * usual and not skipped for norm, skipped in last):
            name, times = key.removeprefix("grad/"), last[-1][0] / usual
            text = f"the gradient of the {name} has exploded: its norm is {times:.0f} times the median of the steps before"
            yield "alarm", f"exploded:{name}", f"{text}; go back to an earlier checkpoint, lower the learning rate"


def _stuck(seen: History) -> Findings:
    """After a third of the student's training the samples are those of step 0, in every metric of the probe.

    Forces cannot show this: a matching force is as large in a run that continues from a good student, and learns, as in one that stands still.
    """
    if not seen.recipe or len(seen.probes) < 2 or seen.probes[0]["step"] > 0 or len(seen.rows) <= WINDOW:
        return
    first, now = seen.probes[0], seen.probes[-1]
    # stages in which only a critic learns leave the student as it is
    ends = zip(seen.recipe.stages, seen.recipe.stage_ends(), strict=True)
    idle = [stage.steps for stage, end in ends if not stage.terms and end <= now["step"]]
    done, total = now["step"] - sum(idle), sum(stage.steps for stage in seen.recipe.stages if stage.terms)
    # the share of right samples and the number of modes change in jumps: one sample of 48 is more than STUCK
    keys = [key for key in first if key.startswith("probe/") and not key.endswith("_teacher") and key not in ("probe/monitor_both", "probe/modes")]
    pairs = [(number(first, key), number(now, key), number(now, f"{key}_teacher")) for key in keys]
    moved = [abs(b - a) / (max(abs(a), abs(teacher or 0.0)) or 1.0) for a, b, teacher in pairs if a is not None and b is not None]
    if done > 0 and 3 * done >= total and len(moved) == len(pairs) > 0 and max(moved) < STUCK:
        text = f"nothing learned: at step {now['step']} of {seen.recipe.steps} every metric of the probe is within {STUCK:.0%} of where it began"
        yield "warn", "stuck", f"{text}; raise the student's learning rate, shorten its warm-up, or look whether a force reaches it"


def _excess(row: Row, key: str, direction: float) -> float | None:
    """How far a probe metric lies beyond the teacher's, relative to it: above for direction 1, below for -1."""
    value, teacher = number(row, f"probe/{key}"), number(row, f"probe/{key}_teacher")
    return None if value is None or not teacher else direction * (value / teacher - 1)


def _off(seen: History, key: str, direction: float, limit: float) -> bool:
    """Whether the metric exceeds the teacher's by more than `limit` in the last probes and is not on its way back.

    A student begins as its teacher run in too few steps, so a large distance is normal as long as every probe is nearer than the one before.
    The untrained student itself (step 0) never counts.
    """
    excess = [_excess(row, key, direction) for row in seen.probes]
    last = [e for row, e in zip(seen.probes, excess, strict=True) if row["step"] > 0][-PERSIST:]
    if len(last) < PERSIST or any(e is None or e <= limit for e in last):
        return False
    known = [e for e in excess if e is not None]
    return any(late >= early for early, late in zip(known, known[1:], strict=False))


def _images(seen: History) -> Findings:
    if not seen.probes:
        return
    now = seen.probes[-1]

    def times(key: str) -> float:
        return now[f"probe/{key}"] / now[f"probe/{key}_teacher"]

    if _off(seen, "mean_brightness", 1, BRIGHTNESS_OFF):
        above = times("mean_brightness") - 1
        yield "warn", "oversaturation", f"samples are {above:.0%} brighter than the teacher's: lower the guidance or the weight of the reward"
    if _off(seen, "mean_brightness", -1, BRIGHTNESS_OFF):
        below = 1 - times("mean_brightness")
        yield "warn", "fading", f"samples are {below:.0%} darker than the teacher's: the student fades; check the learning rates and the reward"
    clipped = [row for row in seen.probes if row["step"] > 0][-PERSIST:]
    if len(clipped) == PERSIST and all(
        (number(row, "probe/saturation") or 0.0) > max(CLIPPED, CLIPPED_MORE * (number(row, "probe/saturation_teacher") or 0.0)) for row in clipped
    ):
        yield "warn", "clipping", f"{now['probe/saturation']:.0%} of the pixels lie outside what an image can show: over-saturation; lower the guidance"
    if _off(seen, "motion", 1, FLICKER - 1):
        text = f"frames differ {times('motion'):.1f} times as much as the teacher's: flicker or noise, which some rewards take for motion"
        yield "warn", "flicker", f"{text}; lower the weight of the reward"
    for key, flag, words in (("motion", "still", "motion has died down"), ("diversity", "collapse", "samples of one prompt have become alike")):
        if _off(seen, key, -1, 1 - HALVED):
            yield "alarm", flag, f"{words}: {key} is {times(key):.0%} of the teacher's; lower the weight of the reward, or stop earlier"


def _hacking(seen: History) -> Findings:
    if signs := hacking(seen):
        yield "alarm", "hacking", f"{signs}: the reward is being hacked; lower its weight, add matching or raise its weight, or stop earlier"


CHECKS = (_forces, _finite, _exploded, _critic, _reward, _tilt, _stuck, _images, _held, _hacking)

# the flags that the checks above raise, without the name after the colon (opposed:dm and group)
FLAGS = (
    "opposed",
    "silent",
    "nonfinite",
    "broken",
    "exploded",
    "critic",
    "constant_reward",
    "stuck",
    "oversaturation",
    "fading",
    "clipping",
    "flicker",
    "still",
    "collapse",
    "held",
    "tilt",
    "hacking",
)
