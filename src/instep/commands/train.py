"""`instep train`: a recipe on a model, then measurement, report and a table in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from instep.commands import default_threads
from instep.commands.rewards import load_function, load_reward
from instep.models import BUNDLED, DIGITS, MOVING_DIGITS, MOVING_DIGITS_I2V, VideoSize, load
from instep.models.base import Family
from instep.rewards.base import Reward
from instep.train.probe import Monitor, few_of
from instep.train.recipe import Recipe
from instep.train.run import Interrupted, Run, RunOptions, final_samples, train
from instep.train.source import PairSamples, RealSamples

if TYPE_CHECKING:
    from instep.cli import TrainArgs
    from instep.data.media import LabelledPair
    from instep.models.base import Encodes


@dataclass(frozen=True)
class Setting:
    """What a run is given besides its recipe."""

    family: Family
    prompts: tuple[str, ...]
    reward: Reward | Callable[..., Any] | None
    monitor: Monitor | None
    real: RealSamples | None
    pairs: PairSamples | None = None


def train_command(recipe: Recipe, args: TrainArgs, command: str) -> int:
    """Runs the recipe; 0 when it is done, 130 when it was asked to stop and is saved."""
    torch.set_num_threads(args.threads or default_threads())
    out = args.out or Path("runs") / f"{recipe.name}-{args.seed}"
    options = RunOptions(
        seed=args.seed, save_every=args.save_every, probe_every=args.probe_every, checkpointing=args.checkpointing,
        teacher_samples=args.teacher_samples, stop_on=args.stop_on,
    )  # fmt: skip
    setting = prepare(recipe, args)
    tracker = load_function(args.tracker, "tracker") if args.tracker else None
    try:
        run = train(
            recipe,
            setting.family,
            out=out,
            prompts=setting.prompts,
            reward=setting.reward,
            monitor=setting.monitor,
            real=setting.real,
            pairs=setting.pairs,
            start_from=args.start_from,
            options=options,
            tracker=tracker,
            command=command,
        )
    except Interrupted as stopped:
        print(f"stopped by {stopped}:\n  {command}", file=sys.stderr)
        return 130
    finish(run, setting, args.evaluate)
    return 0


def prepare(recipe: Recipe, args: TrainArgs) -> Setting:
    """The model and what the recipe needs with it; errors here come before any training."""
    from instep.data.prompts import load_prompts

    reward = load_reward(args.reward) if args.reward is not None else None
    prompts = tuple(load_prompts(args.prompts)) if args.prompts else None
    labelled = load_pairs(args.pairs) if args.pairs else None
    if args.model in BUNDLED:
        from instep import embedded

        makers = {MOVING_DIGITS: embedded.moving_digits, MOVING_DIGITS_I2V: embedded.moving_digits_i2v, DIGITS: embedded.class_digits}
        own: Any = makers[args.model]()
        # a user's own pairs bring their chosen samples with them
        real = own.real() if recipe.needs & {"real", "preferred"} and labelled is None else None
        pairs = paired(labelled, own.family) or (own.pairs() if "pairs" in recipe.needs else None)
        return Setting(own.family, prompts or own.prompts, reward or own.reward, own.monitor, real, pairs)
    if prompts is None:
        raise ValueError(f"prompts: none for model {args.model!r}; give a text file with one prompt a line, --prompts FILE")
    family = load(args.model, VideoSize(*args.size) if args.size else None)
    return Setting(family, prompts, reward, None, None, paired(labelled, family))


def load_pairs(path: Path) -> Sequence[LabelledPair]:
    """The pairs of a file, checked, their media not yet read."""
    from instep.data.pairs import read_pairs

    return read_pairs(path)


def paired(labelled: Sequence[LabelledPair] | None, family: Family) -> PairSamples | None:
    """Labelled media as latents of the family."""
    if labelled is None:
        return None
    from instep.data.media import pair_samples

    if not hasattr(family, "encode_media"):
        raise ValueError(f"pairs: {family.name} cannot encode media; pass pairs=PairSamples(prompts, chosen, rejected) of latents to train() in Python")
    return pair_samples(labelled, cast("Encodes", family))


def finish(run: Run, setting: Setting, evaluate: bool) -> None:
    """Samples, metrics and the report of a finished run."""
    prompts = few_of(setting.prompts, 8)
    final_samples(run, prompts)
    if not evaluate:
        return
    from instep.commands.evaluate import MEASURED, measure_run, print_rows
    from instep.evaluate.report import write_report

    if setting.family.name in MEASURED:
        print_rows(measure_run(run.out))
    report = run.out / "report.html"
    write_report([run.out], report)
    print(f"student   {run.student or 'not exported'}\nreport    {report}")
