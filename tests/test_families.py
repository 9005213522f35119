"""Every family against stock diffusers, on tiny random pipelines: what the teacher predicts, how a run trains, resumes and exports, and its LoRA files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields, replace

import comfyui_names
import family_ranks
import pytest
import torch
from family_cases import CASES, Case, family, our_output, pipeline_of, prompts_of, rebuilt, stock_output
from many_ranks import double
from safetensors.torch import load_file
from test_ranks import spawned
from test_run import interrupted_before, rows, same
from torch import Tensor, nn

from instep.cli.main import main
from instep.core.ranks import ALONE
from instep.data.prompt import Prompt
from instep.diffusion.levels import few_step_levels
from instep.export.scheduler import flow_scheduler
from instep.export.verify import verify_export
from instep.models.backbone import Backbone
from instep.models.families import family_class, family_of, parts_of
from instep.models.flux import FluxFamily
from instep.models.flux2_klein import Flux2KleinBaseFamily
from instep.models.preset import ModelSettings
from instep.models.role import Role
from instep.models.sharded import units
from instep.recipes.common import Common
from instep.recipes.defaults import with_settings
from instep.recipes.dm_align import dm_align_group
from instep.recipes.dmd import dmd2
from instep.rewards.base import FunctionReward
from instep.training.execution import Execution
from instep.training.options import RunOptions
from instep.training.run import train

QUICK = RunOptions(save_every=1, probe_every=50)
ALL = pytest.mark.parametrize("case", [pytest.param(case, id=name, marks=[pytest.mark.slow] if case.slow else []) for name, case in CASES.items()])


@ALL
def test_the_guided_teacher_takes_the_stock_pipelines_step(case: Case, tmp_path, record_property):
    """At three levels, without and with a negative prompt: what the scheduler's step is given, to 1e-5 of its largest value.

    In double precision where the pipeline takes it: float32 rounds by almost as much.
    """
    prompt, other = prompts_of(case, tmp_path)[:2]
    negative = prompt if case.negative is None else replace(prompt, negative=case.negative)
    worst = 0.0
    with double() if case.double else nullcontext():
        pipe = case.make()
        if case.double:
            pipe.to(dtype=torch.float64)
        fam = family_of(pipe, case.size)
        x = torch.randn(1, *fam.latent_shape, generator=torch.Generator().manual_seed(1))
        for level in case.levels:
            found = {}
            for asked in {prompt, other, negative}:
                stock = stock_output(case, pipe, fam, asked, x, level)[:, :, case.given :]
                found[asked] = our_output(case, fam, asked, x, level)[:, :, case.given :] / stock.abs().max()
                worst = max(worst, float((found[asked] - stock / stock.abs().max()).abs().max()))
            assert all((found[prompt] - found[asked]).abs().max() > 1e-3 for asked in {other, negative} - {prompt}), "the prompts differ"
    record_property("difference", f"{worst:.0e}")
    assert worst <= 1e-5


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
        for field in fields(found):
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


@contextmanager
def called_outside(block: nn.Module) -> Iterator[set[nn.Module]]:
    """The submodules of a block, with parameters of their own, that are called while the block is not."""
    inside, found, hooks = [], set(), []

    def note(module: nn.Module, args: object) -> None:
        if not inside:
            found.add(module)

    hooks.append(block.register_forward_pre_hook(lambda *_: inside.append(True), prepend=True))
    hooks.append(block.register_forward_hook(lambda *_: inside.pop() and None))
    hooks += [module.register_forward_pre_hook(note) for module in block.modules() if module is not block and [*module.parameters(recurse=False)]]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@ALL
def test_what_is_called_outside_of_its_block_is_named(case: Case, tmp_path):
    """Processes that divide a network gather a block's weights when the block is called."""
    fam, prompts = family(case), prompts_of(case, tmp_path)[:2]
    role = Role("teacher", Backbone(fam, fam.new_backbone()))
    parts = fam.parts(role.backbone.module).values()
    x, named = torch.zeros(2, *fam.latent_shape), {module for part in parts for apart in fam.called_apart(part) for module in apart.modules()}
    with ExitStack() as stack, torch.no_grad():
        found = [stack.enter_context(called_outside(block)) for part in parts for block in units(part)]
        for level in (0.95, 0.2):  # one of each expert's
            role(x, torch.full((2,), level), fam.encode(prompts))
    assert len(found) > 1 and {module for each in found for module in each} == {module for module in named if [*module.parameters(recurse=False)]}


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


