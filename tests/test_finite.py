"""Nothing that is not finite leaves: no checkpoint of a run, no export of it, and no export in a dtype that cannot hold it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fast import slow_but
from safetensors.torch import load_file
from test_export_size import SIZE, exported, student_of
from test_run import PROMPTS, brightness, family, rows
from tiny import tiny_cogvideox_pipeline, tiny_wan_pipeline

from instep.cli.main import main
from instep.core.unusable import Unusable
from instep.data.prompt import Prompt
from instep.diffusion.sampling import Sampling
from instep.export.limits import check_differences
from instep.export.rules import check_target
from instep.methods.role_config import AdamWConfig
from instep.models.families import family_of
from instep.models.wan import WanFamily
from instep.recipes.common import Common
from instep.recipes.dm_align import dm_align_group
from instep.recipes.dmd import dmd2
from instep.training import checkpoint
from instep.training import loop as loop_module
from instep.training.finish import export_role
from instep.training.finite import SKIPPED, SkippedSteps
from instep.training.options import RunOptions
from instep.training.run import train

SHORT = Common(steps=2, batch=4, critic_updates=1)
EVERY = RunOptions(save_every=1, probe_every=2)
MANY = Sampling((1.0, 0.5), "ode", 3.0)


def steps(out: Path) -> list[int]:
    return sorted(checkpoint.step_of(path) for path in checkpoint.every(out / "checkpoints"))


def all_finite(out: Path) -> bool:
    return all(bool(x.isfinite().all()) for file in out.rglob("*.safetensors") for x in load_file(file).values() if x.is_floating_point())


# --------------------------------------------------------------------------------------------------------------- export


def loud_pipeline():
    """Weights that float16 cannot hold, of the transformer and of the text encoder."""
    pipe = tiny_wan_pipeline()
    with torch.no_grad():
        pipe.transformer.blocks[0].ffn.net[0].proj.weight[0, 0] = 1e5
        pipe.text_encoder.shared.weight[5, 0] = 1e5
    return pipe


@pytest.mark.parametrize("sampling", [None, MANY])
def test_weights_beyond_float16_are_refused_by_name(tmp_path, sampling):
    role = student_of(WanFamily(loud_pipeline(), SIZE), False)
    before = {"keep": exported(role, tmp_path / "student", sampling=sampling).size_bytes}
    with pytest.raises(Unusable) as error:
        exported(role, tmp_path / "student", torch.float16, sampling)
    assert "dtype: float16 cannot hold" in str(error.value) and "--dtype bfloat16" in str(error.value)
    assert "transformer.blocks.0.ffn.net.0.proj.weight" in str(error.value) and "text_encoder.shared.weight" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["student"], "nothing partial beside the earlier export"
    assert before["keep"] == sum(path.stat().st_size for path in (tmp_path / "student").rglob("*") if path.is_file())
    with pytest.raises(Unusable):
        exported(role, tmp_path / "other", torch.float16, sampling)
    assert not (tmp_path / "other").exists()
    report = exported(role, tmp_path / "bfloat16", torch.bfloat16, sampling)
    assert all_finite(report.folder)


@pytest.mark.parametrize("sampling", [None, MANY])
def test_activations_beyond_float16_are_refused(tmp_path, sampling):
    """All weights fit; a product of them does not."""
    pipe = tiny_wan_pipeline()
    with torch.no_grad():
        feed_forward = pipe.transformer.blocks[0].ffn.net
        feed_forward[0].proj.weight.mul_(3e4)
        feed_forward[2].weight.mul_(1 / 3e4)
    role = student_of(WanFamily(pipe, SIZE), False)
    with pytest.raises(Unusable, match="stock diffusers on the exported folder, in float16, hold values that are not finite.*--dtype bfloat16"):
        exported(role, tmp_path / "float16", torch.float16, sampling)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, lora, value):
    role = student_of(WanFamily(tiny_wan_pipeline(), SIZE), lora)
    name, p = next((name, p) for name, p in role.named_parameters().items() if "to_q" in name)
    p.data[0, 0] = value
    for sampling in (None, MANY):
        with pytest.raises(Unusable, match="^weights: transformer.*to_q.weight hold|^samples: those of the student in memory"):
            exported(role, tmp_path / "student", sampling=sampling)
    assert not list(tmp_path.iterdir()), name


@pytest.mark.parametrize("lora", [False, True])
def test_a_folder_that_samples_otherwise_is_refused(tmp_path, monkeypatch, lora):
    """What is written is not the student: one weight is another."""
    from instep.models import adapters

    role, real = student_of(WanFamily(tiny_wan_pipeline(), SIZE), lora), adapters.Weight.value

    def other(self, dtype=None):
        value = real(self, dtype)
        return value.flip(0) if value.shape == (32, 16) else value

    monkeypatch.setattr(adapters.Weight, "value", other)
    with pytest.raises(Unusable, match=r"stock diffusers on the exported folder differs from the student in memory by [\d.e-]+, and 0.00\d+ is allowed"):
        exported(role, tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_limits_are_relative_and_a_nan_does_not_pass():
    kinds = {"stored": torch.float32, "memory": torch.float32}
    check_differences(9e-4, 9e-4, 0.1, **kinds)
    check_differences(9e-3, 9e-3, 10.0, **kinds)
    for sampler, student in ((2e-3, 0.0), (0.0, 2e-3), (float("nan"), 0.0), (0.0, float("nan"))):
        with pytest.raises(Unusable, match="differs from"):
            check_differences(sampler, student, 1.0, **kinds)
    check_differences(0.0, 1e-2, 1.0, stored=torch.float16, memory=torch.float32)
    with pytest.raises(Unusable):
        check_differences(1e-2, 0.0, 1.0, stored=torch.bfloat16, memory=torch.float32)


def test_the_command_ends_with_status_1(tmp_path, capsys):
    loud_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    run = ["--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.txt"), "--size", "48", "48", "9", "--batch", "4", "--steps", "2"]
    assert main(["train", "dmd2", *run, "--iterations", "1", "--critic-updates", "1", "--out", str(tmp_path / "run"), "--no-evaluate"]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "half"), "--dtype", "float16"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: dtype: float16 cannot hold") and shown.count("\n") == 1 and not (tmp_path / "half").exists()
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "model")]) == 2, "an option is wrong"


# ------------------------------------------------------------------------------------------------- refused before step 1


def begin(out: Path, fam=None, recipe=None) -> None:
    train(recipe or dmd2(SHORT, iterations=1), fam or family(), out=out, prompts=PROMPTS, options=EVERY)


def test_an_export_that_would_be_refused_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module, "iteration", lambda *args: pytest.fail("a step was taken"))
    (tmp_path / "run" / "student").mkdir(parents=True)
    (tmp_path / "run" / "student" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="run/student exists and was not written by instep"):
        begin(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written, because .*file is not a folder"):
        begin(tmp_path / "file" / "run")
    with pytest.raises(ValueError, match="cannot be represented"):
        begin(tmp_path / "levels", recipe=replace(dmd2(SHORT, iterations=1), levels=(1.0, 0.9, 0.7, 0.2)))


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    import os

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match=f"cannot be written, because {tmp_path} cannot be written to"):
        check_target(tmp_path / "a" / "student")
    with pytest.raises(ValueError, match="has 1 to"):
        check_target(tmp_path / ("x" * 250))


def test_adapters_that_could_not_be_exported_are_refused_before_the_first_step(tmp_path, monkeypatch):
    """Those on layers that have no name in the file."""
    monkeypatch.setattr(loop_module, "iteration", lambda *args: pytest.fail("a step was taken"))
    odd = family()
    odd.lora_targets = ("patch_embedding",)
    with pytest.raises(ValueError, match="'patch_embedding' has no name in ComfyUI"):
        begin(tmp_path / "odd", odd, dmd2(replace(SHORT, lora_rank=2), iterations=1))


@pytest.mark.parametrize("where", ["transformer", "vae", "text_encoder"])
def test_a_model_that_is_not_finite_is_refused_before_the_first_step(tmp_path, where):
    pipe = tiny_wan_pipeline()
    name, p = next((key, p) for key, p in getattr(pipe, where).named_parameters() if p.ndim >= 2)
    with torch.no_grad():
        p[0, 0] = float("nan")
    with pytest.raises(Unusable, match=f"model: its weights {where}.{name}"):
        begin(tmp_path / "run", WanFamily(pipe, SIZE, name="tiny"))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("lr", "rank"), slow_but([(1e4, 2), (1e20, None)], [(1.0, None), (1e4, 2), (1e20, None), (1e38, 2)]))
def test_a_learning_rate_far_too_high(tmp_path, lr, rank):
    """It ends with an error or with a student whose weights and samples are finite; another run begins from what was kept."""
    recipe = dmd2(replace(SHORT, student=AdamWConfig(lr), lora_rank=rank), iterations=8)
    out = tmp_path / "run"
    try:
        train(recipe, family(), out=out, prompts=PROMPTS, options=EVERY)
        assert lr < 1e20 and (out / "student" / "model_index.json").is_file()
    except Unusable as error:
        assert not (out / "student").exists() and str(error).startswith(("run: ", "samples: "))
    assert all_finite(out / "checkpoints") and (not (out / "student").exists() or all_finite(out / "student"))


@pytest.fixture
def poisoned(monkeypatch):
    """`poisoned(step, act)`: `act(state)` before the iteration that begins at `step`."""

    def patch(step, act):
        real = loop_module.iteration

        def iteration(state, *args):
            if state.step == step:
                act(state)
            return real(state, *args)

        monkeypatch.setattr(loop_module, "iteration", iteration)

    return patch


def weight(state):
    next(iter(state.trained["student"].parameters.values())).data.flatten()[0] = float("nan")


def unused_weight(state):
    """The fake of a shared step: nothing of the student's samples shows it before the fake is used."""
    next(iter(state.trained["fake"].parameters.values())).data.flatten()[0] = float("inf")


