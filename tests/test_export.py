"""The exported folder, loaded by stock diffusers, draws what the training library draws."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import FRAMES, HEIGHT, WIDTH, tiny_wan_pipeline

from instep.core.size import Size
from instep.diffusion.levels import few_step_levels
from instep.export import ExportInfo, export_student, lora_state_dict, save_loras, verify_export
from instep.export.scheduler import flow_scheduler
from instep.export.verify import our_sampler
from instep.models.adapters import merge_lora
from instep.models.wan import WanFamily
from instep.models.wan_comfyui import comfyui_levels, comfyui_module, comfyui_parameter, comfyui_shift

torch.set_num_threads(1)

SIZE = Size(HEIGHT, WIDTH, FRAMES)
PROMPTS = ["a seven moving left slowly", "a digit"]
INFO = ExportInfo(
    recipe="dm-align-group",
    base_model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    seed=3,
    command="instep train dm-align-group --seed 3",
    instep_version="0.0",
    training_prompts=120,
    size=SIZE,
    example_prompt='a "seven" moving left',
    metrics={
        "name": "student",
        "nfe": 4,
        "n": 270,
        "values": {"heldout_both": {"value": 0.931, "se": 0.015}, "seconds": {"value": 0.05}},
    },
)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def reference(pipe, transformer, levels, prompts, seed):
    """Few-step sampling written from its definition; nothing of the library is used here."""
    dtype = transformer.patch_embedding.weight.dtype
    levels = torch.tensor(levels, dtype=torch.float32).tolist()
    with torch.no_grad():
        text, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=512)
        text = text.to(dtype)
        torch.manual_seed(seed)
        x = torch.randn(len(prompts), 16, 3, HEIGHT // 8, WIDTH // 8).to(dtype)
        for j, t in enumerate(levels):
            v = transformer(hidden_states=x, timestep=torch.full((len(prompts),), 1000 * t), encoder_hidden_states=text).sample
            x0 = x - t * v
            if j + 1 < len(levels):
                x = (1 - levels[j + 1]) * x0 + levels[j + 1] * torch.randn(x.shape).to(dtype)
    return x0


def stock(pipe, n, prompts=PROMPTS, seed=5):
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(seed)
    return pipe(
        prompts,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=n,
        guidance_scale=1.0,
        output_type="latent",
    ).frames


def with_adapters(alpha: float = 12.0, targets=TARGETS):
    """A pipeline and its transformer with a random student adapter (r 4) and a fake adapter beside it; the student is
    active.
    """
    from peft import LoraConfig, inject_adapter_in_model

    pipe = tiny_wan_pipeline()
    module = tiny_wan_pipeline().transformer
    torch.manual_seed(1)
    for name, r in (("student", 4), ("fake", 2)):
        inject_adapter_in_model(LoraConfig(r=r, lora_alpha=alpha, target_modules=targets), module, adapter_name=name)
    for key, p in module.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.1)
    for layer in module.modules():
        if hasattr(layer, "lora_A"):
            layer.set_adapter(["student"])
    return pipe, module


def exported(pipe, levels, out, info, **options):
    """An export of the pipeline's own transformer."""
    return export_student(WanFamily(pipe, SIZE), pipe.transformer, levels, out, info, **options)


def lora_tensors(module, adapter="student"):
    return lora_state_dict(module, adapter, lambda name: tuple(f"diffusion_model.{comfyui_module(name)}.lora_{half}.weight" for half in "AB"))


def folder_of(tmp_path: Path) -> Path:
    return tmp_path / "student"


