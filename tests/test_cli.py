"""The command line: help that helps, and mistakes answered by one line that names the option, the value and what it takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fast import slow_but

from instep.cli.main import main
from instep.cli.parse import rephrased
from instep.cli.train import TrainArgs
from instep.recipes import NAMES
from instep.training.execution import Execution


def said(capsys, line: str) -> str:
    """The one line on stderr that `instep LINE` fails with."""
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and "─" not in err, err
    return err.strip().removeprefix("error: ")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No command of these tests leaves anything behind."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help(capsys, args):
    assert main(args) == 0
    out = capsys.readouterr().out
    for command in ("train", "sample", "eval", "report", "export", "recipes", "rewards", "plan", "lab", "human-eval", "pairs"):
        assert f"instep {command}" in out
    assert "instep train dm-align-group --out runs/first" in out, "one line to begin with"


def test_recipes_are_listed_with_what_they_do(capsys):
    assert main(["recipes"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(name in out for name in NAMES)
    assert re.search(r"distil \(\d+\), align \(\d+\)", out) and "instep train RECIPE --help" in out


def test_unknown_names(capsys):
    commands = "train, sample, eval, report, export, recipes, rewards, convert, plan, lab, human-eval, pairs"
    assert said(capsys, "nonsense") == f"command 'nonsense' is not known; allowed: {commands}"
    allowed = ", ".join(NAMES)
    assert said(capsys, "train nonsense").startswith(f"recipe: 'nonsense' is not known; allowed: {allowed}")
    for command in ("train", "plan"):
        assert said(capsys, command) == f"recipe: none was given; write `instep {command} RECIPE`, one of {allowed}, or module:function for one of your own"
    assert said(capsys, "train --out x").startswith("recipe: none was given")


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("dmd2 --nonsense 3", "--nonsense: there is no such option"),
        ("dmd2 --guidanc 3", "--guidanc: there is no such option; did you mean --guidance?"),
        ("dmd2 extra", "extra: there is no such option"),
        ("dmd2 --top-n 2", "--top-n: there is no such option"),
        ("dmd2 --steps abc", "--steps: 'abc' is not allowed; it takes INT: Steps (network evaluations) of the student. (default: 4)"),
        ("dmd2 --student.lr fast", "--student.lr: 'fast' is not allowed; it takes FLOAT"),
        ("dmd2 --student.lr -1", "--student.lr: -1.0 is not allowed; it is positive"),
        ("dmd2 --fake.decay 2", "--fake.decay: 2.0 is not allowed; it is the fraction of a stage, between 0 and 1"),
        ("dmd2 --student.lr", "--student.lr: its value is missing; it takes 1"),
        ("dm-align-group --sign up", "--sign: 'up' is not allowed; allowed: 'pull', 'signed', 'printed'"),
        ("dmd2 --size 48 48", "--size: ['48', '48'] is not allowed; it takes {None}|{INT INT INT} Height, width and frames"),
        ("dmd2 --stop-on hackign", "stop_on: 'hackign' is not allowed; allowed: opposed, silent, "),
        ("dmd2 --save-every 0", "save_every: 0 is not allowed; it is 1 or more"),
    ],
)
def test_mistakes_in_options(capsys, line, answer):
    got = said(capsys, f"train {line}")
    assert got.startswith(answer)
    assert answer.startswith(("save_every", "stop_on")) or got.endswith(f"(see instep train {line.split()[0]} --help)")


def test_mistakes_in_other_commands(capsys):
    assert said(capsys, "plan dmd2 --on mars") == "--on: 'mars' is not allowed; allowed: 'here', 'A100', 'H100', 'H200' (see instep plan dmd2 --help)"
    assert said(capsys, "sample").startswith("Missing from instep sample: STR Folder of a run")
    assert said(capsys, "sample x --nonsense y").startswith("--nonsense: there is no such option")


def test_mistakes_before_any_work(capsys):
    """A prompt file and a reward that are not there are found before a model is loaded."""
    assert said(capsys, "train dmd2 --prompts nowhere.txt").startswith("prompts: nowhere.txt is not a file that exists")
    assert said(capsys, "train dm-align-group --reward brightness").startswith("reward: 'brightness' is not of the form module:function")
    assert said(capsys, "train dm-align-group --reward x*test_run:brightness").startswith("reward: the weight 'x' of 'test_run:brightness' is not a number")
    assert said(capsys, "train dm-align-group --reward no_such_module:f").startswith("reward: 'no_such_module:f' cannot be imported")


@pytest.mark.slow
def test_boxes_drawn_in_utf8():
    """A terminal gets another frame than a pipe."""
    got = child("-X", "utf8", "-c", "import sys; from instep.cli.main import main; sys.exit(main(['train', 'dmd2', '--steps', 'abc']))")
    assert got.returncode == 2 and got.stderr.startswith("error: --steps: 'abc' is not allowed; it takes INT: Steps (network")
    assert got.stderr.count("\n") == 1


def test_a_box_of_unknown_shape_is_still_said():
    assert rephrased("╭─ Odd ─╮\n│ Something else │\n│ went wrong │\n╰───╯\n") == "Something else went wrong"
    assert rephrased("plain text\nof two lines") == "plain text of two lines"
    assert rephrased("\x1b[31m╭─ Odd ─╮\x1b[0m\n│ \x1b[1mwrong\x1b[0m │\n") == "wrong"


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_recipe_explains_its_own_options(capsys, name):
    """Every parameter of the recipe function is an option, with the sentence of its docstring; so are a run's own."""
    import dataclasses
    import inspect

    from instep.recipes import find

    with pytest.raises(SystemExit) as stop:
        main(["train", name, "--help"])
    assert stop.value.code == 0
    out = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    function = find(name)
    explained = dict(re.findall(r"^ {4}(\w+): (.*)$", inspect.getdoc(function), re.MULTILINE))
    parameters = inspect.signature(function).parameters
    assert explained.keys() == parameters.keys()
    for field in dataclasses.fields(inspect.get_annotations(function, eval_str=True)["common"]):
        option = field.name.replace("_", "-")
        assert f"--{option} " in out or f"--{option}, " in out or f"{option} options" in out, option
    for parameter in parameters.keys() - {"common"}:
        option = parameter.replace("_", "-")
        assert f"--{option} " in out or f"--{option}, " in out or f"{option} options" in out, option
        assert explained[parameter].split(";")[0].rstrip(".")[:60] in out, parameter
    for field in (*(TrainArgs.__dataclass_fields__.keys() - {"execution"}), *Execution.__dataclass_fields__):
        assert f"--{field.replace('_', '-')}" in out
    assert inspect.getdoc(function).splitlines()[0] in out