def average(state):
    next(iter(state.trained["student"].ema.values())).flatten()[0] = float("inf")


def moment(state):
    """Of a parameter that is not zero there: its weight follows with the next step."""
    optimizer = state.trained["fake"].optimizer
    next(iter(optimizer.state.values()))["exp_avg_sq"].flatten()[0] = float("inf")


def gradient(state):
    next(iter(state.trained["student"].parameters.values())).register_hook(lambda g: g * float("nan"))


@pytest.mark.parametrize(
    ("act", "what"),
    slow_but(
        [(unused_weight, "not finite"), (moment, "optim/fake/.*exp_avg_sq hold values")],
        [(weight, "not finite"), (unused_weight, "not finite"), (average, "ema/student/.* hold values"), (moment, "optim/fake/.*exp_avg_sq hold values")],
    ),
)
def test_weights_averages_and_moments_that_are_not_finite_end_a_run(tmp_path, poisoned, act, what):
    poisoned(3, act)
    out = tmp_path / "run"
    with pytest.raises(Unusable, match=f"run: .*{what}.*step-00000[23] is its newest good checkpoint"):
        train(dmd2(SHORT, iterations=40), family(), out=out, prompts=PROMPTS, options=RunOptions(save_every=1, probe_every=50))
    assert set(steps(out)) <= {1, 2, 3} and all_finite(out / "checkpoints") and not (out / "student").exists()


