"""Negative prompts: what guidance leads away from, as the stock pipelines do it, in every batch, and as a part of a run's identity."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from little_drawn import whole_probes
from test_run import EVERY, PROMPTS, family, interrupted_before, same
from test_run_family import SHORT
from tiny import tiny_cogvideox_pipeline, tiny_wan_i2v_pipeline

from instep.bundled import load
from instep.bundled.drawn_frames import first_frame
from instep.bundled.moving_digits_i2v import MovingDigitsImageFamily
from instep.cli.main import main
from instep.core.size import Size
from instep.data.prompt import Prompt, as_prompts, with_negative
from instep.data.samples import RealSamples
from instep.diffusion.guidance import GuidedDenoiser
from instep.models.backbone import Backbone
from instep.models.cogvideox import CogVideoXFamily
from instep.models.role import Role
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.training.batches import BatchSource
from instep.training.run import train

NEGATIVE = "dark, blurry digits"
GIVEN = [Prompt(PROMPTS[0], negative=NEGATIVE), Prompt(PROMPTS[1]), Prompt(PROMPTS[2], negative="an eight")]


def by_the_pipelines_levels(fam, prompts, noise, guidance=3.0):
    """The family's guided sampler in four steps at the levels of the pipeline's own scheduler."""
    fam.pipe.scheduler.set_timesteps(4)
    levels, x, teacher = fam.pipe.scheduler.sigmas.tolist(), noise, Role("teacher", Backbone(fam, fam.new_backbone()))
    guided, cond = GuidedDenoiser(teacher, fam.unconditional(prompts), guidance), fam.encode(prompts)
    for t, s in zip(levels[:-1], levels[1:], strict=True):
        x = x + (s - t) * guided(x, torch.full((len(x),), t), cond).v
    return x


@torch.no_grad()
def test_guidance_leads_away_from_it_as_in_the_stock_pipeline():
    """Wan's own call with `negative_prompt`, same noise, same levels; rows with and without one in one batch."""
    fam = family()
    noise = torch.randn(3, *fam.latent_shape, generator=torch.Generator().manual_seed(3))
    ours, plain = (by_the_pipelines_levels(fam, prompts, noise) for prompts in (GIVEN, [prompt.text for prompt in GIVEN]))
    fam.pipe.set_progress_bar_config(disable=True)
    size = {"height": fam.size.height, "width": fam.size.width, "num_frames": fam.size.frames}
    theirs = fam.pipe(
        prompt=[prompt.text for prompt in GIVEN],
        negative_prompt=[NEGATIVE, "", "an eight"],
        **size,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=noise,
        output_type="latent",
    ).frames
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert torch.equal(ours[1], plain[1]) or (ours[1] - plain[1]).abs().max() < 1e-5
    assert all((ours[i] - plain[i]).abs().max() > 1e-2 for i in (0, 2)), "the negative prompt matters"


