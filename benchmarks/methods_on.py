"""The methods side by side on a bundled world whose teacher leaves room: a common start, then each method for as many iterations.

    python benchmarks/methods_on.py moving-words --batch 32 --seeds 0 1 2   # hours of CPU time; resumes
    python benchmarks/methods_on.py moving-words --batch 32 --steps 1 --arms control dm-align-group dmdr-refl dm-align-pair
    python benchmarks/methods_on.py moving-digits --seeds 0 1 2             # the teacher unguided
    make results                                                            # docs/results.md from what was measured

The start is DMD2 for `--base` iterations; each arm goes on from it for `--more`. Seeds are paired: the arms of a seed share the start, and all rows share
prompts and noise. A cell is kept as benchmarks/results/methods/WORLD-STEPS-ARM-SEED.json, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from measured import store

from instep.bundled import find, load, settings_of
from instep.bundled.world import EvalSize
from instep.cli.evaluate import evaluation_of, measured_worlds
from instep.diffusion.levels import Uniform
from instep.methods.recipe import Recipe
from instep.recipes.after import rl_after
from instep.recipes.amd import amd
from instep.recipes.common import Common
from instep.recipes.defaults import with_settings
from instep.recipes.dm_align import dm_align_group, dm_align_pair
from instep.recipes.dmd import dmd2
from instep.recipes.dmdr import dmdr
from instep.recipes.dollar import dollar
from instep.recipes.many_step import ManySteps, dance_grpo
from instep.training.hold import HOLD_EVERY, parse
from instep.training.options import RunOptions
from instep.training.run import train

RESULTS = Path(__file__).parent / "results" / "methods"
GUIDANCE = {"moving-digits": 1.0}  # where the guided teacher leaves no room; elsewhere the world's own


@dataclass(frozen=True)
class Plan:
    """What all cells share: world, student's steps, teacher's guidance, iterations of the start and of what follows, batch, updates of the fake, evaluation."""

    world: str
    steps: int = 4
    guidance: float = 3.0
    base: int = 120
    more: int = 60
    batch: int = 32
    critic_updates: int = 5
    protocol: EvalSize = "full"

    @property
    def common(self) -> Common:
        return Common(steps=self.steps, guidance=self.guidance, batch=self.batch, critic_updates=self.critic_updates)


@dataclass(frozen=True)
class Arm:
    """A student: its recipe, the cell whose roles it goes on from, its reward (the world's own, or the black box), and the cell whose model is its teacher.

    stochastic: it needs a rollout with noise between steps, which one step has not. reading_of: the arm with the method's defaults; `what` then names the
    options that differ. options: those of the run beside the common ones.
    """

    what: str
    recipe: Callable[[Plan], Recipe]
    start: str | None = "start"
    reward: Literal["own", "exact"] = "own"
    teacher: str | None = None
    stochastic: bool = False
    reading_of: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def _group(weight: float = 0.3, **options: Any) -> Callable[[Plan], Recipe]:
    """DM-Align (Group) with this weight, and the rest for matching."""
    return lambda plan: dm_align_group(plan.common, distil=0, iterations=plan.more, weight=weight, matching=1 - weight, **options)


def _pair(**options: Any) -> Callable[[Plan], Recipe]:
    return lambda plan: dm_align_pair(plan.common, distil=0, iterations=plan.more, **options)


GROUP, PAIR = "dm-align-group", "dm-align-pair"
HOLD = "modes=.95,diversity=.95"
LETTER: dict[str, Any] = {"reach": "last", "toward": "mean", "normaliser": "own", "sign": "signed", "spread": "group", "group": 8, "top_n": 2}


ARMS = {
    "start": Arm("start: DMD2", lambda p: dmd2(p.common, iterations=p.base), None),
    "control": Arm("control: DMD2 goes on", lambda p: dmd2(p.common, iterations=p.more)),
    GROUP: Arm("DM-Align (Group)", _group()),
    PAIR: Arm("DM-Align (Pair)", _pair()),
    "amd": Arm("AMD", lambda p: amd(p.common, iterations=p.more)),
    "dmdr-refl": Arm("DMDR with ReFL", lambda p: dmdr(p.common, warm=0, iterations=p.more, rl="refl")),
    "dmdr-grpo": Arm("DMDR with GRPO, black box", lambda p: dmdr(p.common, warm=0, iterations=p.more, rl="grpo"), reward="exact", stochastic=True),
    "dollar": Arm("DOLLAR (VSD + CD + LRM), black box", lambda p: dollar(p.common, fit=p.more // 2, iterations=p.more), reward="exact"),
    "dollar-without-cd": Arm("DOLLAR without CD", lambda p: dollar(p.common, fit=p.more // 2, iterations=p.more, cd=0), reward="exact"),
    "dollar-without-reward": Arm("DOLLAR without LRM", lambda p: dollar(p.common, fit=0, iterations=p.more, weight=0)),
    "rl-after": Arm("ReFL alone after distillation", lambda p: rl_after(p.common, distil=0, iterations=p.more, rl="refl")),
    "tuned-teacher": Arm(
        "DanceGRPO on the teacher, black box",
        lambda p: dance_grpo(ManySteps(guidance=p.guidance, batch=p.batch), iterations=p.more),
        None,
        reward="exact",
    ),
    "two-stage": Arm("two stages: DanceGRPO on the teacher, then DMD2", lambda p: dmd2(p.common, iterations=p.base), None, teacher="tuned-teacher"),
    "dm-align-group-low": Arm("`--weight .15 --matching .85`", _group(0.15), reading_of=GROUP),
    "dm-align-group-half": Arm("`--weight .5 --matching .5`", _group(0.5), reading_of=GROUP),
    "dm-align-group-high": Arm("`--weight .7 --matching .3`", _group(0.7), reading_of=GROUP),
    "dm-align-group-eight": Arm("`--group 8`", _group(group=8), reading_of=GROUP),
    "dm-align-group-eight-half": Arm("`--group 8 --weight .5 --matching .5`", _group(0.5, group=8), reading_of=GROUP),
    "dm-align-group-mean": Arm("`--toward mean` (the paper)", _group(toward="mean"), reading_of=GROUP),
    "dm-align-group-kernel": Arm("`--toward kernel`", _group(toward="kernel"), reading_of=GROUP),
    "dm-align-group-signed": Arm("`--sign signed` (the paper)", _group(sign="signed"), reading_of=GROUP),
    "dm-align-group-signed-half": Arm("`--sign signed --weight .5 --matching .5`", _group(0.5, sign="signed"), reading_of=GROUP),
    "dm-align-group-own": Arm("`--normaliser own`", _group(normaliser="own"), reading_of=GROUP),
    "dm-align-group-last": Arm("`--reach last` (the paper)", _group(reach="last"), reading_of=GROUP),
    "dm-align-group-trajectory": Arm("`--reach trajectory`", _group(reach="trajectory"), reading_of=GROUP),
    "dm-align-group-trajectory-low": Arm("`--reach trajectory --weight .1 --matching .9`", _group(0.1, reach="trajectory"), reading_of=GROUP),
    "dm-align-group-spread": Arm("`--spread group` (the paper)", _group(spread="group"), reading_of=GROUP),
    "dm-align-group-by-teacher": Arm("`--estimate-by teacher` (Appendix C.2)", _group(estimate_by="teacher"), reading_of=GROUP),
    "dm-align-group-by-student": Arm("`--estimate-by student` (Appendix C.2)", _group(estimate_by="student"), reading_of=GROUP),
    "dm-align-group-by-samples": Arm("`--estimate-by samples` (Appendix C.2: no noise)", _group(estimate_by="samples"), reading_of=GROUP),
    "dm-align-group-low-levels": Arm("`--levels.high .5`", _group(levels=Uniform(0.02, 0.5)), reading_of=GROUP),
    "dm-align-group-high-levels": Arm("`--levels.low .5`", _group(levels=Uniform(0.5, 0.98)), reading_of=GROUP),
    "dm-align-group-shared": Arm("`--weight .5 --matching .5 --shared-noise .9`", _group(0.5, shared_noise=0.9), reading_of=GROUP),
    "dm-align-group-letter": Arm("the paper's letter, from the distilled start", _group(0.5, **LETTER), reading_of=GROUP),
    "dm-align-group-same": Arm("`--weight .5 --matching .5 --shared-noise 1`", _group(0.5, shared_noise=1.0), stochastic=True, reading_of=GROUP),
    "dm-align-group-joint": Arm(
        "`--distil 0`: joint from the teacher on (the paper)",
        lambda p: dm_align_group(p.common, distil=0, iterations=p.base + p.more),
        start=None,
        reading_of=GROUP,
    ),
    "dm-align-group-held": Arm(
        f"`--weight .5 --matching .5 --hold {HOLD}`",
        _group(0.5),
        reading_of=GROUP,
        options={"hold": parse(HOLD), "probe_every": HOLD_EVERY},
    ),
    "matching-in-fours": Arm("`--weight .001`: matching alone in such groups", _group(0.001), reading_of=GROUP),
    "matching-in-groups": Arm("`--group 8 --weight .001`: matching alone in such groups", _group(0.001, group=8), reading_of=GROUP),
    "dm-align-pair-all": Arm("`--within None`: all samples move (the paper)", _pair(within=None), reading_of=PAIR),
    "dm-align-pair-mean": Arm("`--toward mean`", _pair(toward="mean"), reading_of=PAIR),
    "dm-align-pair-own": Arm("`--normaliser own` (the paper)", _pair(normaliser="own"), reading_of=PAIR),
}


@dataclass(frozen=True)
class Place:
    """Where runs and results of a benchmark lie."""

    runs: Path
    results: Path = RESULTS

    def file(self, plan: Plan, arm: str, seed: int) -> Path:
        return self.results / f"{plan.world}-{plan.steps}-{arm}-{seed}.json"

    def run(self, plan: Plan, arm: str, seed: int) -> Path:
        return self.runs / f"{plan.world}-{plan.steps}-{arm}-{seed}"


def done(file: Path, plan: Plan) -> bool:
    """Whether a cell is there; ValueError if it is, but of another plan."""
    if not file.is_file():
        return False
    stored = json.loads(file.read_text(encoding="utf-8"))["plan"]
    if stored != asdict(plan):
        differ = ", ".join(f"{key} {stored.get(key)} there, {value} now" for key, value in asdict(plan).items() if stored.get(key) != value)
        raise ValueError(f"plan: {file.name} was measured otherwise ({differ}); give the same options, or move it away")
    return True


def run_cell(plan: Plan, name: str, seed: int, place: Place) -> None:
    """Trains and measures one cell, and before it those that it goes on from, unless its result is there."""
    arm = ARMS[name]
    if done(place.file(plan, name, seed), plan):
        return
    if arm.stochastic and plan.steps == 1:
        print(f"{name}: left out, a student of 1 step has no stochastic rollout", flush=True)
        return
    for before in filter(None, (arm.start, arm.teacher)):
        run_cell(plan, before, seed, place)
    world, began, recipe = find(plan.world), time.process_time(), arm.recipe(plan)
    ready = world.ready()
    run = train(
        recipe,
        load(place.run(plan, arm.teacher, seed) / "student") if arm.teacher else ready.family,
        out=place.run(plan, name, seed),
        prompts=ready.prompts,
        reward=ready.reward if arm.reward == "own" else world.rewards["exact"](),
        monitor=ready.monitor,
        real=ready.real() if recipe.needs & {"real", "preferred"} else None,
        start_from=place.run(plan, arm.start, seed) if arm.start else None,
        options=replace(RunOptions(seed=seed, probe_every=plan.more, save_every=plan.more, keep=1, terms_every=0), **arm.options),
    )
    about = {"plan": asdict(plan), "arm": name, "before": arm.start or arm.teacher}
    store(place.file(plan, name, seed), run, recipe, world, name, seed=seed, began=began, size=plan.protocol, about=about)


def main(given: Sequence[str] | None = None) -> None:
    """Reads the command line and runs every cell that is not there; status 2 for what is not allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=[name for name in measured_worlds() if "exact" in find(name).rewards])
    parser.add_argument(
        "--arms",
        nargs="+",
        default=[name for name, arm in ARMS.items() if not arm.reading_of],
        choices=list(ARMS),
        help="default: every method in its default reading",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="steps of the student; default: that of recipes on the world")
    parser.add_argument("--guidance", type=float, help="of the teacher; default: 1 on moving-digits, else that of recipes on the world")
    parser.add_argument("--base", type=int, default=120, help="iterations of the start")
    parser.add_argument("--more", type=int, default=60, help="iterations of each arm after it")
    parser.add_argument("--batch", type=int, help="default: that of recipes on the world")
    parser.add_argument("--critic-updates", type=int, help="default: that of recipes on the world")
    parser.add_argument("--protocol", choices=("quick", "full"), default="full", help="videos a row: about 240, or 612")
    parser.add_argument("--monitor-alone", action="store_true", help="measure without the held-out judge where it is not installed")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    notice = evaluation_of(args.world).notice
    if notice and not args.monitor_alone:
        parser.error(f"{notice}; install it, or give --monitor-alone")
    usual = with_settings(Common(), settings_of(args.world))
    guidance = GUIDANCE.get(args.world, usual.guidance) if args.guidance is None else args.guidance
    batch, updates = args.batch or usual.batch, args.critic_updates or usual.critic_updates
    plan, place = Plan(args.world, args.steps or usual.steps, guidance, args.base, args.more, batch, updates, args.protocol), Place(args.runs, args.results)
    place.results.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.arms:
            run_cell(plan, name, seed, place)


if __name__ == "__main__":
    main()
