"""Whether a reward is being hacked: it rises, or is chased in vain, while what it does not see gets worse."""

from __future__ import annotations

from collections.abc import Callable

from instep.diffusion.levels import AnnealedBeta
from instep.methods.matching import DistributionMatching
from instep.methods.term import Force
from instep.training.history import PERSIST, WINDOW, History, Row, mean, number

RISE = 0.3  # rise of the training reward in deviations within a group: twice the standard error of a probe of 48 samples
FALL = 0.1  # fall of the monitor's share of right samples: more than twice the standard error of 48 samples at 0.9
RUINED = 0.3  # fall of that share that counts even where the reward does not rise: a reward that is chased off the data need not be caught
# kinds of sample a prompt that leaves them open is given, relative to the stage's beginning. On the bundled model (10 prompts, 8 samples each) 5.0 are
# seen; four draws of one student had 4.9 to 5.1, chance alone allows a deviation of 0.3, and 40 healthy iterations (7 runs) changed it by -0.1 to +0.5
FEWER = 0.85
# diversity relative to the stage's beginning and to the teacher, both. Noise is fixed: 40 iterations with a reward beside matching leave 0.956 and 1.02
# or more (14 runs on the bundled model, 4 steps), 0.94 and 1.0 at 2 steps (3 runs, weight 0.1); a student may lose what it has more than the teacher.
# Reinforcement alone, after 30 to 40 iterations: 0.86 and 0.94 (4 steps), 0.78 to 0.90 and 0.83 to 0.96 (2 steps, 3 runs; the margin was set with these)
ALIKE, LEANER = 0.92, 1.0
# matching force over that of the stage's first ten iterations: 41 runs on the bundled model stay below 1.08
FARTHER = 1.25


def hacking(seen: History) -> str | None:
    """What got worse while the training reward rose, since the stage began: the monitor, the variety or the matching force; None if nothing did.

    Samples that are ruined in the monitor's eyes count without a rise. Only stages in which a reward trains are looked at.
    """
    if len(seen.since) <= PERSIST or not _rewarded(seen):
        return None
    rise, since = _rise(seen), f"since stage {seen.stage[-1].get('stage')} began"
    if not all((rise(row) or 0.0) > RISE for row in seen.since[-PERSIST:]):
        ruined = _fewer_right(seen, RUINED)
        return ruined and f"{since} {ruined} while a reward trains, which hardly rose"
    signs = [text for sign in (_fewer_right, _fewer_modes, _alike, _farther) if (text := sign(seen))]
    return f"{since} the training reward rose by {rise(seen.since[-1]):.1f} within-group deviations while {', and '.join(signs)}" if signs else None


def _rewarded(seen: History) -> bool:
    """Whether a reward trains in this stage: only then can it be hacked."""
    stage = seen.recipe_stage
    if stage is not None:
        return any(term.needs & {"reward", "gradient", "latent_reward"} for term in stage.terms) or "reward" in stage.needs
    return any("reward/train" in row or "force/reward/norm" in row for row in seen.stage)


def _rise(seen: History) -> Callable[[Row], float | None]:
    """Rise of the training reward since the stage began, in within-group standard deviations, since each reward has its own zero and unit.

    The deviation is that of the stage's first groups, since samples that are driven apart spread their rewards; if the stage scores none (it uses the
    reward's gradient), it is that of the probe's copies at the beginning of the stage.
    """
    spread = mean(seen.stage[:WINDOW], "reward/spread") or number(seen.since[0], "probe/train_spread")
    before = number(seen.since[0], "probe/train_score")

    def rise(row: Row) -> float | None:
        now = number(row, "probe/train_score")
        return None if now is None or before is None or not spread else (now - before) / spread

    return rise


def _since(seen: History, key: str) -> tuple[float | None, list[float]]:
    """A probe metric at the beginning of the stage, and in the last probes; the latter list is empty if one of them lacks it."""
    values = [number(row, f"probe/{key}") for row in seen.since[-PERSIST:]]
    known = [value for value in values if value is not None]
    return number(seen.since[0], f"probe/{key}"), known if len(known) == PERSIST else []


def _fewer_right(seen: History, fall: float = FALL) -> str | None:
    first, last = _since(seen, "monitor_both")
    if first is None or not last or max(last) >= first - fall:
        return None
    return f"the monitor's share of right samples fell from {first:.2f} to {last[-1]:.2f}"


def _fewer_modes(seen: History) -> str | None:
    first, last = _since(seen, "modes")
    if not first or not last or max(last) >= FEWER * first:
        return None
    return f"prompts that leave a choice open are given fewer kinds of sample ({first:.1f} before, {last[-1]:.1f} now)"


def _alike(seen: History) -> str | None:
    """Compares with the teacher as well: a student that had more variety than its teacher, as after distillation, may lose the surplus."""
    first, last = _since(seen, "diversity")
    teacher = number(seen.since[-1], "probe/diversity_teacher")
    if not first or not last or max(last) >= ALIKE * first or (teacher is not None and max(last) >= LEANER * teacher):
        return None
    beside = f", {last[-1] / teacher:.0%} of the teacher's" if teacher else ""
    return f"samples of one prompt become alike (diversity fell to {last[-1] / first:.0%}{beside})"


def _farther(seen: History) -> str | None:
    """By the force, not by the fake's loss, which doubles in any student that sharpens while it is distilled."""
    keys = {f"force/{force.name}/norm" for force in stage.forces if _steady(force)} if (stage := seen.recipe_stage) else {"force/dm/norm"}
    for key in sorted(keys) if len(seen.stage) >= 3 * WINDOW // 2 else ():
        early, late = mean(seen.stage[: WINDOW // 2], key), mean(seen.stage[-WINDOW:], key)
        if early and late and late > FARTHER * early:
            return f"the matching force is {late / early:.1f} times what it was: the student moves away from the teacher"
    return None


def _steady(force: Force) -> bool:
    """The matching forces whose norm measures the distance from the teacher: neither tilted by the reward nor annealed over the stage."""
    if not isinstance(force, DistributionMatching):
        return False
    return not force.operator.needs_advantage and force.adapter is None and not isinstance(force.levels, AnnealedBeta)
