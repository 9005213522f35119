"""Published settings of a model are the defaults on it: in the library, on the command line, in its help and in the table of `instep recipes`."""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from tiny import tiny_cogvideox_pipeline, tiny_sd3_pipeline, tiny_wan22_pipeline, tiny_wan_i2v_pipeline, tiny_wan_pipeline

from instep.bundled import WORLDS, find, folder_of, settings_of
from instep.cli.main import main
from instep.diffusion.levels import few_step_levels
from instep.methods.recipe import Recipe
from instep.methods.role_config import AdamWConfig
from instep.models import load
from instep.models.preset import Distillation, ModelSettings, Preset
from instep.recipes.common import Common
from instep.recipes.defaults import chosen_options, flat, with_settings
from instep.recipes.dm_align import dm_align_group
from instep.recipes.dmd import dmd2
from instep.recipes.many_step import ManySteps, flow_grpo
from instep.training.run import train

WARPED, EVEN = (1.0, 0.9375, 0.8333333, 0.625), (1.0, 0.75, 0.5, 0.25)
# what is not published is the library's; of the optimisers lr, betas and weight decay
LIBRARY = {"student": (2e-4, (0.0, 0.999), 0.0), "fake": (4e-4, (0.0, 0.999), 0.0), "ema": 0.95, "batch": 32, "rank": None}
WAN = {"levels": WARPED, "shift": 5.0, "student": (2e-6, (0.0, 0.999), 0.01), "fake": (4e-7, (0.0, 0.999), 0.01), "batch": 64}
SD3 = {"levels": (1.0, 0.9, 0.75, 0.5), "shift": 3.0}
DMDR = {"student": (1e-6, (0.9, 0.999), 0.01), "rank": 64}
SIT = {"student": (2e-5, (0.9, 0.999), 0.0), "fake": (2e-5, (0.9, 0.999), 0.0), "batch": 512}
# as published, written here once more
EXPECTED = {
    "wan": LIBRARY | WAN | {"guidance": (4.0, None), "ema": 0.99},
    "wan22": LIBRARY | WAN | {"guidance": (5.0, 4.0), "ema": 0.99},
    "wan-i2v": LIBRARY | WAN | {"guidance": (4.0, None)},
    "sd3": LIBRARY | SD3 | DMDR | {"guidance": (7.0, None), "fake": (5e-7, (0.9, 0.999), 0.0), "batch": 192},
    "sd35-large": LIBRARY | DMDR | {"guidance": (4.0, None), "levels": WARPED, "shift": 5.0, "fake": (2e-8, (0.9, 0.999), 0.0), "batch": 96},
    "sd35-medium": LIBRARY | SD3 | {"guidance": (4.5, None)},
    "cogvideox": LIBRARY | {"guidance": (4.5, None), "levels": EVEN, "shift": 1.0, "student": (2e-5, (0.0, 0.999), 0.0), "batch": 8},
    "dit": LIBRARY | SIT | {"guidance": (1.0, None), "levels": (1.0,), "shift": 1.0},
}
# guidance and timestep shift of the model's own sampler
SAMPLED = {
    "wan": (5, 3),
    "wan22": (4, 3),
    "wan-i2v": (5, 3),
    "sd3": (7, 3),
    "sd35-large": (3.5, 3),
    "sd35-medium": (4.5, 3),
    "cogvideox": (6, 1),
    "dit": (1.5, 1),
}
PIPELINES = {
    "wan": tiny_wan_pipeline,
    "wan22": tiny_wan22_pipeline,
    "wan-i2v": tiny_wan_i2v_pipeline,
    "sd3": tiny_sd3_pipeline,
    "sd35-medium": functools.partial(tiny_sd3_pipeline, dual=True),
    "cogvideox": tiny_cogvideox_pipeline,
}


