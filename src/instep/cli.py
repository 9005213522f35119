"""The command line. Each command imports what it needs when it runs, so `instep --help` is quick."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from instep.commands.parse import parse, recipe_args, recipe_name

USAGE = """instep: few-step diffusion models, distilled and aligned in one training loop

  instep train RECIPE        distil and align; resumes if the folder holds the same run
  instep sample DIR          samples of a run, an exported student or a pipeline folder
  instep eval DIR...         measure runs against the teacher and naive sampling
  instep report DIR... -o F  one self-contained HTML page
  instep export DIR --to D   the student as a stock diffusers folder
  instep recipes             what can be trained
  instep plan RECIPE         memory and time, before anything runs
  instep human-eval A B      a local page on which people compare or score samples of two models, blind
  instep pairs export|import|fit  what people preferred as training pairs, public sets in the same form, a reward learned from them
  instep lab RECIPE...       recipes side by side on an exact 2-D mixture: table, figure, animation
  instep pretrain MODEL      rebuild a bundled model from raw digits: moving-digits, moving-digits-i2v, or digits (class-conditional images)

Begin with:  instep train dm-align-group --out runs/first
Help on one: instep train RECIPE --help
"""


@dataclass(frozen=True)
class TrainArgs:
    """Where the run goes and what it runs on."""

    out: Path | None = None
    """Folder of the run; default runs/RECIPE-SEED. The same command on the same folder goes on where it stopped."""
    model: str = "moving-digits"
    """The bundled moving-digits (videos), moving-digits-i2v (videos from their first frame) or digits (class-conditional 8 x 8 images), or the path of a
    diffusers pipeline folder."""
    prompts: Path | None = None
    """Text file, one prompt a line (or JSON lines with a "prompt"); for image-to-video each line names its first frame, "a cat runs [image: cat.png]" (or has
    an "image"). Default: the bundled model's own."""
    reward: str | None = None
    """Reward as module:function, called with (media [B, 3, F, H, W] in [0, 1], prompts); compressible or incompressible (JPEG size); dynamic-degree
    (motion); "command:python score.py", a program that prints scores; http://127.0.0.1:8000/score, an address that answers with them;
    preferences:FOLDER, learned by `instep pairs fit`; vlm:FOLDER or "model=NAME vlm:http://127.0.0.1:8000/v1", a vision-language model that compares.
    Settings stand before it: "timeout=30 retries=2 command:python score.py", "workers=8 batch=4 token=NAME_OF_VARIABLE https://host/score",
    "frames=4 compressible" (only 4 frames of each video, as images; clip=4 as a short video). Several with weights as module:a,0.5*module:b, each
    normalised before it is weighed; a command's commas between quotes. Default: the bundled model's training classifier. Protocols: docs/rewards.md."""
    pairs: Path | None = None
    """Labelled pairs, one JSON object a line: {"prompt": ..., "chosen": FILE, "rejected": FILE}, files beside it; their chosen samples also serve as
    real ones. Default: the bundled model's own."""
    tracker: str | None = None
    """Another tracker beside log.jsonl and TensorBoard, as module:function, called with (step, scalars) for every row."""
    seed: int = 0
    """One seed for everything; the same seed and thread count give the same weights."""
    threads: int | None = None
    """CPU threads; default: all cores."""
    start_from: Path | None = None
    """Another run whose student and critics this one begins with."""
    size: tuple[int, int, int] | None = None
    """Height, width and frames of the videos; default: 480 832 81, and 48 48 9 for the bundled ones."""
    save_every: int = 25
    """Steps between checkpoints."""
    probe_every: int = 20
    """Steps between probes (samples that feed the health checks and plots)."""
    stop_on: tuple[str, ...] = ()
    """Health flags at which the run stops, goes back to its best checkpoint by the monitor, and exports that. hacking: the training reward rises while
    the monitor's share of right samples or the variety falls, or the matching force grows. Others: collapse, broken, exploded (a wrong name lists
    all). Probe often, or it is seen late: --stop-on hacking --probe-every 5. The same command again does not train on; without this it does."""
    teacher_samples: int = 512
    """Samples of the teacher that are made and kept for recipes that need real samples or stored pairs, where there are none."""
    checkpointing: bool = False
    """Activation checkpointing: less memory, one more forward pass."""
    evaluate: bool = True
    """Measure the student against teacher and naive sampling at the end (moving-digits and moving-digits-i2v), and write the report."""

    def __post_init__(self) -> None:
        whole = {"save_every": self.save_every, "probe_every": self.probe_every, "threads": self.threads, "teacher_samples": self.teacher_samples}
        for name, value in whole.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is not allowed; it is 1 or more")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status. What a user got wrong is one line on stderr, not a traceback; a reader that has gone away (`| head`) is no
    error worth a word."""
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush at exit goes nowhere
        return 141  # what a shell says of SIGPIPE


def _main(args: list[str]) -> int:
    commands = {
        "train": _train, "sample": _sample, "eval": _eval, "report": _report, "export": _export, "recipes": _recipes, "plan": _plan,
        "pretrain": _pretrain, "lab": _lab, "human-eval": _human_eval, "pairs": _pairs,
    }  # fmt: skip
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if args[0] == "--version":
        from instep import __version__

        print(__version__)
        return 0
    if args[0] not in commands:
        print(f"error: command {args[0]!r} is not known; allowed: {', '.join(commands)}", file=sys.stderr)
        return 2
    try:
        return commands[args[0]](args[1:]) or 0
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) or os.environ.get("INSTEP_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _train(args: Sequence[str]) -> int:
    name = recipe_name(args, "train")
    recipe, options = recipe_args(name, args[1:], "train", TrainArgs)
    from instep.commands.train import train_command

    return train_command(recipe, options, "instep train " + shlex.join(args))


def _recipes(args: Sequence[str]) -> int:
    import inspect

    from rich.console import Console
    from rich.table import Table

    from instep.recipes import NAMES, find

    table = Table("recipe", "what it does", "stages (default steps)")
    for name in NAMES:
        function = find(name)
        stages = ", ".join(f"{stage.name} ({stage.steps})" for stage in function().stages)
        table.add_row(name, (inspect.getdoc(function) or "").split("\n")[0], stages)
    Console().print(table)
    Console().print("Options of one: instep train RECIPE --help", highlight=False)
    return 0


@dataclass(frozen=True)
class PretrainArgs:
    """Rebuild a bundled model from raw digits, seeded."""

    out: Path | None = None
    """Where the model's folder goes, default: its name; an interrupted rebuild of moving-digits of the same seed goes on."""
    seed: int = 0
    """Seed of every part."""
    threads: int = 2
    """CPU threads."""