LIGHT = """
import sys, time
import torch
start = time.perf_counter()
import instep
seconds = time.perf_counter() - start
roots = {name.split(".")[0] for name in sys.modules}
print(seconds, sorted(roots & {"diffusers", "transformers", "peft", "sklearn", "tyro", "torchmetrics"}),
      [name for name in sys.modules if name.startswith("instep.models")])
"""


def child(*args: str) -> subprocess.CompletedProcess:
    source = str(Path(__file__).parents[1] / "src")
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    )


def test_importing_instep_is_light():
    seconds, heavy = child("-c", LIGHT).stdout.split(" ", 1)
    assert float(seconds) < 1 and heavy.strip() == "[] []"


def test_help_needs_no_torch():
    got = child("-c", "import sys; from instep.cli.main import main; main(['--help']); print('torch' in sys.modules)")
    assert got.stdout.splitlines()[-1] == "False"


def test_the_help_of_training_loads_no_model_library():
    """Its defaults are those of the default bundled model, whose networks are not needed to say them."""
    at_exit = "import atexit, sys; atexit.register(lambda: print(sorted({'diffusers', 'transformers', 'peft'} & set(sys.modules))))"
    got = child("-c", f"{at_exit}\nfrom instep.cli.main import main\nmain(['train', 'dmd2', '--help'])")
    assert "--student.lr" in got.stdout and got.stdout.splitlines()[-1] == "[]"


def test_it_runs_as_a_program():
    got = child("-m", "instep", "train", "nonsense")
    assert got.returncode == 2 and got.stderr.startswith("error: recipe: 'nonsense'") and "Traceback" not in got.stderr


@pytest.mark.parametrize("args", slow_but([["train", "dmd2", "--help"]], [["--help"], ["train", "dmd2", "--help"], ["recipes"]]))
def test_a_reader_that_has_gone_away_is_no_error(args):
    ours, theirs = os.pipe()
    os.close(ours)
    source = str(Path(__file__).parents[1] / "src")
    command, env = [sys.executable, "-m", "instep", *args], {**os.environ, "PYTHONPATH": source}
    with os.fdopen(theirs, "wb") as gone:
        got = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, env=env, timeout=120)
    assert got.returncode in (141, 1) and got.stderr == b"", "rich's own status is 1"


def test_several_rewards_on_the_command_line():
    from test_run import brightness

    from instep.cli.train import load_reward

    both = load_reward("test_run:brightness, 0.5*test_run:brightness")
    assert both.weights == (1.0, 0.5) and load_reward("test_run:brightness") is brightness and load_reward("2*test_run:brightness").weights == (2.0,)
