"""The public face: names that are imported when they are used, a recipe of one's own, and likely mistakes taken or named in one line."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_wan_pipeline

import instep
from instep import Common, Force, RunOptions, Size, Stage, WanFamily, dm_align_group, dmd2, train
from instep.bundled import folder_of
from instep.cli.main import main
from instep.core.size import as_size
from instep.lab.spec import parts_of
from instep.methods.regression import Regression
from instep.recipes import NAMES, as_recipe, find
from instep.rewards.base import FunctionReward, as_reward
from instep.training.inputs import as_family, as_prompt_list

SIZE = Size(48, 48, 9)
SMALL = Common(steps=2, batch=2, critic_updates=1)
PROMPTS = ["a seven", "a digit"]


def child(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(instep.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env, check=True).stdout.strip()


# names


def test_import_loads_nothing_and_names_load_what_they_need():
    heavy = "sorted({'torch', 'numpy', 'diffusers', 'transformers', 'rich', 'tyro'} & {m.split('.')[0] for m in sys.modules})"
    assert child(f"import sys, instep; dir(instep); print({heavy})") == "[]"
    assert child(f"import sys, instep; instep.Size; instep.__version__; print({heavy})") == "[]"
    seen = child(f"import sys, instep; instep.Common(); print({heavy})")
    assert "torch" in seen and "diffusers" not in seen


def test_every_name_is_there_for_people_and_for_type_checkers():
    assert set(instep.__all__) <= set(dir(instep))
    for name in instep.__all__:
        assert getattr(instep, name) is not None
    for module, function in NAMES.values():
        assert getattr(instep, function) is getattr(sys.modules[module], function), "every recipe is public"
    assert {"train", "Reward", "Force", "Objective", "Critic", "Recipe", "Stage", "Common", "RoleConfig", "AdamWConfig"} <= set(instep.__all__)
    assert {"RealSamples", "PairSamples", "Run", "RunOptions", "load", "Size"} <= set(instep.__all__)
    stub = Path(instep.__file__).with_suffix(".pyi")
    assert all(alias.asname == alias.name for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom) for alias in node.names)
    assert stub.with_name("py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        instep.nonsense  # noqa: B018


# a recipe of one's own on the command line

OWN = """
from instep import Common, Recipe

def plain(common: Common = Common(), *, iterations: int = 3, pull: float = 0.5) -> Recipe:
    \"\"\"Match with a weight.

    Args:
        common: options of every recipe.
        iterations: student updates.
        pull: weight of matching.
    \"\"\"
    return common.recipe("plain", common.stage("match", iterations, (common.matching(pull),), (common.critic(),)))

def needs(common: Common, count: int) -> Recipe:
    return plain(common, iterations=count)

def clash(common: Common = Common(), size: int = 3) -> Recipe:
    return plain(common)

def twice(common: Common = Common(), steps: int = 3) -> Recipe:
    return plain(common)

def untyped(common: Common, pull=0.5):
    return plain(common)

def without(iterations: int = 3) -> Recipe:
    return plain()