def _pretrain(args: Sequence[str]) -> int:
    from instep.models import BUNDLED, DIGITS, MOVING_DIGITS, MOVING_DIGITS_I2V

    if not args or args[0] not in BUNDLED:
        raise ValueError(f"model: {args[0] if args else 'none'} cannot be pretrained; allowed: {', '.join(BUNDLED)}")
    model = args[0]
    options = parse(PretrainArgs, args[1:], f"pretrain {model}")
    from instep.pretrain.digits import pretrain_digits
    from instep.pretrain.moving_digits import pretrain_moving_digits
    from instep.pretrain.moving_digits_i2v import pretrain_moving_digits_i2v

    rebuild = {MOVING_DIGITS: pretrain_moving_digits, MOVING_DIGITS_I2V: pretrain_moving_digits_i2v, DIGITS: pretrain_digits}[model]
    rebuild(options.out or Path(model), options.seed, options.threads)
    return 0


def _sample(args: Sequence[str]) -> int:
    from instep.commands.sample import SampleArgs, sample_command

    return sample_command(parse(SampleArgs, args, "sample"))


def _eval(args: Sequence[str]) -> int:
    from instep.commands.evaluate import EvalArgs, eval_command

    return eval_command(parse(EvalArgs, args, "eval"))


def _report(args: Sequence[str]) -> int:
    from instep.commands.evaluate import ReportArgs, report_command

    return report_command(parse(ReportArgs, args, "report"))


def _export(args: Sequence[str]) -> int:
    from instep.commands.export import ExportArgs, export_command

    return export_command(parse(ExportArgs, args, "export"))


def _lab(args: Sequence[str]) -> int:
    count = next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args))
    from instep.commands.lab import LabArgs, lab_command

    options = parse(LabArgs, args[count:], "lab RECIPE...", "Recipes side by side in the exact laboratory; RECIPE or RECIPE:key=value,key=value.")
    return lab_command(args[:count], options)


def _human_eval(args: Sequence[str]) -> int:
    from instep.commands.judge import HumanEvalArgs, human_eval_command

    return human_eval_command(parse(HumanEvalArgs, args, "human-eval"))


def _pairs(args: Sequence[str]) -> int:
    from instep.commands import pairs

    if args and args[0] in ("-h", "--help"):
        print(pairs.USAGE)
        return 0
    if args and args[0] == "export":
        return pairs.export_pairs_command(parse(pairs.ExportPairsArgs, args[1:], "pairs export"))
    if args and args[0] == "import":
        return pairs.import_pairs_command(parse(pairs.ImportPairsArgs, args[1:], "pairs import"))
    if args and args[0] == "fit":
        return pairs.fit_pairs_command(parse(pairs.FitPairsArgs, args[1:], "pairs fit"))
    raise ValueError(f"pairs: {repr(args[0]) if args else 'nothing'} cannot be done; allowed: export, import, fit (see instep pairs --help)")


def _plan(args: Sequence[str]) -> int:
    name = recipe_name(args, "plan")
    from instep.commands.plan import PlanArgs, plan_command

    recipe, options = recipe_args(name, args[1:], "plan", PlanArgs)
    return plan_command(recipe, options)


if __name__ == "__main__":
    sys.exit(main())
