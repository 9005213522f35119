"""Every family against stock diffusers, on tiny random pipelines: what the teacher predicts, how a run trains, resumes and exports, and its LoRA files."""

from __future__ import annotations

import pytest
import torch
from family_cases import CASES, Case, family, our_x0, pipeline_of, prompts_of, rebuilt, stock_x0
from test_run import interrupted_before, same
from torch import Tensor

from instep.export.verify import verify_export
from instep.recipes.dmd import dmd2
from instep.training import run as module
from instep.training.options import RunOptions
from instep.training.run import train

QUICK = RunOptions(save_every=1, probe_every=50)
ALL = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@pytest.fixture(autouse=True)
def few_teacher_steps(monkeypatch):
    monkeypatch.setattr(module, "TEACHER_STEPS", 2)


@ALL
def test_the_guided_teacher_takes_the_stock_pipelines_step(case: Case, tmp_path):
    """At three levels, with and without a negative prompt, to 1e-5 of the largest latent."""
    prompt, negative = prompts_of(case, tmp_path)[:2]
    x = torch.randn(1, *family(case).latent_shape, generator=torch.Generator().manual_seed(1))
    for level in case.levels:
        found = []
        for asked in (prompt, negative):
            ours, stock = our_x0(case, asked, x, level), stock_x0(case, asked, x, level)
            assert (ours - stock)[:, :, case.given :].abs().max() <= 1e-5 * stock.abs().max()
            found.append(ours)
        assert (found[0] - found[1])[:, :, case.given :].abs().max() > 1e-4, "the prompts differ"


def drawn(case: Case, pipe, prompts) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    return family(case).stock_sample(pipe, prompts[:2], steps=4, guidance=1.0, output="latent")


def check_export(case: Case, run, prompts, rank: int | None) -> None:
    """Stock diffusers draws from the folder, and from the LoRA on the base, what the library draws."""
    kind, levels = type(pipeline_of(case.name)), run.recipe.levels
    pipe = kind.from_pretrained(run.student, local_files_only=True)
    merged = drawn(case, pipe, prompts)
    scale = float(merged.abs().max())
    assert verify_export(run.student, levels, prompts=prompts[:2], size=case.size) <= 1e-6 * scale
    base = rebuilt(case.make() if rank else pipeline_of(case.name), scheduler=pipe.scheduler)
    assert (drawn(case, base, prompts) - merged).abs().max() > 1e-5 * scale, "it was trained"
    if rank is not None:
        for i, name in enumerate(case.loras):
            options = {"load_into_transformer_2": True} if i else {}
            base.load_lora_weights(str(run.student), weight_name=name, adapter_name=f"part{i}", **options)
        assert (drawn(case, base, prompts) - merged).abs().max() <= 1e-5 * scale


@ALL
def test_a_lora_student_is_sampled_by_stock_diffusers(case: Case, tmp_path):
    prompts = prompts_of(case, tmp_path)
    run = train(dmd2(case.common(4), iterations=1), family(case), out=tmp_path / "run", prompts=prompts, options=QUICK)
    check_export(case, run, prompts, 4)


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("rank", [None, 4], ids=["full", "LoRA"])
def test_a_student_killed_and_resumed_ends_the_same(case: Case, rank, tmp_path):
    recipe, prompts = dmd2(case.common(rank), iterations=2), prompts_of(case, tmp_path)
    whole = train(recipe, family(case), out=tmp_path / "whole", prompts=prompts, options=QUICK)
    with interrupted_before(1):
        train(recipe, family(case), out=tmp_path / "cut", prompts=prompts, options=QUICK)
    same(whole.out, train(recipe, family(case), out=tmp_path / "cut", prompts=prompts, options=QUICK).out)
    check_export(case, whole, prompts, rank)
