"""Every family against stock diffusers, on tiny random pipelines: what the teacher predicts, how a run trains, resumes and exports, and its LoRA files."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from family_cases import CASES, Case, family, our_x0, pipeline_of, prompts_of, rebuilt, stock_x0
from test_run import interrupted_before, rows, same
from torch import Tensor

from instep.cli.main import main
from instep.data.prompt import Prompt
from instep.diffusion.levels import few_step_levels
from instep.export.scheduler import flow_scheduler
from instep.export.verify import verify_export
from instep.models.backbone import Backbone
from instep.models.families import family_class, parts_of
from instep.models.flux import FluxFamily
from instep.models.flux2_klein import Flux2KleinBaseFamily
from instep.models.preset import ModelSettings
from instep.models.role import Role
from instep.recipes.common import Common
from instep.recipes.defaults import with_settings
from instep.recipes.dm_align import dm_align_group
from instep.recipes.dmd import dmd2
from instep.rewards.base import FunctionReward
from instep.training import run as module
from instep.training.execution import Execution
from instep.training.options import RunOptions
from instep.training.run import train

QUICK = RunOptions(save_every=1, probe_every=50)
ALL = pytest.mark.parametrize("case", [pytest.param(case, id=name, marks=[pytest.mark.slow] if case.slow else []) for name, case in CASES.items()])


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


@ALL
def test_shapes_features_and_skipped_blocks(case: Case, tmp_path):
    """Media and latents fit each other, planning's conditions are those of prompts, a head reads tokens, and a skipped block counts."""
    fam, prompts = family(case), prompts_of(case, tmp_path)[:2]
    x = torch.randn(2, *fam.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        media = fam.decode(x)
        assert fam.encode_media(media.clamp(0, 1)).shape == x.shape
    frames = () if fam.task.endswith("image") else (case.size.frames,)
    assert media.shape == (2, 3, *frames, case.size.height, case.size.width)
    pipe, drawn_as = rebuilt(pipeline_of(case.name)), {}
    for output in ("latent", "media"):
        torch.manual_seed(0)
        drawn_as[output] = fam.stock_sample(pipe, prompts[:1], steps=2, guidance=1.0, output=output)
    with torch.no_grad():
        decoded = fam.decode(fam.own_latents(drawn_as["latent"]))
    assert (decoded.clamp(0, 1) - drawn_as["media"]).abs().max() <= 1e-5, "latents are decoded as the pipeline decodes them"
    assert torch.equal(fam.own_latents(fam.stock_latents(x)), x)
    for found, planned in zip((fam.encode(prompts), fam.unconditional(prompts)), fam.blank(2), strict=True):
        for field in dataclasses.fields(found):
            one, other = getattr(found, field.name), getattr(planned, field.name)
            assert (one is None) == (other is None), field.name
            if one is not None:  # planning has texts of the longest length
                assert one.ndim == other.ndim and all(a <= b for a, b in zip(one.shape, other.shape, strict=True)), field.name
    role = Role("fake", Backbone(fam, fam.new_backbone()), head=True, exits=4)
    t, cond = torch.tensor([0.7, 0.7]), fam.encode(prompts).at_exit(torch.tensor([0, 3]))
    assert role(x, t, cond).logit.shape == (2,)
    with torch.no_grad():
        whole, skipped = (one(x, t, cond).x0 for one in (role, role.skipping([1])))
    assert (whole - skipped)[:, :, case.given :].abs().max() > 1e-4


def test_a_model_without_guidance_zeros_is_told_the_empty_text():
    """SDXL's pipeline puts zeros in the place of a missing negative prompt, and only there."""
    fam = family(CASES["SDXL"])
    null = fam.unconditional(["a cat", Prompt("a dog", negative=""), Prompt("a dog", negative="blurry")])
    assert null.text[0].abs().max() == 0 and null.pooled[0].abs().max() == 0
    assert torch.equal(null.text[1], fam.encode([""]).text[0]) and torch.equal(null.text[2], fam.encode(["blurry"]).text[0])
    assert [len(group) for group in fam.calls([Prompt("a"), Prompt("b"), Prompt("c", negative="d"), Prompt("e")])] == [2, 1, 1]


def test_shifts_by_size_are_those_of_the_pipelines():
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    dynamic = {"use_dynamic_shifting": True, "max_shift": 1.15}
    assert Flux2KleinBaseFamily.shift_of(dynamic) == pytest.approx(math.exp(compute_empirical_mu(4096, 50)), rel=1e-5)
    assert FluxFamily.shift_of(dynamic) == pytest.approx(math.exp(1.15)) and FluxFamily.shift_of({"shift": 1.0}) == 1


def test_a_distilled_klein_is_taught_without_guidance_and_takes_no_negative_prompt():
    pipe = pipeline_of("FLUX.2-klein")
    assert family_class("Flux2KleinPipeline", {**parts_of(pipe), "is_distilled": True}).preset.guidance == 1
    with pytest.raises(ValueError, match="has a negative prompt, and the pipeline of flux.2-klein takes none"):
        family(CASES["FLUX.2-klein"]).check_prompts([Prompt("a cat", negative="blurry")])


@pytest.mark.parametrize("levels", [few_step_levels(4, 3.0), few_step_levels(8, 7.56), (1.0, 0.757, 0.522), (1.0, 0.4), (1.0,)])
def test_a_pipeline_that_gives_even_sigmas_gets_a_scheduler_for_them(levels):
    n = len(levels)
    scheduler = flow_scheduler(levels, even_sigmas=True)
    scheduler.set_timesteps(sigmas=[1 - j / n for j in range(n)], mu=1.0)
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(list(levels), abs=1e-6)
    with pytest.raises(ValueError, match="cannot be represented by FlowMatchEulerDiscreteScheduler"):
        flow_scheduler((1.0, 0.9, 0.3, 0.1), even_sigmas=True)


def test_published_settings_are_those_of_the_papers():
    sdxl = family(CASES["SDXL"])
    common = with_settings(Common(), ModelSettings(sdxl.preset, sdxl.shift))
    assert (common.levels, common.fake_target, common.guidance, common.batch * common.accumulate) == ((1.0, 0.75, 0.5, 0.25), "eps", 8.0, 128)
    assert common.critic().target == common.critic(gan=0.01).target == "eps"
    assert sdxl.path.training_step(torch.tensor(common.levels)).tolist() == [999, 749, 499, 249]


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
    if rank is not None and case.loras:
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


@pytest.mark.slow
@ALL
def test_a_group_in_bfloat16_is_computed_a_row_at_a_time(case: Case, tmp_path):
    recipe = dm_align_group(case.common(4), distil=1, iterations=1, group=2)
    options = RunOptions(save_every=50, probe_every=50, execution=Execution(dtype="bfloat16", micro_batch=1, checkpointing="on"))
    reward = FunctionReward(lambda media, prompts: media.flatten(1).mean(1), name="brightness")
    run = train(recipe, family(case), out=tmp_path / "run", prompts=prompts_of(case, tmp_path), reward=reward, options=options)
    assert all(value == value for value in rows(run.out)[-1].values() if isinstance(value, float)), "finite metrics"
    assert (run.student / "model_index.json").is_file()


@pytest.mark.slow
@ALL
def test_the_commands_take_a_folder(case: Case, tmp_path, capsys):
    pipeline_of(case.name).save_pretrained(tmp_path / "model")
    prompt, size = str(prompts_of(case, tmp_path)[0]), [str(side) for side in (case.size.height, case.size.width, case.size.frames)]
    sample = ["sample", str(tmp_path / "model"), "--prompts", prompt, "--copies", "1", "--steps", "2", "--size", *size, "--out", str(tmp_path / "s.webp")]
    assert main(sample) == 0 and (tmp_path / "s.webp").stat().st_size > 50
    assert main(["plan", "dmd2", "--model", str(tmp_path / "model"), "--size", *size]) == 0
    assert "stage match" in capsys.readouterr().out