def test_steps_that_are_skipped_in_a_row_end_a_run_and_leave_what_was_before(tmp_path, poisoned):
    poisoned(4, gradient)
    out = tmp_path / "run"
    go = lambda: train(dmd2(SHORT, iterations=40), family(), out=out, prompts=PROMPTS, options=RunOptions(save_every=3, probe_every=50))  # noqa: E731
    with pytest.raises(Unusable, match=f"gradient of the student was not finite in {SKIPPED} iterations in a row at step {4 + SKIPPED}, and the run ends"):
        go()
    assert [row["step"] for row in rows(out)][-1] == 4 + SKIPPED and steps(out) == [3]
    assert all_finite(out / "checkpoints") and not (out / "student").exists()
    assert any(json.loads(line)["flag"] == "nonfinite" for line in (out / "health.jsonl").read_text().splitlines())


def test_a_skipped_step_now_and_then_ends_nothing():
    seen = SkippedSteps({"step": step, "grad/student/skipped": float(step % SKIPPED != 0)} for step in range(1, 50))
    assert seen.too_many() is None and seen.bad_from(49) == 40
    seen.row(50, {"grad/student/skipped": 0.0, "grad/fake/skipped": 1.0})
    assert seen.bad_from(50) == 49
    for step in range(51, 50 + SKIPPED):
        assert seen.too_many() is None or step == 49 + SKIPPED
        seen.row(step, {"grad/student/skipped": 0.0, "grad/fake/skipped": 1.0})
    assert "fake" in seen.too_many()


