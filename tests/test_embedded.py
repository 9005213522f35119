"""The embedded default end to end: the bundled Wan is distilled through the command line, exported, loaded by stock diffusers, measured."""

from __future__ import annotations

import json

import pytest
import torch

from instep.bundled import MOVING_DIGITS, digits, folder_of, load
from instep.bundled.baselines import Baselines, noise_for
from instep.bundled.classifiers import load_classifier
from instep.bundled.evaluation import EvalSet
from instep.bundled.worlds import moving_digits
from instep.cli import evaluate
from instep.cli.evaluate import evaluation_of, sampler_of
from instep.cli.export import read_run, student_of
from instep.cli.main import main
from instep.diffusion.sampling import Sampling, sample_ode
from instep.methods.role_config import AdamWConfig
from instep.models.backbone import Backbone
from instep.recipes.apo import apo
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.recipes.many_step import ManySteps
from instep.training.build import Role
from instep.training.options import RunOptions
from instep.training.run import train

PROMPTS = digits.full_prompts()[::2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A 2-step student after 12 iterations."""
    out = tmp_path_factory.mktemp("runs") / "two-step"
    command = ["train", "dmd2", "--steps", "2", "--iterations", "12", "--batch", "16", "--out", str(out), "--threads", "1", "--no-evaluate"]
    assert main([*command, "--probe-every", "100"]) == 0
    return out


@torch.no_grad()
def right(media: torch.Tensor) -> float:
    """Share of videos with the right digit and motion, by the monitor."""
    return float(load_classifier("monitor").correct(media.clamp(0, 1), PROMPTS).both.float().mean())


@torch.no_grad()
def test_the_student_beats_naive_sampling_at_its_cost(run):
    family = load(MOVING_DIGITS)
    student = student_of(run, read_run(run), family)
    noise, _ = noise_for(family, PROMPTS, 0)
    teacher = Role("teacher", Backbone(family, family.pretrained))
    cond, null = family.encode(PROMPTS), family.unconditional(PROMPTS)
    naive = sample_ode(teacher, cond, null, noise, steps=2, path=family.path, shift=family.shift)
    assert right(sampler_of(student, family, Sampling((1.0, 0.75)))(PROMPTS, 0)) > right(family.decode(naive)) + 0.15


@torch.no_grad()
def test_stock_diffusers_draws_the_same_videos(run):
    """The exported folder, its own scheduler, text padded to 512 tokens, against our sampler on the student in memory."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(run / "student", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    family, names = load(MOVING_DIGITS), PROMPTS[:3]
    student = student_of(run, read_run(run), family)
    ours = sampler_of(student, family, Sampling((1.0, 0.75)))(names, 7).clamp(0, 1)
    noise, rng = noise_for(family, names, 7)
    torch.set_rng_state(rng.get_state())
    stock = pipe(list(names), height=48, width=48, num_frames=9, num_inference_steps=2, guidance_scale=1.0, latents=noise, output_type="pt").frames.transpose(
        1, 2
    )
    torch.testing.assert_close(stock, ours, rtol=0, atol=1e-4)
    card = (run / "student" / "README.md").read_text()
    assert "num_inference_steps=2" in card and "guidance_scale=1.0" in card


def test_sample_and_report_of_the_run(run, tmp_path, capsys):
    animation, page = tmp_path / "s.webp", tmp_path / "r.html"
    assert main(["sample", str(run), "--prompts", "a seven", "--copies", "2", "--out", str(animation)]) == 0
    assert animation.stat().st_size > 500
    assert main(["sample", str(run), "--prompts", "a seven", "--out", str(animation)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert main(["sample", str(run), "--steps", "4", "--out", str(tmp_path / "t.webp")]) == 2
    assert "steps: 4 does not fit" in capsys.readouterr().err
    assert main(["report", str(run), "-o", str(page)]) == 0
    assert "dmd2" in page.read_text(encoding="utf-8")


def test_bundled_files_are_those_of_the_pretraining():
    """At most 8 MB, safetensors only, and every checksum in pretrain.json holds."""
    import hashlib

    folder = folder_of(MOVING_DIGITS)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".txt", ".model"}
    about = json.loads((folder / "pretrain.json").read_text())
    for name, digest in about["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name


def fingerprint(eval_set, family):
    return Baselines(family, evaluation_of(MOVING_DIGITS), eval_set).fingerprint


@pytest.mark.slow
def test_a_student_of_a_tuned_teacher_is_measured_beside_that_teacher(tmp_path, monkeypatch):
    """The model is then an export of a run on the bundled one: its rows are its own, not those of the model that it was tuned from."""
    open_ = ("a seven", "a seven", "a digit moving left fast", "a digit moving left fast")
    bundled_one, small = moving_digits(), EvalSet(tuple(digits.full_prompts()[::15]), open_)
    monkeypatch.setattr("instep.bundled.evaluation.evaluation_set", lambda *args, **more: small)
    monkeypatch.setenv("INSTEP_CACHE", str(tmp_path / "cache"))
    options = RunOptions(probe_every=50, teacher_samples=4)
    tuned = apo(ManySteps(batch=2, student=AdamWConfig(1e-2), ema=None), online=0, half_online=0, offline=1, distill_guidance=0, post_distillation=0)
    first = train(tuned, bundled_one.family, out=tmp_path / "tuned", prompts=PROMPTS, pairs=bundled_one.pairs(4), options=options)
    teacher = load(str(first.student))
    assert fingerprint(small, teacher) != fingerprint(small, bundled_one.family)
    run = train(dmd2(Common(steps=1, batch=2), iterations=1), teacher, out=tmp_path / "few", prompts=PROMPTS, options=options)
    assert main(["eval", str(run.out)]) == 0
    said = {row["name"] for row in json.loads((run.out / "metrics.json").read_text())["rows"]}
    assert "teacher, 50 steps, guided" in said and all(file.name.startswith(fingerprint(small, teacher)) for file in (tmp_path / "cache").iterdir())
    (first.student / "instep_export.json").unlink()
    with pytest.raises(ValueError, match="was trained on 'student'; only moving-digits and moving-digits-i2v and moving-words and exports of runs"):
        evaluate.measure_run(run.out)
