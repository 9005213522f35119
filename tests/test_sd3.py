"""Stable Diffusion 3: images, three text encoders, on a tiny random pipeline against stock diffusers."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from fast import slow_but
from test_run import interrupted_before, same
from tiny import tiny_sd3_pipeline
from torch import Tensor

from instep.core.size import Size
from instep.data.prompt import Prompt
from instep.diffusion.guidance import predict_guided
from instep.export.verify import verify_export
from instep.models.backbone import Backbone
from instep.models.families import family_of
from instep.models.role import Role
from instep.models.sd3 import SD3, SD3Family
from instep.recipes.common import Common
from instep.recipes.dm_align import dm_align_group
from instep.recipes.dmd import dmd2
from instep.rewards.base import FunctionReward
from instep.training.execution import Execution
from instep.training.options import RunOptions
from instep.training.run import train

torch.set_num_threads(1)

SIZE = Size(16, 16, 1)
PROMPTS = [Prompt("a cat on a mat"), Prompt("a dog", negative="blurry"), Prompt("an eight"), Prompt("rain")]
COMMON = Common(steps=4, shift=3.0, batch=4, critic_updates=1, guidance=7.0)
QUICK = RunOptions(save_every=1, probe_every=50)
REWARD = FunctionReward(lambda media, prompts: media.mean((1, 2, 3)), name="brightness")


def family(layers: int = 2) -> SD3Family:
    found = family_of(tiny_sd3_pipeline(layers=layers), name="tiny3")
    assert isinstance(found, SD3Family)
    return found


def test_sizes_shapes_and_preset():
    fam = family()
    assert (fam.size, fam.latent_shape, fam.task, fam.shift, fam.preset) == (SIZE, (4, 8, 8), "text-to-image", 3.0, SD3)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    media = fam.decode(x)
    assert media.shape == (2, 3, 16, 16) and fam.encode_media(media.clamp(0, 1)).shape == x.shape
    with torch.no_grad():
        stock = fam.pipe.vae.decode(x / 1.5 + 0.06).sample / 2 + 0.5
    assert torch.equal(fam.decode(x).detach(), stock)
    for wrong in (Size(18, 16, 1), Size(16, 16, 9), Size(128, 16, 1)):
        with pytest.raises(ValueError, match="does not fit this model; it draws one image"):
            fam.at(wrong)
    with pytest.raises(ValueError, match="names a first frame, and tiny3 takes text alone"):
        fam.check_prompts([Prompt("a cat", image="cat.png")])


def test_text_is_encoded_as_the_pipeline_encodes_it():
    fam, pipe = family(), tiny_sd3_pipeline()
    cond, null = fam.encode(PROMPTS[:2]), fam.unconditional(PROMPTS[:2])
    texts, negatives = [p.text for p in PROMPTS[:2]], ["", "blurry"]
    text, negative, pooled, negative_pooled = pipe.encode_prompt(texts, None, None, negative_prompt=negatives, do_classifier_free_guidance=True)
    for ours, theirs in ((cond.text, text), (cond.pooled, pooled), (null.text, negative), (null.pooled, negative_pooled)):
        assert (ours - theirs).abs().max() <= 1e-5
    without = tiny_sd3_pipeline()
    without.register_modules(text_encoder_3=None, tokenizer_3=None)
    assert family_of(without, SIZE).encode(PROMPTS[:1]).text.shape[0] == 1, "T5 may be left out"


@pytest.mark.parametrize("level", [0.95, 0.6, 0.2])
@pytest.mark.parametrize("negative", [None, "blurry"])
@pytest.mark.parametrize("dual", [False, True])
def test_the_guided_teacher_takes_the_stock_pipelines_step(level, negative, dual):
    fam, pipe = SD3Family(tiny_sd3_pipeline(dual=dual), SIZE), tiny_sd3_pipeline(dual=dual)
    assert ("3.5" in fam.preset.source) == dual
    pipe.set_progress_bar_config(disable=True)
    prompt, seen = Prompt("a cat on a mat", negative=negative), []
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pipe.scheduler.set_timesteps(1)
    pipe.scheduler.step = lambda v, time, x, return_dict=False: (seen.append(v.clone()), (x,))[1]
    pipe.scheduler.set_timesteps = lambda *args, **kwargs: None
    pipe.scheduler.timesteps = torch.tensor([level * 1000])
    pipe(prompt.text, negative_prompt=negative, latents=x, height=16, width=16, num_inference_steps=1, guidance_scale=7.0, output_type="latent")
    teacher = Role("teacher", Backbone(fam, fam.pretrained))
    with torch.no_grad():
        ours = predict_guided(teacher, x, torch.tensor([level]), fam.encode([prompt]), fam.unconditional([prompt]), 7.0).x0
    stock = x - level * seen[0]
    assert (ours - stock).abs().max() <= 1e-5 * stock.abs().max()


def recipes(name: str, rank: int | None):
    common = Common(**{**vars(COMMON), "lora_rank": rank})
    return dmd2(common, iterations=3, gan=0.01) if name == "dmd2" else dm_align_group(common, distil=1, iterations=2, group=2)


def stock(pipe, guidance: float = 1.0) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    return family().stock_sample(pipe, PROMPTS[:2], steps=4, guidance=guidance, output="latent")


@pytest.mark.parametrize(
    ("name", "rank"),
    slow_but([("dm-align-group", 4)], product(("dm-align-group", "dmd2"), (4, None))),
)
def test_killed_and_resumed_it_ends_the_same_and_stock_diffusers_samples_alike(tmp_path, name, rank):
    from diffusers import StableDiffusion3Pipeline

    options = RunOptions(save_every=1, probe_every=50, teacher_samples=4, execution=Execution(checkpointing="on" if rank else "off"))
    parts = {"prompts": PROMPTS, "reward": REWARD, "options": options}
    whole = train(recipes(name, rank), family(), out=tmp_path / "whole", **parts)
    with interrupted_before(2):
        train(recipes(name, rank), family(), out=tmp_path / "cut", **parts)
    same(whole.out, train(recipes(name, rank), family(), out=tmp_path / "cut", **parts).out)
    pipe = StableDiffusion3Pipeline.from_pretrained(whole.student, local_files_only=True)
    drawn = stock(pipe)
    levels, scale = whole.recipe.levels, float(drawn.abs().max())
    assert verify_export(whole.student, levels, prompts=PROMPTS[:2], size=SIZE) <= 1e-6 * scale
    assert verify_export(whole.student, [*levels[:3], 0.4], prompts=PROMPTS[:2], size=SIZE) > 1e-3, "other levels are other images"
    assert (stock(tiny_sd3_pipeline()) - drawn).abs().max() > 1e-3
    if rank is not None:
        base = tiny_sd3_pipeline()
        base = StableDiffusion3Pipeline(**{**base.components, "scheduler": pipe.scheduler})
        plain = stock(base)
        base.load_lora_weights(str(whole.student), weight_name="lora.safetensors")
        adapted = stock(base)
        assert (adapted - drawn).abs().max() <= 1e-5 * scale < (plain - drawn).abs().max()
    card = (Path(whole.student) / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-to-image" in card and 'image.save("image.png")' in card and "num_frames" not in card


def test_blocks_can_be_skipped_and_features_are_the_images_tokens():
    fam = family(layers=3)
    role = Role("fake", Backbone(fam, fam.new_backbone()), head=True, exits=4)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([0.7, 0.7]), fam.encode(PROMPTS[:2]).at_exit(torch.tensor([0, 3]))
    assert role(x, t, cond).logit.shape == (2,)
    with torch.no_grad():
        whole, skipped = (one(x, t, cond).x0 for one in (role, role.skipping([1])))
        theirs = fam.pretrained(x, cond.text, cond.pooled, t * 1000, return_dict=False, skip_layers=[1])[0]
    assert (skipped - (x - 0.7 * theirs)).abs().max() <= 1e-5 and (whole - skipped).abs().max() > 1e-4


def test_the_commands_take_it(tmp_path, capsys):
    from instep.cli.main import main

    tiny_sd3_pipeline().save_pretrained(tmp_path / "model")
    assert main(["sample", str(tmp_path / "model"), "--prompts", "a cat", "--copies", "2", "--out", str(tmp_path / "s.webp")]) == 0
    assert (tmp_path / "s.webp").stat().st_size > 50
    assert "28 steps, guidance 7" in capsys.readouterr().out, "as the model's card samples it"
    small = ["--steps", "2", "--batch", "2", "--critic-updates", "1", "--iterations", "1", "--size", "16", "16", "1"]
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    paths = ["--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "run")]
    assert main(["train", "dmd2", *paths, *small]) == 0
    assert (tmp_path / "run" / "report.html").is_file()
    capsys.readouterr()
    assert main(["plan", "dmd2", "--model", str(tmp_path / "model"), "--size", "16", "16", "1"]) == 0
    assert "stage match" in capsys.readouterr().out
