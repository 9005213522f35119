"""A pipeline that carries style LoRAs: the teacher is the styled model, the export names what is inside, and the LoRA of the steps lies beside styles."""

from __future__ import annotations

import atexit
import copy
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fast import slow_but
from tiny import FRAMES, HEIGHT, WIDTH, tiny_sd3_pipeline, tiny_wan_pipeline
from tiny_families import tiny_sdxl_pipeline
from torch import Tensor, nn

from instep.cli.main import main
from instep.core.size import Size
from instep.data.prompt import as_prompts
from instep.export.load import load_pipeline
from instep.models.backbone import Backbone
from instep.models.families import family_of
from instep.models.prompt_cache import PromptCache
from instep.models.role import Role
from instep.models.styles import Style, styles_of
from instep.models.wan import WanCondition
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.training.build import make_roles
from instep.training.options import RunOptions
from instep.training.run import train

TARGETS = ["to_q", "to_v", "to_out.0"]
OPTIONS = RunOptions(save_every=50, probe_every=50)


@dataclass(frozen=True)
class Case:
    make: Callable[[], Any]
    size: Size
    part: str = "transformer"
    encoder: bool = False


CASES = {
    "Wan": Case(tiny_wan_pipeline, Size(HEIGHT, WIDTH, FRAMES)),
    "SDXL": Case(tiny_sdxl_pipeline, Size(16, 16, 1), "unet", encoder=True),
    "SD3": Case(tiny_sd3_pipeline, Size(16, 16, 1), encoder=True),
}


@cache
def styles(case: Case) -> Path:
    """A folder with two LoRA files as stock diffusers writes them: attention layers of the denoiser, and for some of the first text encoder."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    folder, pipe = Path(tempfile.mkdtemp()), case.make()
    atexit.register(shutil.rmtree, folder)
    networks = {part: getattr(pipe, part) for part in ((case.part, "text_encoder") if case.encoder else (case.part,))}
    for part, network in networks.items():
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"] if "encoder" in part else TARGETS), network)
    for seed, name in enumerate(("ink", "wash")):
        rng = torch.Generator().manual_seed(seed)
        for part, network in networks.items():
            for key, p in network.named_parameters():
                if "lora_" in key:
                    p.data = torch.randn(p.shape, generator=rng) * (2.0 if "encoder" in part else 0.3)
        found = {f"{part}_lora_layers": get_peft_model_state_dict(network) for part, network in networks.items()}
        pipe.save_lora_weights(folder, weight_name=f"{name}.safetensors", **found)
    return folder


def styled(case: Case, **scales: float) -> Any:
    pipe = case.make()
    for name in scales:
        pipe.load_lora_weights(styles(case), weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(list(scales), list(scales.values()))
    return pipe


def network_output(case: Case, pipe: Any) -> Tensor:
    """What the pipeline's own denoiser returns for fixed noise and a text as its own encoders read it."""
    fam = copy.copy(plain_family(case))
    fam.pipe, fam.prompt_cache = pipe, PromptCache()
    cond: Any = fam.encode(["a digit"])
    if isinstance(cond, WanCondition):
        cond = WanCondition(text=pipe.encode_prompt(["a digit"], do_classifier_free_guidance=False, max_sequence_length=512)[0])
    with torch.no_grad():
        return fam.forward(getattr(pipe, case.part), noise(fam), torch.tensor([0.6]), cond).clone()


def role_output(role: Role) -> Tensor:
    fam = role.backbone.family
    with torch.no_grad():
        return role._forward(noise(fam), torch.tensor([0.6]), fam.encode(["a digit"]))[0]


def noise(fam: Any) -> Tensor:
    return torch.randn(1, *fam.latent_shape, generator=torch.Generator().manual_seed(0))


@cache
def plain_family(case: Case) -> Any:
    return family_of(case.make(), case.size)


def looks(pipe: Any) -> dict[str, object]:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {
        name: (
            [(key, p.dtype, p.requires_grad, p.data_ptr(), p.grad is None) for key, p in part.named_parameters()],
            [(type(m).__name__, m.training, getattr(m, "merged_adapters", None), str(getattr(m, "scaling", None))) for m in part.modules()],
            [name for name in ("peft_config", "_hf_peft_config_loaded") if name in vars(part)],
        )
        for name, part in parts.items()
    } | {"active": pipe.get_active_adapters(), "all": pipe.get_list_adapters()}


@pytest.mark.parametrize("name", CASES)
def test_the_teacher_is_the_styled_model(name):
    case = CASES[name]
    pipe = styled(case, ink=0.8, wash=0.5)
    before, expected, plain = looks(pipe), network_output(case, pipe), network_output(case, plain_family(case).pipe)
    fam = family_of(pipe, case.size)
    size = float((expected - plain).abs().max())
    assert size > 0.02 * float(plain.abs().max()), "the style shows"
    for rank in (None, 2):
        roles = make_roles(dmd2(Common(steps=2, batch=2, lora_rank=rank, condition_on_exit=False)), fam)
        for role in roles.values():  # student and fake begin as the teacher
            assert float((role_output(role) - expected).abs().max()) < 1e-4 * size
    assert looks(pipe) == before and torch.equal(network_output(case, pipe), expected)
    parts = tuple(part for part in pipe.components if part == case.part or (part == "text_encoder" and case.encoder))
    assert set(fam.styles) == {Style("ink", parts, (0.8, 0.8)), Style("wash", parts, (0.5, 0.5))}


def fused(pipe: Any) -> None:
    pipe.fuse_lora(lora_scale=0.5)


def fused_and_unloaded(pipe: Any) -> None:
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def one_of_two(pipe: Any) -> None:
    pipe.set_adapters(["wash"], [0.5])