def check_export(case: Case, run, prompts, rank: int | None) -> dict[str, float]:
    """Stock diffusers draws from the folder, and from the LoRA on the base, what the library draws; the largest differences, relative to the largest latent."""
    kind, levels = type(pipeline_of(case.name)), run.recipe.levels
    pipe = kind.from_pretrained(run.student, local_files_only=True)
    merged = drawn(case, pipe, prompts)
    scale = float(merged.abs().max())
    found = {"folder": verify_export(run.student, levels, prompts=prompts[:2], size=case.size) / scale}
    assert found["folder"] <= case.rounding
    base = rebuilt(case.make() if rank else pipeline_of(case.name), scheduler=pipe.scheduler)
    assert (drawn(case, base, prompts) - merged).abs().max() > 1e-5 * scale, "it was trained"
    if rank is not None and case.loras:
        for i, name in enumerate(case.loras):
            options = {"load_into_transformer_2": True} if i else {}
            base.load_lora_weights(str(run.student), weight_name=name, adapter_name=f"part{i}", **options)
        found["LoRA"] = float((drawn(case, base, prompts) - merged).abs().max()) / scale
        assert found["LoRA"] <= 1e-5
    return found


@ALL
def test_a_lora_student_is_sampled_by_stock_diffusers(case: Case, tmp_path, record_property):
    """And the file has the names that ComfyUI's loader knows, where it has the model."""
    prompts = prompts_of(case, tmp_path)
    run = train(dmd2(case.common(4), iterations=1), family(case), out=tmp_path / "run", prompts=prompts, options=QUICK)
    for name, figure in check_export(case, run, prompts, 4).items():
        record_property(name, f"{figure:.0e}")
    names = comfyui_names.BY_FAMILY.get(case.family)
    assert family(case).comfyui_reads_lora == (names is not None)
    assert ("diffusers and ComfyUI read it" in (run.student / "README.md").read_text()) == (names is not None), "the card says so"
    for file in case.loras if names is not None else ():
        changed = comfyui_names.changed(names, load_file(run.student / file))
        assert len(set(changed)) == len(changed) > 0, "each layer changes weights of its own"
        record_property("ComfyUI", "yes")


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("rank", [None, 4], ids=["full", "LoRA"])
def test_a_student_killed_and_resumed_ends_the_same(case: Case, rank, tmp_path, record_property):
    recipe, prompts = dmd2(case.common(rank), iterations=2), prompts_of(case, tmp_path)
    whole = train(recipe, family(case), out=tmp_path / "whole", prompts=prompts, options=QUICK)
    with interrupted_before(1):
        train(recipe, family(case), out=tmp_path / "cut", prompts=prompts, options=QUICK)
    same(whole.out, train(recipe, family(case), out=tmp_path / "cut", prompts=prompts, options=QUICK).out)
    record_property("folder", f"{check_export(case, whole, prompts, rank)['folder']:.0e}")


@pytest.mark.slow
@ALL
def test_a_group_in_bfloat16_is_computed_a_row_at_a_time(case: Case, tmp_path):
    recipe = dm_align_group(case.common(4), distil=1, iterations=1, group=2)
    options = RunOptions(save_every=50, probe_every=50, execution=Execution(dtype="bfloat16", micro_batch=1, checkpointing="on"))
    reward = FunctionReward(lambda media, prompts: media.flatten(1).mean(1), name="brightness")
    run = train(recipe, family(case), out=tmp_path / "run", prompts=prompts_of(case, tmp_path), reward=reward, options=options)
    assert all(value == value for value in rows(run.out)[-1].values() if isinstance(value, float)), "finite metrics"
    assert (run.student / "model_index.json").is_file()


@pytest.fixture(scope="module")
def two_ranks(request, tmp_path_factory) -> list[dict[str, Tensor]]:
    """What two processes compute for the cases that were asked for, by rank."""
    asked = [item.callspec.params for item in request.session.items if item.name.startswith("test_two_ranks_a_row_at_a_time")]
    names = [f"{each['case'].name}/{each['kind']}" for each in asked]
    return spawned(tmp_path_factory.mktemp("ranks"), 2, names, family_ranks.__file__)


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("kind", family_ranks.KINDS)
def test_two_ranks_a_row_at_a_time_train_as_one_process(case: Case, kind, two_ranks):
    """Networks are sharded, and blocks and rows computed again; one process computes all rows in one call."""
    name = f"{case.name}/{kind}"
    family_ranks.check(name, two_ranks, family_ranks.trained(name, ALONE, Execution(device="cpu")))


@pytest.mark.slow
@ALL
def test_the_commands_take_a_folder(case: Case, tmp_path, capsys):
    pipeline_of(case.name).save_pretrained(tmp_path / "model")
    prompt, size = str(prompts_of(case, tmp_path)[0]), [str(side) for side in (case.size.height, case.size.width, case.size.frames)]
    sample = ["sample", str(tmp_path / "model"), "--prompts", prompt, "--copies", "1", "--steps", "2", "--size", *size, "--out", str(tmp_path / "s.webp")]
    assert main(sample) == 0 and (tmp_path / "s.webp").stat().st_size > 50
    assert main(["plan", "dmd2", "--model", str(tmp_path / "model"), "--size", *size]) == 0
    assert "stage match" in capsys.readouterr().out
