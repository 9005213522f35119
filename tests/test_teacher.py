"""A teacher of another size than the student: the same force as its own network gives, refused where latents, texts or levels differ."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tiny import FRAMES, HEIGHT, WIDTH, tiny_sd3_pipeline, tiny_wan22_pipeline, tiny_wan_pipeline
from tiny_families import tiny_sdxl_pipeline

from instep.core.size import Size
from instep.models.backbone import Backbone
from instep.models.families import family_of
from instep.models.role import Role
from instep.models.teacher import as_teacher, teacher_in
from instep.planning.trace import Model
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.recipes.dmdr import dmdr
from instep.training.build import make_roles
from instep.training.execution import Execution
from instep.training.options import RunOptions
from instep.training.run import train

SIZE, IMAGE = Size(HEIGHT, WIDTH, FRAMES), Size(16, 16, 1)
OPTIONS = RunOptions(save_every=50, probe_every=50)


def rebuilt(pipe: Any, **parts: Any) -> Any:
    return type(pipe)(**{**pipe.components, **parts})


@cache
def student() -> Any:
    return tiny_wan_pipeline()


@cache
def large() -> Any:
    """The teacher's pipeline: twice as wide and three blocks deep, with the student's VAE and text encoder."""
    from diffusers import WanTransformer3DModel

    config = {key: value for key, value in student().transformer.config.items() if not key.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        transformer = WanTransformer3DModel(**{**config, "num_attention_heads": 4, "num_layers": 3}).eval()
    return rebuilt(student(), transformer=transformer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "large"
    large().save_pretrained(path)
    return path


def family() -> Any:
    return family_of(student(), SIZE, "small")


def recipe(rank: int | None = None, **options: Any) -> Any:
    return dmd2(Common(steps=2, batch=2, critic_updates=1, lora_rank=rank, **options), iterations=1)


@pytest.mark.parametrize("rank", [None, 2])
def test_the_teacher_alone_runs_on_the_other_network(rank, folder):
    """The role teacher predicts what the large model alone predicts; student and fake begin as the small one. From a folder as from a pipeline."""
    mine = family()
    x = torch.randn(2, *mine.latent_shape, generator=torch.Generator().manual_seed(0))
    t, cond = torch.tensor([0.3, 0.9]), mine.encode(["a digit", "a two"])
    alone = family_of(large(), SIZE)
    with torch.no_grad():
        small, big = (Role("teacher", Backbone(each, each.new_backbone()))(x, t, cond).v for each in (mine, alone))
        assert not torch.allclose(small, big)
        for taught in (teacher_in(folder, mine), as_teacher(alone, mine)):
            roles = make_roles(recipe(rank, condition_on_exit=False), mine, teacher=taught)
            assert torch.allclose(roles["teacher"](x, t, cond).v, big, atol=1e-6)
            for name in ("student", "fake"):
                assert torch.allclose(roles[name](x, t, cond).v, small, atol=1e-6), name
            assert not any(p.requires_grad for p in roles["teacher"].backbone.module.parameters())
    theirs = teacher_in(folder, mine).pipe.text_encoder
    assert theirs.shared.weight.data_ptr() == mine.pipe.text_encoder.shared.weight.data_ptr(), "text encoders are in memory once"


def trained(out: Any, offload: bool = False, **options: Any) -> Any:
    kept = replace(OPTIONS, execution=Execution(offload=offload))
    return train(recipe(2), family(), out=out, prompts=["a digit"], options=kept, **options)


def test_a_run_with_another_teacher(folder, tmp_path):
    """The record, the card and a resumed run know the teacher."""
    run = trained(tmp_path / "run", teacher=folder)
    record = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert record["teacher"]["model"] == "large" and record["teacher_path"] == str(folder)
    assert "taught by `large`" in (run.student / "README.md").read_text()
    with pytest.raises(ValueError, match="holds another run .its teacher differ"):
        trained(tmp_path / "run")


@pytest.mark.slow
def test_networks_take_turns_beside_another_teacher(folder, tmp_path):
    runs = [trained(tmp_path / name, offload=name == "offload", teacher=None if name == "own" else folder) for name in ("plain", "offload", "own")]
    plain, offloaded, own = (run.state.trained["student"].state() for run in runs)
    assert all(torch.allclose(a, offloaded[key], atol=1e-6) for key, a in plain.items())
    assert any(not torch.allclose(a, own[key], atol=1e-6) for key, a in plain.items()), "the teacher matters"


def with_other(name: str) -> Any:
    """The large pipeline with something that the student does not share."""
    from diffusers import WanTransformer3DModel

    pipe = large()
    if name == "text":
        config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
        return rebuilt(pipe, transformer=WanTransformer3DModel(**{**config, "text_dim": 24}))
    if name == "encoder":
        return rebuilt(pipe, text_encoder=tiny_wan_pipeline(5).text_encoder)
    if name == "vae":
        vae = copy.deepcopy(pipe.vae)
        vae.register_to_config(latents_mean=[1.0] * 16)
        return rebuilt(pipe, vae=vae)
    return {"experts": tiny_wan22_pipeline, "images": tiny_sd3_pipeline}[name]()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("text", r"its shape of a text: text \[512, 24\], and the student's text \[512, 16\]"),
        ("encoder", r"the weights of its text_encoder differ from the student's \(.*\); both read one encoding of a prompt"),
        ("vae", r"the latents_mean of its vae is \[1.0, .*, and that of the student's"),
        ("experts", r"it is .*Wan22Family, and the student .*WanFamily; give one of the student's family"),
        ("images", r"it is .*SD3Family, and the student .*WanFamily"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(other, message, tmp_path):
    pipe = with_other(other)
    for given in (family_of(pipe), tmp_path / "theirs"):
        if given == tmp_path / "theirs":
            pipe.save_pretrained(given)
        with pytest.raises(ValueError, match=f"^teacher: .* cannot teach this student: {message}") as error:
            (as_teacher if not hasattr(given, "is_dir") else teacher_in)(given, family())
        assert "\n" not in str(error.value)


def test_a_folder_that_is_none_is_named_as_the_teacher(tmp_path):
    with pytest.raises(ValueError, match="^teacher: 'Wan-AI/Big' is not a model folder; if it is a name on the hub: hf download"):
        train(recipe(), family(), out=tmp_path / "run", prompts=["a digit"], teacher="Wan-AI/Big")


def test_levels_and_prediction_have_to_agree():
    from diffusers import EulerDiscreteScheduler

    pipe = tiny_sdxl_pipeline()
    mine, config = family_of(pipe, IMAGE), {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    for change, message in (({"beta_end": 0.02}, "its noise levels: they differ"), ({"prediction_type": "v_prediction"}, "its prediction_type: v_prediction")):
        other = rebuilt(pipe, scheduler=EulerDiscreteScheduler.from_config({**config, **change}))
        with pytest.raises(ValueError, match=message):
            as_teacher(family_of(other, IMAGE), mine)


def test_an_adapter_of_the_fake_does_not_fit_the_teacher(tmp_path):
    common = Common(steps=2, batch=2, critic_updates=1, lora_rank=2)
    with pytest.raises(ValueError, match="teacher: stage 'tilt' of dmdr moves the teacher by the fake's adapter.*dyna_dg 0"):
        train(
            dmdr(common, warm=1, iterations=1, group=2),
            family(),
            out=tmp_path / "run",
            prompts=["a digit"],
            reward=lambda media, prompts: media.mean((1, 2, 3, 4)),
            teacher=family_of(large(), SIZE),
        )


def test_a_plan_counts_the_teacher():
    """The whole teacher's weights and FLOPs, as traced at its own depth."""
    deep, mine = family_of(rebuilt(large(), transformer=tiny_wan_pipeline(layers=11).transformer), SIZE).placed("meta"), family().placed("meta")
    execution = Execution(device="meta")
    found = Model(recipe(), mine, execution, teacher=as_teacher(deep, mine))
    whole = Model(recipe(), mine, execution)
    stage = recipe().stages[0]
    one, own, alone = found.trace(stage), whole.trace(stage), Model(recipe(), deep, execution).trace(stage)
    assert len(found.depths) == 2
    teacher = [sum(count for (label, _), count in trace.flops.items() if label == "teacher") for trace in (one, own, alone)]
    assert teacher[0] == pytest.approx(teacher[2], rel=1e-6) and teacher[0] > 2 * teacher[1]
    frozen = [trace.memory()["frozen weights"] for trace in (one, own)]
    expected = sum(p.nbytes for p in deep.pretrained.parameters()) - sum(p.nbytes for p in mine.pretrained.parameters())
    assert frozen[0] - frozen[1] == pytest.approx(expected, rel=0.01)