def empty(common: Common = Common()):
    return None

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a module of recipes, under a name that no other test has imported."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / f"{name}_broken.py").write_text("def x(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def said(capsys, *args: str) -> str:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return err.strip().removeprefix("error: ")


def test_a_recipe_of_ones_own_is_trained_and_recorded(own, tmp_path, capsys):
    line = [
        "train",
        f"{own}:plain",
        "--iterations",
        "1",
        "--pull",
        "0.25",
        "--steps",
        "1",
        "--batch",
        "2",
        "--critic-updates",
        "1",
        "--threads",
        "1",
        "--model",
        "digits",
    ]
    assert main([*line, "--no-evaluate", "--out", "run"]) == 0
    record = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert record["recipe"] == "plain" and record["config"]["stages"][0]["terms"][0]["weight"] == 0.25
    name, _, digest = record["recipe_source"].partition(" ")
    assert name == f"{own}:plain" and len(digest) == 16
    file = tmp_path / f"{own}.py"
    file.write_text(file.read_text() + "\n# changed\n")
    capsys.readouterr()
    assert "its recipe_source differ" in said(capsys, *line, "--no-evaluate", "--out", "run"), "another source is another run"


def test_its_parameters_are_options_of_every_command(own, capsys):
    with pytest.raises(SystemExit):
        main(["train", f"{own}:plain", "--help"])
    out = capsys.readouterr().out
    assert "--pull" in out and "weight of matching" in out and "--student.lr" in out
    assert main(["plan", f"{own}:plain", "--on", "H100", "--steps", "1"]) == 0
    assert "plain, stage match" in capsys.readouterr().out
    assert main(["lab", f"{own}:plain:pull=0.7", "--student", "particles", "--iterations", "1", "--members", "1", "--out", "lab", "--no-figures"]) == 0
    (run,) = json.loads(Path("lab/lab.json").read_text())["runs"]
    assert run["recipe"]["stages"][0]["terms"][0]["weight"] == 0.7 and run["recipe"]["source"].startswith(f"{own}:plain ")


def test_what_is_wrong_with_it_is_said_in_one_line(own, capsys):
    for spec, answer in {
        "no_such_module:f": "recipe: 'no_such_module:f' cannot be imported (No module named 'no_such_module')",
        f"{own}_broken:x": f"recipe: '{own}_broken:x' cannot be imported (SyntaxError",
        f"{own}:nothing": f"recipe: '{own}:nothing' cannot be imported (module",
        f"{own}:number": f"recipe: '{own}:number' is an int, not a function",
        f"{own}:without": f"recipe: '{own}:without' has no parameter `common`",
        f"{own}:untyped": f"recipe: the parameter 'pull' of '{own}:untyped' has no type",
        f"{own}:empty": f"recipe: '{own}:empty' returned NoneType; a recipe function returns a Recipe",
    }.items():
        for command in ("train", "plan", "lab"):
            assert said(capsys, command, spec, *(["--out", "new"] if command != "plan" else [])).startswith(answer), (command, spec)
    assert "--count" in said(capsys, "train", f"{own}:needs")
    assert said(capsys, "train", f"{own}:clash") == f"recipe: the parameter 'size' of '{own}:clash' is an option of `instep train` itself; choose another name"
    assert said(capsys, "plan", f"{own}:twice") == f"recipe: the parameter 'steps' of '{own}:twice' is an option of Common itself; choose another name"
    assert "count has no default" in said(capsys, "lab", f"{own}:needs", "--out", "new")
    assert not Path("new").exists()


def test_specs_of_the_laboratory():
    assert parts_of("dmd2") == ("dmd2", "") and parts_of("dmd2:gan=0.1,iterations=3") == ("dmd2", "gan=0.1,iterations=3")
    assert parts_of("mine:f") == ("mine:f", "") and parts_of("mine:f:gan=0.1") == ("mine:f", "gan=0.1")
    assert parts_of("unknown:gan=0.1") == ("unknown", "gan=0.1")


# likely mistakes


def test_a_function_in_place_of_a_recipe():
    assert as_recipe(dmd2) == dmd2() and as_recipe(find("amd")).name == "amd"

    def mine(common: Common, weight: float):
        return dmd2(common)

    with pytest.raises(ValueError, match=r"the function mine was given, which needs common, weight; call it, mine\(common=...\)"):
        as_recipe(mine)
    with pytest.raises(ValueError, match="recipe: 'dmd2' is not allowed"):
        as_recipe("dmd2")
    with pytest.raises(ValueError, match="'<lambda>' returned int"):
        as_recipe(lambda: 3)


def test_prompts_in_every_form(tmp_path):
    def texts(given):
        return [prompt.text for prompt in as_prompt_list(given)]

    assert texts("a cat") == ["a cat"], "one text is one prompt, not its letters"
    assert texts(f"a {i}" for i in range(2)) == ["a 0", "a 1"] and texts(("a", "b")) == ["a", "b"]
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\na dog\n")
    assert [str(prompt) for prompt in as_prompt_list(file)] == ["a cat", "a dog"]
    with pytest.raises(ValueError, match=r"prompts: 'prompts.txt' names a file; give Path\('prompts.txt'\)"):
        as_prompt_list("prompts.txt")
    for wrong, answer in ((None, "None is not allowed"), (3, "int is not allowed"), (["a", 3], "item 1 is 3"), ({"a": 1}, "dict is not allowed")):
        with pytest.raises(ValueError, match=f"prompts: {answer}"):
            as_prompt_list(wrong)


def test_a_tuple_as_size():
    assert as_size((48, 48, 9)) == SIZE and as_size([64, 32]) == Size(64, 32, 1) and as_size(SIZE) is SIZE
    assert WanFamily(tiny_wan_pipeline(), (48, 48, 9)).size == SIZE
    for wrong in (48, "48x48", (48,), (48, 48, 9, 1), (48.0, 48, 9), (0, 48, 9)):
        with pytest.raises(ValueError, match="size: .* is not allowed; it is \\(height, width, frames\\)"):
            as_size(wrong)


class Called:
    """A reward with `__call__` in place of `score`."""

    name, differentiable = "called", True

    def __call__(self, media, prompts):
        return media.flatten(1).mean(1)


class Scores:
    """A reward with `score` and nothing else."""

    def score(self, media, prompts):
        return media.flatten(1).mean(1)


def test_rewards_of_another_shape():
    media = torch.rand(2, 3, 4, 4)
    for given, name, differentiable in ((Called(), "called", True), (Scores(), "Scores", False), (Scores().score, "score", False)):
        reward = as_reward(given)
        assert (reward.name, reward.differentiable, reward.space) == (name, differentiable, "pixel")
        assert torch.equal(reward.score(media, PROMPTS), media.flatten(1).mean(1))
    with pytest.raises(ValueError, match=r"reward: Called is a class; give an object of it, Called\(...\)"):
        as_reward(Called)
    with pytest.raises(ValueError, match="reward: 3 is neither"):
        as_reward(3)
    with pytest.raises(ValueError, match="space: 'pixels' of reward 'r' is not allowed; pixel or latent"):
        FunctionReward(brightness, "r", space="pixels")


def brightness(media, prompts):
    return media.flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class Wrong(Force):
    """A force that returns what it is told to."""

    name: str = "wrong"
    returns: str = "none"

    def __call__(self, view):
        x = view.samples.point(self.on).x
        return {"none": None, "scalar": x.sum(), "rows": x[:1], "nan": x.detach() / 0 * 0, "number": 3.0}[self.returns]


@pytest.mark.parametrize(
    ("returns", "answer"),
    [
        ("none", "force 'wrong' \\(Wrong\\) returned None; it returns dL/dx of the samples at 'exit', a tensor of their shape \\(2, 16, 3, 6, 6\\)"),
        ("scalar", "returned a tensor of shape \\(\\);"),
        ("rows", "returned a tensor of shape \\(1, 16, 3, 6, 6\\);"),
        ("number", "returned float;"),
        ("nan", "force 'wrong' \\(Wrong\\) returned values that are not finite, at its first call"),
    ],
)
def test_a_force_that_returns_no_force_is_named(tmp_path, returns, answer):
    recipe = SMALL.recipe("wrong", SMALL.stage("s", 1, (Wrong(returns=returns),), ()))
    with pytest.raises(ValueError, match=answer):
        train(recipe, WanFamily(tiny_wan_pipeline(), SIZE), out=tmp_path / "run", prompts=PROMPTS)


def test_a_later_force_that_is_not_finite_costs_a_step_not_the_run():
    """At its first call it is a bug; later, one bad batch, which is skipped and counted as before."""
    from instep.methods.term import raise_unless
    from instep.training.step import checked_force

    class Point:
        x = torch.zeros(1)

    class Samples:
        def point(self, on):
            return Point

    view = type("View", (), {"samples": Samples(), "progress": 0.5, "epoch": 0, "require": staticmethod(raise_unless)})()
    force = Wrong(returns="nan")
    assert bool(checked_force(force, view).isnan().all())
    view.progress = 0
    with pytest.raises(ValueError, match="not finite"):
        checked_force(force, view)


def test_parts_of_a_stage():
    assert SMALL.stage("s", 1, [Wrong()], [SMALL.critic()]) == SMALL.stage("s", 1, (Wrong(),), (SMALL.critic(),)), "a list is taken"
    for terms, answer in (
        ((Wrong(on="middle"),), "on: 'middle' of 'wrong' in stage 's' is not allowed; allowed: exit, final"),
        (Wrong(), "terms: Wrong is not allowed in stage 's'; it is a tuple"),
        ((Wrong,), "terms: the class Wrong is not allowed in stage 's'; a Force or an Objective is"),
        ((brightness,), "terms: <function brightness"),
    ):
        with pytest.raises(ValueError, match=answer):
            Stage("s", 1, 2, terms, rollout=dmd2().stages[0].rollout)
    with pytest.raises(ValueError, match="on: 'middle' of 'FakeScoreLoss'"):
        SMALL.stage("s", 1, (Wrong(),), (replace(SMALL.critic(), on="middle"),))
    with pytest.raises(ValueError, match="critics: .* a Critic is"):
        SMALL.stage("s", 1, (), (Regression(),))


def test_options_of_another_type():
    for name, value in (("steps", "4"), ("batch", 2.5), ("critic_updates", True)):
        with pytest.raises(ValueError, match=f"{name}: {value!r} is not allowed; it is a whole number"):
            Common(**{name: value})


def test_a_pipeline_in_place_of_a_family(tmp_path, monkeypatch):
    pipe = tiny_wan_pipeline()
    family = as_family(pipe)
    weight = pipe.transformer.patch_embedding.weight
    assert isinstance(family, WanFamily) and family.pipe.transformer.patch_embedding.weight.data_ptr() == weight.data_ptr() and family.size == Size()
    assert as_family(folder_of("digits")).name == "digits" and as_family(family) is family
    for wrong, answer in (
        (None, "None"),
        (WanFamily, "call it, WanFamily\\(pipe"),
        (3, "3 is not allowed; give a diff"),
        (pipe.vae, "AutoencoderKL"),
    ):
        with pytest.raises(ValueError, match=f"family: .*{answer}"):
            as_family(wrong)
    unknown = type("OtherPipeline", (type(pipe).__mro__[-1],), {})()
    with pytest.raises(ValueError, match="family: "):
        as_family(unknown)


def test_mistakes_that_are_taken_train(tmp_path):
    """A pipeline, a function, a generator, a tuple and a callable object at once."""
    family = instep.family_of(tiny_wan_pipeline(), (48, 48, 9))
    recipe = dm_align_group(SMALL, distil=0, iterations=1, group=2)
    run = train(lambda: recipe, family, out=tmp_path / "run", prompts=(p for p in PROMPTS), reward=Called(), options=RunOptions(probe_every=5))
    record = json.loads((run.out / "recipe.json").read_text())
    assert run.state.step == 1 and record["prompt_count"] == 2 and record["reward"] == "called"


def test_train_takes_what_its_signature_says():
    assert list(inspect.signature(instep.train).parameters)[:4] == ["recipe", "family", "out", "prompts"]