# --------------------------------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 8, 16])
def test_scheduler_gives_our_levels_after_saving_and_loading(n, shift, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    levels = few_step_levels(n, shift)
    flow_scheduler(levels).save_pretrained(tmp_path)
    loaded = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(n)
    assert (loaded.sigmas - torch.tensor([*levels, 0.0])).abs().max() < 1e-6
    assert (loaded.timesteps - 1000 * torch.tensor(levels)).abs().max() < 1e-3
    assert loaded.config.stochastic_sampling


def test_scheduler_known_solutions():
    for shift, solved, terminal in ((5.0, 2.509456, 0.625), (3.0, 2.004020, 0.5), (8.0, 2.925446, 0.727273)):
        config = flow_scheduler(few_step_levels(4, shift)).config
        assert config.shift == pytest.approx(solved, abs=1e-4)
        assert config.shift_terminal == pytest.approx(terminal, abs=1e-6)


def test_scheduler_takes_any_three_levels():
    assert len(flow_scheduler((1.0, 0.9, 0.25)).sigmas) == 4
    assert len(flow_scheduler((1.0, 0.4, 0.2)).sigmas) == 4


@pytest.mark.parametrize("levels", [(1.0, 0.9, 0.7, 0.2), (0.9, 0.5), (1.0, 1.0, 0.5), (), (1.0, 0.5, 0.0), (1.0, 0.999, 0.001)])
def test_scheduler_refuses_what_it_cannot_give(levels):
    with pytest.raises(ValueError, match="levels"):
        flow_scheduler(levels)


def test_comfyui_levels_equal_ours_for_the_right_shift():
    for n in (1, 2, 4, 5, 8):
        for shift in (1.0, 3.0, 5.0, 8.0):
            found, off = comfyui_shift(few_step_levels(n, shift))
            assert off < 1e-5
            if n > 1:
                assert found == pytest.approx(shift, abs=1e-3)
    assert comfyui_levels(4, 5.0) == pytest.approx([1, 0.9375, 0.8333333, 0.625])
    assert 1e-5 < comfyui_shift(few_step_levels(3, 5.0))[1] < 5e-3
    assert comfyui_shift((1.0, 0.9, 0.7, 0.2))[1] > 0.1


# ----------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("n", [1, 2, 4])
def test_exported_folder_samples_like_ours(n, tmp_path):
    from diffusers import DiffusionPipeline

    pipe, levels = tiny_wan_pipeline(), few_step_levels(n, 5.0)
    report = exported(pipe, levels, folder_of(tmp_path), INFO)
    # the family attends to one weighted padding token instead of 500: equal up to the order of a sum
    assert report.sampler_difference <= 5e-6 and report.student_difference <= 5e-6
    loaded = DiffusionPipeline.from_pretrained(report.folder, local_files_only=True)
    expected = reference(pipe, pipe.transformer, levels, PROMPTS, seed=5)
    difference = (stock(loaded, n) - expected).abs().max()
    assert difference <= 1e-6
    # the comparison can fail: another number of steps, another prompt, another student
    assert (stock(loaded, n + 1) - expected).abs().max() > 1e-3
    assert (stock(loaded, n, ["four", "a dog"]) - expected).abs().max() > 1e-3
    other = tiny_wan_pipeline(seed=7)
    assert verify_export(report.folder, our_sampler(WanFamily(other, SIZE), other.transformer, levels), size=SIZE) > 1e-2


def test_training_side_roles_sample_like_the_folder(tmp_path):
    from instep.diffusion.sampling import sample_few_step
    from instep.models.backbone import Backbone
    from instep.models.role import Role

    levels = few_step_levels(4, 5.0)
    family = WanFamily(tiny_wan_pipeline(), SIZE)
    student = Role("student", Backbone(family, family.new_backbone()))

    def ours(prompts, rng):
        noise = torch.randn(len(prompts), *family.latent_shape, generator=rng)
        return sample_few_step(student, family.encode(prompts), noise, levels, family.path, rng)

    report = export_student(family, student.backbone.module, levels, folder_of(tmp_path), INFO, ours=ours)
    # the family attends to one weighted padding token instead of 500: equal up to the order of a sum
    assert report.student_difference < 5e-6


def test_float16_keeps_norms_wide_and_says_how_far_off_it_is(tmp_path):
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    pipe = tiny_wan_pipeline()
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    report = exported(pipe, few_step_levels(2, 5.0), folder_of(tmp_path), INFO, dtype=torch.float16)
    saved = load_file(report.folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert saved["blocks.0.attn1.to_q.weight"].dtype == torch.float16
    assert saved["blocks.0.scale_shift_table"].dtype == torch.float32
    assert report.sampler_difference <= 5e-6 < report.student_difference < 5e-2
    assert all(torch.equal(value, before[key]) for key, value in pipe.transformer.state_dict().items())
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}
    half = DiffusionPipeline.from_pretrained(report.folder, torch_dtype=torch.float16, local_files_only=True)
    assert stock(half, 2).isfinite().all()


def test_card_is_valid_and_its_snippet_runs(tmp_path, monkeypatch):
    from huggingface_hub import ModelCard

    report = exported(tiny_wan_pipeline(), few_step_levels(4, 5.0), folder_of(tmp_path), INFO)
    text = (report.folder / "README.md").read_text()
    card = ModelCard(text).data
    assert (card.library_name, card.pipeline_tag, card.base_model) == ("diffusers", "text-to-video", INFO.base_model)
    assert "num_inference_steps=4" in text and "guidance_scale=1.0" in text and f"{report.sampler_difference:.1e}" in text
    assert "| heldout_both | 0.931 ± 0.015 |" in text and "| seconds | 0.05 |" in text
    assert "ComfyUI cannot run this model: its text encoder is 16 wide" in text
    monkeypatch.chdir(report.folder)
    with torch.random.fork_rng(devices=[]):
        exec(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1), {})
    assert (report.folder / "video.gif").stat().st_size > 100