def without_weights(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.unlink()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Model folders without weights: whatever reads settings from them reads JSON alone."""
    root = tmp_path_factory.mktemp("models")
    for name, pipeline in PIPELINES.items():
        pipeline().save_pretrained(root / name)
    shutil.copytree(root / "sd35-medium", root / "sd35-large")
    config = root / "sd35-large" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dual_attention_layers": []}))
    shutil.copytree(folder_of("digits"), root / "dit")
    without_weights(root)
    return {name: root / name for name in EXPECTED}


def values(recipe: Recipe) -> dict:
    """What a recipe without stages of its own makes of the shared options, in the form of `EXPECTED`."""
    student, fake, (stage,) = recipe.roles["student"], recipe.roles["fake"], recipe.stages
    (force,) = stage.terms
    assert stage.batch <= 32, "no micro-batch is larger than the library's"
    assert (force.guidance, force.guidance_2) == (recipe.guidance, recipe.guidance_2) and stage.critics[0].updates == 5
    return {
        "guidance": (recipe.guidance, recipe.guidance_2),
        "levels": recipe.levels,
        "shift": force.levels.shift,
        "student": (student.optim.lr, student.optim.betas, student.optim.weight_decay),
        "fake": (fake.optim.lr, fake.optim.betas, fake.optim.weight_decay),
        "ema": student.ema,
        "batch": stage.batch * stage.accumulate,
        "rank": None if student.lora is None else student.lora.rank,
    }


class Seen(Exception):
    """Raised in place of a run, with its recipe."""


def trained(monkeypatch, recipe, family) -> Recipe:
    """The recipe that `train` takes."""

    def stop(recipe, *others, **named):
        raise Seen(recipe)

    monkeypatch.setattr("instep.training.run.check_inputs", stop)
    with pytest.raises(Seen) as seen:
        train(recipe, family, out="nowhere", prompts=["a cat"])
    return seen.value.args[0]


def commanded(monkeypatch, *line: object) -> Recipe:
    """The recipe that a command line asks for."""
    seen: list[Recipe] = []

    def keep(recipe, *others) -> int:
        seen.append(recipe)
        return 0

    for command in ("train", "plan"):
        monkeypatch.setattr(f"instep.cli.{command}.{command}_command", keep)
    assert main([str(word) for word in line]) == 0
    return seen[0]


def table(capsys, monkeypatch, model: object) -> tuple[str, dict[str, list[tuple[str, str]]]]:
    """What `instep recipes --model` prints, without line breaks inside cells, and value and origin of each option in its tables."""
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["recipes", "--model", str(model)]) == 0
    out = capsys.readouterr().out
    rows: dict[str, list[tuple[str, str]]] = {}
    for name, value, origin in re.findall(r"│ --(\S+) +│ (.*?) +│ (model|library) +│", out):
        rows.setdefault(name, []).append((value, origin))
    return out, rows


# ------------------------------------------------------------------------------------------------- the command line and the library


@pytest.mark.parametrize("name", EXPECTED)
def test_the_settings_of_a_model_reach_the_recipe_from_the_command_line(name, folders, monkeypatch):
    for command in ("train", "plan"):
        assert values(commanded(monkeypatch, command, "dmd2", "--model", folders[name])) == EXPECTED[name], command
    assert values(commanded(monkeypatch, "train", "dmd2", f"--model={folders[name]}")) == EXPECTED[name]


@pytest.mark.parametrize("name", [*PIPELINES, "dit"])
def test_they_reach_it_in_the_library(name, folders, monkeypatch):
    given = load(folder_of("digits"), name="mine") if name == "dit" else PIPELINES[name]()
    assert values(trained(monkeypatch, dmd2, given)) == EXPECTED[name]
    assert values(trained(monkeypatch, functools.partial(dmd2, iterations=3), given)) == EXPECTED[name]
    assert trained(monkeypatch, dm_align_group, given).stages[-1].group == 4
    many = trained(monkeypatch, flow_grpo, given)
    assert (many.guidance, many.levels) == (SAMPLED[name][0], few_step_levels(10, SAMPLED[name][1]))
    assert many.roles["student"].optim == AdamWConfig(1e-4), "the rates of a distillation are not those of reinforcement learning"


@pytest.mark.parametrize("name", EXPECTED)
def test_a_many_step_recipe_takes_those_of_the_sampler(name, folders, monkeypatch):
    recipe = commanded(monkeypatch, "train", "flow-dpo", "--model", folders[name])
    assert (recipe.guidance, recipe.levels) == (SAMPLED[name][0], few_step_levels(10, SAMPLED[name][1]))


def test_a_published_size_is_planned_with_the_settings_of_its_model(monkeypatch):
    assert values(commanded(monkeypatch, "plan", "dmd2", "--model", "14B")) == EXPECTED["wan"]


def test_a_given_option_wins(folders, monkeypatch):
    own = [
        "--steps",
        "2",
        "--shift",
        "3",
        "--student.lr",
        "1e-3",
        "--guidance",
        "1.5",
        "--ema",
        "None",
        "--lora-rank",
        "None",
        "--batch",
        "4",
        "--accumulate",
        "1",
    ]
    recipe = commanded(monkeypatch, "train", "dmd2", *own, "--model", folders["sd3"])
    changed = {"levels": (1.0, 0.75), "guidance": (1.5, None), "student": (1e-3, (0.9, 0.999), 0.01), "ema": None, "rank": None, "batch": 4}
    assert values(recipe) == EXPECTED["sd3"] | changed, "what is not given stays the model's"
    assert commanded(monkeypatch, "train", "dmd2", "--model", folders["wan"], "--model", "digits") == dmd2(), "the last model counts, as for every option"


def test_a_recipe_is_taken_as_it_is(monkeypatch):
    pipe = tiny_wan_pipeline()
    assert trained(monkeypatch, dmd2(), pipe) == dmd2()
    given = functools.partial(dmd2, common=Common(steps=2))
    assert trained(monkeypatch, given, pipe) == dmd2(Common(steps=2)), "its caller has chosen the options"
    fixed = dmd2(Common(steps=1))
    assert trained(monkeypatch, lambda: fixed, pipe) == fixed


def one_step(common: Common = Common(steps=1, student=AdamWConfig(1e-3), batch=4)) -> Recipe:
    """A recipe with some defaults of its own."""
    return common.recipe("one-step", common.distil(1))


def test_the_defaults_that_a_recipe_sets_apart_stay(folders, monkeypatch):
    own = {"levels": (1.0,), "student": (1e-3, (0.0, 0.999), 0.01), "batch": 4}
    assert values(trained(monkeypatch, one_step, tiny_wan_pipeline())) == EXPECTED["wan"] | own
    monkeypatch.setitem(sys.modules, "of_ones_own", sys.modules[__name__])
    assert values(commanded(monkeypatch, "train", "of_ones_own:one_step", "--model", folders["wan"])) == EXPECTED["wan"] | own


# --------------------------------------------------------------------------------------------------------------------- bundled models


def test_words_are_distilled_into_the_steps_that_leave_room(monkeypatch):
    words = Common(steps=2, guidance=3.0, batch=16)
    assert commanded(monkeypatch, "train", "dmd2", "--model", "moving-words") == trained(monkeypatch, dmd2, find("moving-words").load(None)) == dmd2(words)
    assert commanded(monkeypatch, "train", "dmd2", "--model", "moving-words", "--steps", "4").levels == dmd2(Common(steps=4)).levels


@pytest.mark.parametrize("name", [name for name in WORLDS if not find(name).preset.for_recipes])
def test_a_bundled_model_keeps_the_defaults_of_the_library(name, monkeypatch):
    for common in (Common(), ManySteps()):
        assert with_settings(common, settings_of(name)) == common
    assert commanded(monkeypatch, "train", "dmd2", "--model", name) == commanded(monkeypatch, "train", "dmd2") == dmd2()
    assert commanded(monkeypatch, "train", "flow-grpo", "--model", name) == flow_grpo()
    assert trained(monkeypatch, dmd2, find(name).load(None)) == dmd2()


def test_so_does_what_was_made_from_one(tmp_path, monkeypatch):
    shutil.copytree(folder_of("moving-digits"), tmp_path / "tuned")
    assert commanded(monkeypatch, "train", "dmd2", "--model", tmp_path / "tuned") != dmd2()
    (tmp_path / "tuned" / "instep_export.json").write_text(json.dumps({"sampler": "ode", "info": {"base_model": "moving-digits"}}))
    assert commanded(monkeypatch, "train", "dmd2", "--model", tmp_path / "tuned") == dmd2()


# ------------------------------------------------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize("command", ["train", "plan"])
def test_help_shows_them(command, folders, capsys):
    def helped(*line: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main([command, "dmd2", *line, "--help"])
        assert stop.value.code == 0
        return re.sub(r"[\s│]+", " ", capsys.readouterr().out)

    def defaults(text: str) -> tuple[str, ...]:
        return tuple(re.search(rf"--{option} .*?\(default: (.*?)\)", text)[1] for option in ("guidance", "shift", "student.lr", "ema", "accumulate"))

    assert defaults(helped("--model", str(folders["wan"]))) == ("4.0", "5.0", "2e-06", "0.99", "2")
    assert defaults(helped()) == defaults(helped("--model", "digits")) == ("3.0", "3.0", "0.0002", "0.95", "1")


def test_the_table_of_a_model(folders, capsys, monkeypatch):
    out, rows = table(capsys, monkeypatch, folders["wan"])
    assert "configs/self_forcing_14b_dmd.yaml" in out and "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in out
    assert re.search(r"sampling: sampler_steps +│ 50 ", out) and re.search(r"sampling: shift +│ 3.0 +│ the model's scheduler", out)
    assert re.search(r"distillation: levels +│ 1.0, 0.9375, 0.8333333, 0.625 ", out) and re.search(r"micro_batch +│ 1 ", out)
    assert rows["guidance"] == [("4.0", "model"), ("5.0", "model")], "of few-step and of many-step recipes"
    assert rows["student.lr"] == [("2e-06", "model"), ("0.0001", "library")] and rows["accumulate"] == [("2", "model"), ("1", "library")]
    assert rows["fake.clip"] == [("10.0", "library")] and rows["steps"] == [("4", "model"), ("10", "library")]
    assert rows.keys() == {name.replace("_", "-") for name in flat(Common())}, "every shared option has its row"
    assert "dm-align-group" in out and "flow-grpo" in out, "the recipes that have them"
    assert "not published: 1 for a model above a billion parameters" in table(capsys, monkeypatch, folders["sd35-medium"])[0]


@pytest.mark.parametrize("name", [name for name in WORLDS if not find(name).preset.for_recipes])
def test_the_table_of_a_bundled_model(name, capsys, monkeypatch):
    out, rows = table(capsys, monkeypatch, name)
    assert "the bundled models of instep" in out and "distillation:" not in out
    assert {origin for cells in rows.values() for _, origin in cells} == {"library"}
    assert rows["student.lr"] == [("0.0002", "library"), ("0.0001", "library")]


def test_the_table_of_words_names_what_is_its_own(capsys, monkeypatch):
    out, rows = table(capsys, monkeypatch, "moving-words")
    assert "docs/moving_words.md" in out and "distillation: guidance" in out
    assert rows["steps"] == [("2", "model"), ("10", "library")] and rows["guidance"] == [("3.0", "model"), ("4.0", "model")]


def test_every_value_has_a_source(folders):
    for name in EXPECTED:
        preset = settings_of(folders[name]).preset
        for source in (preset.source, preset.distillation and preset.distillation.source):
            assert source is None or re.search(r"model card|github\.com|arXiv", source), name
        assert preset.micro_batch, f"{name}: published, or 1 for a large model"


# ----------------------------------------------------------------------------------------------------------------------- refusals


def test_a_pipeline_that_no_family_knows_is_refused(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "LTXPipeline"}))
    for line in (["train", "dmd2"], ["plan", "dmd2"], ["train", "dmd2", "--help"], ["recipes"]):
        assert main([*line, "--model", str(tmp_path)]) == 2
        assert "model: it is a LTXPipeline, which no family knows yet; allowed: WanPipeline," in capsys.readouterr().err, line


def test_what_is_no_model_gets_the_command_s_own_answer(tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\n")
    for line in (["train", "dmd2", "--prompts", str(prompts), "--out", str(tmp_path / "run")], ["recipes"]):
        assert main([*line, "--model", str(tmp_path)]) == 2
        assert "is not a model folder" in capsys.readouterr().err, line
    assert main(["plan", "dmd2", "--model", str(tmp_path)]) == 2
    assert "is not known (" in capsys.readouterr().err
    assert main(["train", "dmd2", "--model"]) == 2
    assert capsys.readouterr().err.startswith("error: --model: its value is missing")


def test_levels_that_steps_and_shift_do_not_give_are_refused():
    assert Distillation("a paper", levels=WARPED, shift=5.0).levels == few_step_levels(4, 5.0)
    with pytest.raises(ValueError, match=r"levels: \[1.0, 0.9, 0.5\] is not allowed with shift 3.0, which gives \[1.0, 0.8571429, 0.6\]"):
        Distillation("a paper", levels=(1.0, 0.9, 0.5), shift=3.0)
    with pytest.raises(ValueError, match="shift: None is not allowed beside levels"):
        Distillation("a paper", levels=EVEN)
    with pytest.raises(ValueError, match="is not a few-step list"):
        Distillation("a paper", levels=(0.5, 0.25), shift=1.0)


def test_the_function_itself():
    settings = ModelSettings(Preset("a card", 2.0, 30, distillation=Distillation("a paper", batch=7, student_lr=1e-5)), 4.0)
    common = with_settings(Common(), settings)
    assert (common.batch, common.accumulate, common.guidance, common.shift) == (1, 7, 2.0, 4.0)
    assert common.student == AdamWConfig(1e-5) and common.fake == Common().fake
    assert chosen_options(Common(), settings) == {"batch": 1, "accumulate": 7, "guidance": 2.0, "shift": 4.0, "student.lr": 1e-5}
    assert with_settings(Common(accumulate=3), settings).batch == 32, "a recipe's own batch is its whole product"
    assert with_settings(common, None) is common