@torch.no_grad()
def test_an_image_to_video_model_leads_away_from_another_text_of_the_same_first_frame():
    fam = MovingDigitsImageFamily(tiny_wan_i2v_pipeline(), Size(48, 48, 9))
    prompts = [Prompt(PROMPTS[0], "train/0", NEGATIVE), Prompt(PROMPTS[1], "train/1")]
    noise = torch.randn(2, *fam.latent_shape, generator=torch.Generator().manual_seed(3))
    ours = by_the_pipelines_levels(fam, prompts, noise)
    fam.pipe.set_progress_bar_config(disable=True)
    options = {"height": 48, "width": 48, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    theirs = [
        fam.pipe(image=first_frame(p, fam.size)[None], prompt=p.text, negative_prompt=p.negative, latents=x[None], **options).frames
        for p, x in zip(prompts, noise, strict=True)
    ]
    assert (ours - torch.cat(theirs)).abs().max() < 2e-4


@torch.no_grad()
def test_the_unconditional_rows_of_every_family():
    """One row a prompt; without negative prompts those of the empty text, whatever else is in the batch."""
    digits = load("digits")
    assert digits.unconditional(["3", Prompt("4", negative="7"), Prompt("5", negative="")]).label.tolist() == [10, 7, 10]
    with pytest.raises(ValueError, match="'seventy' is no class of digits"):
        digits.unconditional([Prompt("3", negative="seventy")])
    for fam in (family(), CogVideoXFamily(tiny_cogvideox_pipeline())):
        whole, plain, empty, named = fam.unconditional(GIVEN), fam.unconditional(PROMPTS), fam.encode([""] * 4), fam.encode([NEGATIVE])
        assert torch.equal(plain.text, empty.text) and len(whole) == 3
        width = named.text.shape[1]
        torch.testing.assert_close(whole.text[0, :width], named.text[0], rtol=0, atol=1e-6)
        assert torch.equal(whole.text[1, : plain.text.shape[1]], plain.text[1])


def test_the_stock_pipeline_gets_it_where_it_is_guided():
    fam = family()
    fam.pipe.set_progress_bar_config(disable=True)

    def drawn(prompts, guidance):
        torch.manual_seed(0)
        return fam.stock_sample(fam.pipe, as_prompts(prompts), steps=2, guidance=guidance, output="latent")

    negative = with_negative(PROMPTS[:2], NEGATIVE)
    assert torch.equal(drawn(negative, 1.0), drawn(PROMPTS[:2], 1.0))
    assert (drawn(negative, 3.0) - drawn(PROMPTS[:2], 3.0)).abs().max() > 1e-2


def test_batches_carry_it_beside_their_prompts():
    fam = family()
    stage = dmd2(Common(batch=4)).stages[0]
    batch = BatchSource(fam, GIVEN, None, 0).next(stage)[0]
    assert set(batch.prompts) <= set(GIVEN) and torch.equal(batch.null.text, fam.unconditional(batch.prompts).text)


def few(gan=0.0, **other):
    return dmd2(replace(SHORT, **other), iterations=2, gan=gan)


def test_it_is_a_part_of_the_runs_identity_and_goes_on_with_it(tmp_path):
    options = replace(EVERY, teacher_samples=4)
    recipe, parts = few(guidance=3.0), {"prompts": PROMPTS, "negative_prompt": NEGATIVE, "options": options}
    with interrupted_before(1):
        train(recipe, family(), out=tmp_path / "cut", **parts)
    for other in (None, "bright"):
        with pytest.raises(ValueError, match=r"holds another run \(its prompts, negative_prompt differ"):
            train(recipe, family(), out=tmp_path / "cut", **{**parts, "negative_prompt": other})
    run = train(recipe, family(), out=tmp_path / "cut", **parts)
    whole = train(recipe, family(), out=tmp_path / "whole", **parts)
    same(run.out, whole.out)
    record = json.loads((run.out / "recipe.json").read_text())
    assert record["negative_prompt"] == NEGATIVE and Prompt.parse(record["example_prompt"]) == Prompt(PROMPTS[0], negative=NEGATIVE)
    plain = train(recipe, family(), out=tmp_path / "plain", prompts=PROMPTS, options=options)
    with pytest.raises(AssertionError, match="weights differ"):
        same(plain.out, whole.out)


def test_real_samples_and_the_monitors_prompts_get_it_too(tmp_path):
    seen = []

    class Monitor:
        open_prompts, open_copies = ("a digit",), 2

        def metrics(self, media, prompts):
            seen.extend(prompts)
            return {}

        def modes(self, media):
            return 1.0

    fam = family()
    asked, unconditional = [], fam.unconditional
    fam.unconditional = lambda prompts: asked.extend(prompts) or unconditional(prompts)
    real = RealSamples(tuple(PROMPTS), torch.randn(4, *fam.latent_shape, generator=torch.Generator().manual_seed(0)))
    with whole_probes():
        train(few(guidance=3.0, gan=0.1), fam, out=tmp_path / "run", prompts=GIVEN, negative_prompt="bright", real=real, monitor=Monitor(), options=EVERY)
    assert set(seen) == {prompt.text for prompt in GIVEN}, "a monitor gets texts"
    negatives = {prompt.text: prompt.negative for prompt in asked if isinstance(prompt, Prompt)}
    assert negatives["a digit"] == "bright" and {prompt.negative for prompt in asked} - {None} == {NEGATIVE, "an eight", "bright"}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_without_guidance_a_run_says_that_it_has_no_effect(tmp_path, capsys, guidance):
    train(few(guidance=guidance), family(), out=tmp_path / "run", prompts=PROMPTS, negative_prompt=NEGATIVE, options=replace(EVERY, teacher_samples=4))
    assert ("negative prompts have no effect in this run" in capsys.readouterr().out) == (guidance == 1)


def test_on_the_command_line(tmp_path, capsys):
    given = ["--iterations", "1", "--batch", "2", "--critic-updates", "1", "--steps", "1", "--no-evaluate", "--negative-prompt", NEGATIVE]
    (tmp_path / "p.txt").write_text("a seven\nan eight [negative: a digit]\n")
    assert main(["train", "dmd2", *given, "--out", str(tmp_path / "run"), "--prompts", str(tmp_path / "p.txt"), "--teacher-samples", "2"]) == 0
    record = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert record["negative_prompt"] == NEGATIVE
    assert {row["prompt"] for row in json.loads((tmp_path / "run" / "samples.json").read_text())["rows"]} == {
        f"a seven [negative: {NEGATIVE}]",
        "an eight [negative: a digit]",
    }
    capsys.readouterr()
    sample = ["sample", "moving-digits", "--prompts", "a seven", "--copies", "1", "--steps", "2", "--negative-prompt", "an eight"]
    assert main([*sample, "--out", str(tmp_path / "a.webp")]) == 0
    assert "row 1: a seven [negative: an eight]" in capsys.readouterr().out
    assert main([*sample[:-2], "--out", str(tmp_path / "b.webp")]) == 0
    assert (tmp_path / "a.webp").read_bytes() != (tmp_path / "b.webp").read_bytes()
    assert main([*sample, "--guidance", "1", "--out", str(tmp_path / "c.webp")]) == 0
    assert "negative prompts have no effect" in capsys.readouterr().out