def test_samples_that_are_not_finite_end_a_run_and_the_reward_is_not_blamed(tmp_path, poisoned):
    """Weights of 1e38 are finite; what they draw is not."""

    def loud(state):
        for p in state.trained["student"].parameters.values():
            p.data.mul_(1e38)

    poisoned(1, loud)
    out = tmp_path / "run"
    recipe = dm_align_group(SHORT, distil=0, iterations=6, group=2, top_n=1)
    with pytest.raises(Unusable, match="the student's samples hold values that are not finite.*step-000001|not finite.*no good checkpoint"):
        train(recipe, family(), out=out, prompts=PROMPTS, reward=brightness, options=EVERY)
    assert set(steps(out)) <= {1} and not (out / "student").exists()


@pytest.mark.parametrize("rewarded", [False, True])
def test_a_probe_of_samples_that_are_not_finite_ends_a_run(tmp_path, poisoned, rewarded):
    """The average is far too large beside weights that are not: only the probe samples it. A reward that cannot score such samples is not blamed."""

    def loud(state):
        for p in state.trained["student"].ema.values():
            p.mul_(1e30)

    poisoned(1, loud)
    out = tmp_path / "run"
    recipe = dm_align_group(SHORT, distil=0, iterations=6, group=2, top_n=1) if rewarded else dmd2(SHORT, iterations=6)
    with pytest.raises(Unusable, match="samples hold values that are not finite.* at step 2, and the run ends; .*step-000001 is its newest good"):
        train(recipe, family(), out=out, prompts=PROMPTS, reward=brightness if rewarded else None, options=EVERY)
    assert steps(out) == [1]


def test_a_reward_that_is_not_finite_ends_a_run(tmp_path):
    calls = []

    def reward(media, prompts):
        calls.append(1)
        return torch.full((len(media),), torch.inf) if len(calls) > 7 else media.mean((1, 2, 3, 4))

    out = tmp_path / "run"
    with pytest.raises(ValueError, match="reward 'reward' returned inf"):
        train(dm_align_group(SHORT, distil=1, iterations=4, group=2, top_n=1), family(), out=out, prompts=PROMPTS, reward=reward, options=EVERY)
    assert steps(out) and all_finite(out / "checkpoints") and not (out / "student").exists()


def test_another_run_begins_from_the_newest_good_checkpoint(tmp_path, poisoned):
    """The learning rate belongs to a run, so the same folder refuses another one; the way that the error names is open."""
    poisoned(3, weight)
    recipe = dmd2(replace(SHORT, student=AdamWConfig(1e-3)), iterations=6)
    with pytest.raises(Unusable, match="--start-from .*run --out NEW --student.lr LOWER") as error:
        train(recipe, family(), out=tmp_path / "run", prompts=PROMPTS, options=EVERY)
    assert "goes on from there" in str(error.value)
    lower = dmd2(replace(SHORT, student=AdamWConfig(1e-5)), iterations=2)
    with pytest.raises(ValueError, match="holds another run"):
        train(lower, family(), out=tmp_path / "run", prompts=PROMPTS, options=EVERY)
    run = train(lower, family(), out=tmp_path / "new", prompts=PROMPTS, options=EVERY, start_from=tmp_path / "run")
    assert run.state.step == 2 and all_finite(run.out)


def test_a_checkpoint_that_is_not_finite_is_not_begun_from(tmp_path):
    """Checkpoints of earlier versions may be."""
    out = tmp_path / "run"
    train(dmd2(SHORT, iterations=2), family(), out=out, prompts=PROMPTS, options=EVERY)
    newest = checkpoint.latest(out / "checkpoints")
    state = checkpoint.load(newest)
    next(iter(state["ema"]["student"].values())).flatten()[0] = float("inf")
    checkpoint.save(out / "checkpoints", 2, state, keep=2)
    with pytest.raises(Unusable, match="ema/student/.* hold values that are not finite"):
        train(dmd2(SHORT, iterations=2), family(), out=tmp_path / "new", prompts=PROMPTS, options=EVERY, start_from=out)


def test_other_families_and_recipes_export_what_is_finite(tmp_path):
    fam = family_of(tiny_cogvideox_pipeline(), (32, 32, 9), "tiny")
    role = student_of(fam, False)
    about = {"recipe": "dmd2", "seed": 0, "prompts": 1, "example": Prompt("a seven"), "command": "instep"}
    report = export_role(role, fam, MANY, tmp_path / "many", dtype=torch.bfloat16, **about)
    assert all_finite(report.folder)
    next(iter(role.named_parameters().values())).data.flatten()[0] = float("nan")
    with pytest.raises(Unusable, match="^weights: transformer"):
        export_role(role, fam, MANY, tmp_path / "other", **about)