def test_an_existing_folder_is_replaced_only_if_it_is_an_export(tmp_path):
    out, pipe, levels = folder_of(tmp_path), tiny_wan_pipeline(), few_step_levels(1)
    out.mkdir()
    (out / "thesis.txt").write_text("irreplaceable")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="exists and was not written by instep"):
            exported(pipe, levels, out, INFO, overwrite=overwrite)
    assert [p.name for p in tmp_path.rglob("*")] == ["student", "thesis.txt"]
    (out / "thesis.txt").unlink()
    exported(pipe, levels, out, INFO)
    (out / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ValueError, match="exists; give --overwrite .*overwrite=True"):
        exported(pipe, few_step_levels(2), out, INFO)
    exported(pipe, few_step_levels(2), out, INFO, overwrite=True)
    assert (out / "thesis.txt").read_text() == "irreplaceable" and [p.name for p in tmp_path.iterdir()] == ["student"]
    record = json.loads((out / "instep_export.json").read_text())
    assert len(record["levels"]) == 2 and "thesis.txt" not in record["files"] and {"model_index.json", "README.md"} <= set(record["files"])


def test_a_failed_export_leaves_the_earlier_one(tmp_path):
    out, pipe = folder_of(tmp_path), tiny_wan_pipeline()
    exported(pipe, few_step_levels(1), out, INFO)
    record = (out / "instep_export.json").read_text()

    def broken(prompts, rng):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        exported(pipe, few_step_levels(2), out, INFO, ours=broken, overwrite=True)
    assert (out / "instep_export.json").read_text() == record and [p.name for p in tmp_path.iterdir()] == ["student"]


# ----------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_lora_file_in_stock_diffusers_equals_the_adapter(tmp_path, dtype, tolerance):
    # float64 shows that it is the same function; in float32 (3 B) A x and 3 (B A x) round differently
    pipe, module = with_adapters()
    pipe.transformer.to(dtype), module.to(dtype)
    expected = reference(pipe, module, [1.0, 0.7], PROMPTS, seed=5)
    base = reference(pipe, pipe.transformer, [1.0, 0.7], PROMPTS, seed=5)
    keys = save_loras(WanFamily(pipe, SIZE), module, tmp_path)
    assert len(keys) == 2 * 2 * 10 and "diffusion_model.blocks.1.ffn.2.lora_B.weight" in keys
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    got = reference(pipe, pipe.transformer, [1.0, 0.7], PROMPTS, seed=5)
    assert (got - expected).abs().max() <= tolerance
    assert (base - expected).abs().max() > 1e-2


def test_lora_on_every_named_layer(tmp_path):
    targets = [*TARGETS, "linear_1", "linear_2", "time_proj", "proj_out"]
    pipe, module = with_adapters(targets=targets)
    pipe.transformer.double(), module.double()
    expected = reference(pipe, module, [1.0], PROMPTS, seed=5)
    keys = save_loras(WanFamily(pipe, SIZE), module, tmp_path)
    assert len(keys) == 2 * (2 * 10 + 6) and "diffusion_model.head.head.lora_A.weight" in keys
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert (reference(pipe, pipe.transformer, [1.0], PROMPTS, seed=5) - expected).abs().max() <= 1e-12


def test_lora_scale_comes_from_alpha_not_from_the_last_call():
    _, module = with_adapters()
    before = lora_tensors(module)
    for layer in module.modules():
        if hasattr(layer, "lora_A"):
            layer.set_scale("student", 0.25)
    assert all(torch.equal(value, before[key]) for key, value in lora_tensors(module).items())


def test_merged_module_is_plain_and_leaves_the_fake_out():
    pipe, module = with_adapters()
    module.double()
    expected = reference(pipe, module, [1.0, 0.7], PROMPTS, seed=5)
    merged = merge_lora(module)
    assert merged.state_dict().keys() == pipe.transformer.state_dict().keys()
    assert (reference(pipe, merged, [1.0, 0.7], PROMPTS, seed=5) - expected).abs().max() <= 1e-12
    assert (reference(pipe, module, [1.0, 0.7], PROMPTS, seed=5) - expected).abs().max() == 0