def disabled(pipe: Any) -> None:
    pipe.disable_lora()


def fused_then_disabled(pipe: Any) -> None:
    pipe.fuse_lora()
    pipe.disable_lora()


INK, WASH = Style("ink", ("transformer",), (0.8, 0.8)), Style("wash", ("transformer",), (0.5, 0.5))


@pytest.mark.parametrize(
    ("change", "inside"),
    [
        (fused, {Style("ink", ("transformer",), (0.4, 0.4)), Style("wash", ("transformer",), (0.25, 0.25))}),
        (fused_and_unloaded, set()),
        (one_of_two, {WASH}),
        (disabled, set()),
        (fused_then_disabled, set()),
    ],
)
def test_what_the_pipeline_samples_with_is_what_is_trained_on(change, inside):
    case = CASES["Wan"]
    pipe = styled(case, ink=0.8, wash=0.5)
    change(pipe)
    before = looks(pipe)
    fam = family_of(pipe, case.size)
    assert looks(pipe) == before
    mine = role_output(Role("teacher", Backbone(fam, fam.new_backbone())))
    assert set(fam.styles) == inside and set(styles_of(pipe)) == inside
    assert torch.allclose(mine, network_output(case, pipe), atol=1e-5)


def test_a_merge_of_narrow_weights_is_rounded_once():
    case = CASES["Wan"]
    narrow = styled(case, ink=0.8)
    narrow.transformer.to(torch.bfloat16)
    fam = family_of(narrow, case.size)
    name = "blocks.0.attn1.to_q"
    layer = narrow.transformer.get_submodule(name)
    a, b = layer.lora_A["ink"].weight.double(), layer.lora_B["ink"].weight.double()
    expected = (layer.base_layer.weight.double() + 0.8 * b @ a).to(torch.bfloat16)
    found = fam.pretrained.get_submodule(name).weight
    assert found.dtype == torch.bfloat16 and (found == expected).float().mean() > 0.99


def test_what_peft_wraps_otherwise_is_refused():
    from peft import LoraConfig, inject_adapter_in_model

    pipe = tiny_wan_pipeline()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["proj_out"]), pipe.transformer)
    with pytest.raises(ValueError, match="pipeline: 'proj_out' of its WanTransformer3DModel is wrapped by PEFT.*merge_and_unload"):
        family_of(pipe, CASES["Wan"].size)


@pytest.mark.parametrize("name", slow_but(["Wan"], CASES))
def test_a_lora_of_the_steps_lies_beside_the_style(name, tmp_path, capsys):
    """Stock diffusers draws from the plain model with both files what it draws from the exported folder."""
    case = CASES[name]
    pipe = styled(case, ink=0.8)
    before = looks(pipe)
    recipe = dmd2(Common(steps=2, batch=2, shift=1.0, critic_updates=1, lora_rank=2, condition_on_exit=False), iterations=1)
    run = train(recipe, family_of(pipe, case.size), out=tmp_path / "run", prompts=["a digit", "a two"], options=OPTIONS)
    assert looks(pipe) == before and run.student is not None

    steps, plain = load_pipeline(run.student, "cpu"), case.make()
    plain.scheduler = steps.scheduler
    plain.set_progress_bar_config(disable=True)

    def drawn(pipe: Any) -> Tensor:
        torch.manual_seed(0)
        return plain_family(case).stock_sample(pipe, as_prompts(["a digit"]), steps=2, guidance=1.0, output="latent")

    expected = drawn(steps)
    plain.load_lora_weights(styles(case), weight_name="ink.safetensors", adapter_name="ink")
    plain.load_lora_weights(str(run.student), weight_name="lora.safetensors", adapter_name="few_step")
    plain.set_adapters(["ink", "few_step"], [0.8, 1.0])
    assert torch.allclose(drawn(plain), expected, atol=1e-4 * float(expected.abs().max()))
    plain.set_adapters(["few_step"], [1.0])
    assert not torch.allclose(drawn(plain), expected, atol=1e-2 * float(expected.abs().max())), "the folder holds the style"

    card, record = (run.student / "README.md").read_text(), json.loads((run.student / "instep_export.json").read_text())
    assert 'pipe.set_adapters(["ink", "few_step"], [0.8, 1])' in card and "carried ink at 0.8" in card
    assert [Style.of_json(style) for style in record["info"]["styles"]] == list(run.family.styles)
    if name == "Wan":
        graph = json.loads((run.student / "comfyui_workflow.json").read_text())
        chain = [node["inputs"] for node in graph.values() if node["class_type"] == "LoraLoaderModelOnly"]
        assert [(node["lora_name"], node["strength_model"]) for node in chain] == [("ink.safetensors", 0.8), ("lora.safetensors", 1.0)]
        assert graph[chain[1]["model"][0]]["inputs"] is chain[0]
        # the folder of a run's model has no style, and an export of it would be of another model
        assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "again")]) == 2
        assert "ink at 0.8 (transformer)" in capsys.readouterr().err
        with pytest.raises(ValueError, match="holds another run .its weights, styles differ"):
            train(recipe, plain_family(case), out=tmp_path / "run", prompts=["a digit", "a two"], options=OPTIONS)


def test_full_copies_export_the_style_inside(tmp_path):
    case = CASES["Wan"]
    recipe = dmd2(Common(steps=2, batch=2, critic_updates=1), iterations=1)
    run = train(recipe, family_of(styled(case, ink=0.8), case.size), out=tmp_path / "run", prompts=["a digit"], options=OPTIONS)
    card = (run.student / "README.md").read_text()
    assert "hold `ink`: do not load it again" in card and "set_adapters" not in card and not (run.student / "lora.safetensors").exists()
