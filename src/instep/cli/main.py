"""The command line. Each command imports what it needs when it runs, so `instep --help` is quick."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from instep.cli.parse import parse, recipe_args, recipe_name, takes
from instep.core.elsewhere import Elsewhere, wait_to_speak
from instep.core.unusable import Unusable

USAGE = """instep: few-step diffusion models, distilled and aligned in one training loop

  instep train RECIPE        distil and align; resumes if the folder holds the same run
  instep sample DIR          samples of a run, an exported student or a pipeline folder
  instep eval DIR...         measure runs against the teacher and naive sampling; with --prompts any model, by rewards and given data
  instep report DIR... -o F  one self-contained HTML page
  instep export DIR --to D   the student as a stock diffusers folder
  instep recipes             what can be trained; with --model, what is published for a model and the defaults that follow
  instep rewards             the rewards that go by a name, and what each needs; convert: published pickles as safetensors
  instep convert FILE        SiT's published weights as a model folder
  instep plan RECIPE         memory and time, before anything runs
  instep human-eval A B      a local page on which people compare or score samples of two models, blind
  instep pairs COMMAND ...   preferences as training pairs, public sets in the same form, slow copies, a reward or a ranker learned from pairs
  instep lab RECIPE...       recipes side by side on an exact 2-D mixture: table, figure, animation

RECIPE is one that `instep recipes` lists, or module:function for one of your own.
Begin with:  instep train dm-align-group --out runs/first
Help on one: instep train RECIPE --help
"""

# the status of an exception that no command foresees (EX_SOFTWARE of sysexits.h)
UNEXPECTED = 70


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 2 for a user's error, 1 for a result that cannot be used. Both are one line on stderr, not a traceback; a
    closed pipe (`| head`) is not reported. Ctrl-C is 130, in one line too. Any other exception is an error of instep (status 70): its traceback is
    saved, and its path is printed.
    """
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted: what was being written is whole or not there; the same command begins again, or goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards what is left to flush at exit
        return 141  # a shell's status for SIGPIPE


def _main(args: list[str]) -> int:
    commands = {
        "train": _train,
        "sample": _sample,
        "eval": _eval,
        "report": _report,
        "export": _export,
        "recipes": _recipes,
        "rewards": _rewards,
        "convert": _convert,
        "plan": _plan,
        "lab": _lab,
        "human-eval": _human_eval,
        "pairs": _pairs,
    }
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if args[0] == "--version":
        from instep.core.version import __version__

        print(__version__)
        return 0
    if args[0] not in commands:
        print(f"error: command {args[0]!r} is not known; allowed: {', '.join(commands)}", file=sys.stderr)
        return 2
    try:
        return commands[args[0]](args[1:]) or 0
    except Elsewhere as error:
        wait_to_speak(error)  # torchrun ends rank 0 as soon as another one ends
        return 2
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) or os.environ.get("INSTEP_TRACEBACK"):
            raise
        wait_to_speak(error)
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 1 if isinstance(error, Unusable) else 2
    except Exception as error:
        if os.environ.get("INSTEP_TRACEBACK"):
            raise
        wait_to_speak(error)
        print(f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}; this is unexpected: {_saved_traceback(args, error)}", file=sys.stderr)
        return UNEXPECTED


def _saved_traceback(args: Sequence[str], error: Exception) -> str:
    """Writes the traceback of an error to a file of its own, and returns where it is and what to do with it."""
    import tempfile
    import traceback

    text = f"instep {shlex.join(args)}\n\n{''.join(traceback.format_exception(error))}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="instep-traceback-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(text)
    except OSError as full:
        return f"its traceback could not be saved ({full.strerror}); INSTEP_TRACEBACK=1 prints it"
    return f"its traceback is in {file.name}; please report it with that file"


def _train(args: Sequence[str]) -> int:
    name = recipe_name(args, "train")
    from instep.cli.train import TrainArgs, train_command

    recipe, options = recipe_args(name, args[1:], "train", TrainArgs)
    return train_command(recipe, options, "instep train " + shlex.join(args))