def test_a_merge_is_pefts():
    """W + (alpha / r) B A against what PEFT adds in place, in float64: equal up to the order of operations."""
    _, module = with_adapters()
    module.double()
    ours = merge_lora(module).state_dict()
    layers = {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A") and "student" in layer.lora_A}
    assert layers
    for name, layer in layers.items():
        layer.set_scale("student", 1.0)
        before = layer.base_layer.weight.clone()
        layer.merge(adapter_names=["student"])
        assert (layer.base_layer.weight - ours[f"{name}.weight"]).abs().max() <= 1e-14 and not torch.equal(before, layer.base_layer.weight)


def test_export_with_lora_writes_both_and_wires_the_workflow(tmp_path):
    from diffusers import DiffusionPipeline

    pipe, module = with_adapters()
    for layer in module.modules():
        if hasattr(layer, "lora_A"):
            layer.set_adapter(["fake"])
            layer.set_scale("student", 0.5)
    before = {key: p.requires_grad for key, p in module.named_parameters()}
    levels = few_step_levels(4, 5.0)
    report = export_student(WanFamily(pipe, SIZE), module, levels, folder_of(tmp_path), INFO, adapter="student")
    # merged against adapter-carrying weights: the same function, rounded differently, four times in a row
    assert report.lora_tensors == 40 and 0 < report.student_difference <= 1e-5
    assert {key: p.requires_grad for key, p in module.named_parameters()} == before
    q = module.blocks[0].attn1.to_q
    assert q.active_adapters == ["fake"] and q.scaling["student"] == 0.5 * 12 / 4
    for layer in module.modules():
        if hasattr(layer, "lora_A"):
            layer.set_adapter(["student"])
            layer.set_scale("student", 1.0)
    loaded = DiffusionPipeline.from_pretrained(report.folder, local_files_only=True)
    assert (stock(loaded, 4) - reference(pipe, module, levels, PROMPTS, seed=5)).abs().max() <= 1e-5
    graph = json.loads((report.folder / "comfyui_workflow.json").read_text())
    by_kind = {node["class_type"]: (key, node["inputs"]) for key, node in graph.items()}
    assert by_kind["ModelSamplingSD3"][1] == {"shift": 5.0, "model": [by_kind["LoraLoaderModelOnly"][0], 0]}
    sampler = by_kind["KSampler"][1]
    assert (sampler["steps"], sampler["cfg"], sampler["sampler_name"], sampler["scheduler"]) == (
        4,
        1.0,
        "lcm",
        "simple",
    )
    links = [value for node in graph.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert len(links) == 11 and all(key in graph for key, _ in links)


def test_lora_errors_say_what_is_wrong():
    from peft import LoraConfig, inject_adapter_in_model

    pipe, module = with_adapters()
    with pytest.raises(ValueError, match=r"'teacher' is not on this module; allowed: \['fake', 'student'\]"):
        lora_tensors(module, "teacher")
    with pytest.raises(ValueError, match="carries no LoRA"):
        merge_lora(pipe.transformer)
    conv = tiny_wan_pipeline().transformer
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["patch_embedding"]), conv, adapter_name="student")
    with pytest.raises(ValueError, match="'patch_embedding' has no name in ComfyUI"):
        lora_tensors(conv)


def test_carried_adapter_is_not_exported_silently(tmp_path):
    pipe, module = with_adapters()
    with pytest.raises(ValueError, match="adapter="):
        export_student(WanFamily(pipe, SIZE), module, few_step_levels(1), folder_of(tmp_path), INFO)


def test_whole_checkpoint_names_survive_diffusers_own_converter():
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    transformer = tiny_wan_pipeline().transformer
    original = {comfyui_parameter(key): value for key, value in transformer.state_dict().items()}
    assert {
        "head.modulation",
        "blocks.0.modulation",
        "blocks.1.norm3.weight",
        "patch_embedding.weight",
    } <= original.keys()
    back = convert_wan_transformer_to_diffusers(dict(original))
    assert back.keys() == transformer.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in transformer.state_dict().items())


def test_card_tells_comfyui_users_what_holds():
    from dataclasses import replace

    from instep.export.card import Measured, model_card

    measured = Measured(
        sampler_difference=0.0,
        student_difference=0.0,
        comfyui_shift=5.0,
        comfyui_difference=0.0,
        comfyui_obstacle=None,
        lora=True,
        dtype="float32",
    )
    text = model_card(INFO, few_step_levels(4, 5.0), measured)
    assert "ModelSamplingSD3 shift 5," in text and "levels equals the one" in text and "lora.safetensors" in text
    three = model_card(INFO, few_step_levels(3, 5.0), replace(measured, comfyui_difference=2e-4))
    assert "levels differs by at most 0.0002 from the one" in three
    odd = model_card(
        replace(INFO, metrics=None, base_model="moving-digits"),
        (1.0, 0.9, 0.7, 0.2),
        replace(measured, comfyui_difference=0.2),
    )
    assert "No workflow is included" in odd and "Quality was not measured" in odd and "base_model" not in odd.split("---")[1]