def _recipes(args: Sequence[str]) -> int:
    from instep.cli.recipes import RecipesArgs, recipes_command

    return recipes_command(parse(RecipesArgs, args, "recipes"))


def _rewards(args: Sequence[str]) -> int:
    from instep.cli import named_rewards

    if args and args[0] in ("-h", "--help"):
        print(named_rewards.USAGE)
        return 0
    if args and args[0] == "convert":
        return named_rewards.convert_reward_command(parse(named_rewards.ConvertRewardArgs, args[1:], "rewards convert"))
    return named_rewards.list_rewards_command(parse(named_rewards.ListRewardsArgs, args, "rewards"))


def _convert(args: Sequence[str]) -> int:
    from instep.cli.convert import ConvertArgs, convert_command

    return convert_command(parse(ConvertArgs, args, "convert"))


def _sample(args: Sequence[str]) -> int:
    from instep.cli.sample import SampleArgs, sample_command

    options = parse(SampleArgs, args, "sample")
    if options.layout is None:
        return sample_command(options)
    from instep.cli.sample_layout import sample_layout_command

    return sample_layout_command(options)


def _eval(args: Sequence[str]) -> int:
    from instep.cli.evaluate import EvalArgs, eval_command

    options = parse(EvalArgs, args, "eval")
    if options.prompts is None:
        return eval_command(options)
    from instep.cli.evaluate_prompts import eval_prompts_command

    return eval_prompts_command(options)


def _report(args: Sequence[str]) -> int:
    from instep.cli.evaluate import ReportArgs, report_command

    return report_command(parse(ReportArgs, args, "report"))


def _export(args: Sequence[str]) -> int:
    from instep.cli.export import ExportArgs, export_command

    return export_command(parse(ExportArgs, args, "export"))


def _lab(args: Sequence[str]) -> int:
    count = next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args))
    from instep.cli.lab import LabArgs, lab_command

    options = parse(LabArgs, args[count:], "lab RECIPE...", "Recipes side by side in the exact laboratory; RECIPE or RECIPE:key=value,key=value.")
    return lab_command(args[:count], options)


def _human_eval(args: Sequence[str]) -> int:
    from instep.cli.human_eval import HumanEvalArgs, human_eval_command

    return human_eval_command(parse(HumanEvalArgs, args, "human-eval"))


def _pairs(args: Sequence[str]) -> int:
    from instep.cli import pairs

    if args and args[0] in ("-h", "--help"):
        print(pairs.USAGE)
        return 0
    if args and args[0] == "export":
        return pairs.export_pairs_command(parse(pairs.ExportPairsArgs, args[1:], "pairs export"))
    if args and args[0] == "import":
        return pairs.import_pairs_command(parse(pairs.ImportPairsArgs, args[1:], "pairs import"))
    if args and args[0] == "slow":
        return pairs.slow_pairs_command(parse(pairs.SlowPairsArgs, args[1:], "pairs slow"))
    if args and args[0] == "fit":
        return pairs.fit_pairs_command(parse(pairs.FitPairsArgs, args[1:], "pairs fit"))
    if args and args[0] == "tune-ranker":
        from instep.cli.tune_ranker import TuneRankerArgs, tune_ranker_command

        return tune_ranker_command(parse(TuneRankerArgs, args[1:], "pairs tune-ranker"))
    raise ValueError(f"pairs: {repr(args[0]) if args else 'nothing'} cannot be done; allowed: export, import, slow, fit, tune-ranker (see instep pairs --help)")


def _plan(args: Sequence[str]) -> int:
    name = recipe_name(args, "plan")
    from instep.cli.plan import PlanArgs, plan_command
    from instep.planning.plan import RANK

    recipe, options = recipe_args(name, args[1:], "plan", PlanArgs)
    with_rank = [*args[1:], "--lora-rank", str(RANK)]
    return plan_command(recipe, options, (lambda: recipe_args(name, with_rank, "plan", PlanArgs)[0]) if takes(name, "lora_rank") else None)
