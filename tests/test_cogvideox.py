"""CogVideoX as a family, on a tiny random pipeline: its schedule, its readings and samplers are the stock ones, and a student leaves as a stock folder."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from test_run import rows
from tiny import tiny_cogvideox_pipeline

from instep.core.size import Size
from instep.diffusion.levels import few_step_levels
from instep.diffusion.path import RectifiedFlow, VariancePreserving
from instep.diffusion.prediction import eps_of_x0, score_of_x0, to_prediction, velocity_of_x0
from instep.diffusion.sampling import Sampling, sample_few_step, sample_ode
from instep.diffusion.transitions import CPS, Deterministic, Renoise
from instep.export import export_many_step, export_student, few_step_scheduler, verify_export
from instep.export.card import ExportInfo
from instep.export.scheduler_vp import float32_betas
from instep.lab.mixture import ExactTeacher, Mixture, labels
from instep.models import load
from instep.models.backbone import Backbone
from instep.models.cogvideox import AXES, CogVideoXFamily, noise_path
from instep.models.role import Role
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.training.execution import Execution
from instep.training.options import RunOptions
from instep.training.run import train

F64 = torch.float64
SIZE = Size(32, 32, 9)
PROMPTS = ["a seven moving left fast", "a digit", "an eight", "a two standing still"]
SHORT = Common(steps=2, batch=2, critic_updates=1, shift=1.0)
INFO = ExportInfo(
    recipe="dmd2",
    base_model="cogvideox",
    seed=0,
    command="instep train dmd2",
    instep_version="0.0",
    training_prompts=4,
    size=SIZE,
    example_prompt=PROMPTS[0],
)


def family(**options) -> CogVideoXFamily:
    return CogVideoXFamily(tiny_cogvideox_pipeline(**options), SIZE, name="tiny")


def role(fam: CogVideoXFamily) -> Role:
    return Role("student", Backbone(fam, fam.new_backbone()))


def stock_call(pipe, steps, *, guidance=1.0, seed=5, **more):
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(seed)
    return pipe(
        PROMPTS[:2], height=32, width=32, num_frames=9, num_inference_steps=steps, guidance_scale=guidance, generator=rng, output_type="latent", **more
    ).frames


# ----------------------------------------------------------------------------------------------------------------- path


@pytest.mark.parametrize("options", [{}, {"snr_shift_scale": 1.0}, {"rescale_betas_zero_snr": False}])
def test_the_paths_table_is_the_schedulers(options):
    from diffusers import CogVideoXDDIMScheduler

    stock = CogVideoXDDIMScheduler.from_config({**tiny_cogvideox_pipeline().scheduler.config, **options})
    path = noise_path(stock)
    assert torch.equal(path.table()[1:], stock.alphas_cumprod)
    t = torch.arange(1, 1001, dtype=F64) / 1000
    assert torch.equal(path.alpha_bar(t), stock.alphas_cumprod)
    assert torch.equal(path.training_step(t.float()), torch.arange(1000.0))
    assert path.a(torch.ones(1)).item() == (0.0 if stock.config.rescale_betas_zero_snr else pytest.approx(stock.alphas_cumprod[-1].item() ** 0.5))
    assert path.alpha_bar(torch.zeros(1)).item() == 1


def test_the_5b_models_scheduler_gives_the_same_table():
    from diffusers import CogVideoXDPMScheduler

    config = tiny_cogvideox_pipeline().scheduler.config
    assert noise_path(CogVideoXDPMScheduler.from_config(config)) == noise_path(tiny_cogvideox_pipeline().scheduler)


def test_training_steps_of_the_papers_levels():
    path = noise_path(tiny_cogvideox_pipeline().scheduler)
    assert path.training_step(torch.tensor(few_step_levels(4))).tolist() == [999, 749, 499, 249]
    assert path.training_step(torch.tensor([0.0, 0.00005, 0.5005])).tolist() == pytest.approx([0, 0, 499.5])


def test_alpha_bar_falls_without_a_jump_to_zero():
    path = noise_path(tiny_cogvideox_pipeline().scheduler)
    t = torch.linspace(0.99, 1, 4001, dtype=F64)
    a = path.a(t)
    assert bool((a.diff() < 0).all()) and a[-1] == 0
    last = a[t >= 0.999]
    torch.testing.assert_close(last.diff(), last.diff()[:1].expand(len(last) - 1), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("bars", [(0.9, 0.95), (0.9, 0.0, 0.0), (1.0, 0.5), (0.9, float("nan")), (0.9, -0.1)])
def test_tables_that_are_no_schedule_are_refused(bars):
    with pytest.raises(ValueError, match="alpha_bars: .* is not allowed; they fall strictly"):
        VariancePreserving(alpha_bars=bars)


def test_one_of_the_two_tables_is_given():
    with pytest.raises(ValueError, match="betas, alpha_bars: empty"):
        VariancePreserving()
    with pytest.raises(ValueError, match="both are given"):
        VariancePreserving((0.1,), (0.9,))


def test_a_table_of_alpha_bars_is_that_of_its_betas():
    betas = VariancePreserving.scaled_linear()
    bars = VariancePreserving(alpha_bars=tuple(betas.table()[1:].tolist()))
    t = torch.linspace(0, 1, 777, dtype=F64)
    torch.testing.assert_close(bars.alpha_bar(t), betas.alpha_bar(t), rtol=1e-12, atol=0)


def test_everything_holds_at_pure_noise():
    """At a = 0: x_t is the noise, whatever x0; no reading, transition or sampler divides by a."""
    path = noise_path(tiny_cogvideox_pipeline().scheduler)
    x0, eps, t = torch.randn(3, 4, dtype=F64), torch.randn(3, 4, dtype=F64), torch.ones(3, dtype=F64)
    x_t = path.renoise(x0, eps, t)
    assert torch.equal(x_t, eps)
    torch.testing.assert_close(velocity_of_x0(path, x_t, t, x0), eps - x0)
    torch.testing.assert_close(eps_of_x0(path, x_t, t, x0), eps)
    torch.testing.assert_close(score_of_x0(path, x_t, t, x0), -eps)
    for kind, raw in (("v_prediction", -x0), ("velocity", eps - x0), ("x0", x0)):
        seen = to_prediction(kind, raw, path, x_t, t)
        torch.testing.assert_close(seen.x0, x0)
        torch.testing.assert_close(seen.v, eps - x0)
    below = torch.full_like(t, 0.75)
    torch.testing.assert_close(Deterministic().gaussian(path, x0, x_t, t, below)[0], path.renoise(x0, eps, below))
    for transition in (Renoise(), CPS(0.7)):
        x = transition.step(path, x0, x_t, torch.randn_like(eps), t, below)
        assert transition.log_prob(path, x0, x_t, x, t, below).isfinite().all()


def test_the_exact_mixture_is_sampled_from_zero_terminal_snr():
    path, ring = noise_path(tiny_cogvideox_pipeline().scheduler), Mixture.ring()
    ring = Mixture(ring.means.double(), ring.sigma, ring.classes)
    cond = labels([""] * 512)
    noise = torch.randn(512, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    x = sample_ode(ExactTeacher(ring, path), cond, cond, noise, steps=100, path=path)
    distance = (x[:, None] - ring.means).norm(dim=-1).min(1).values
    assert x.isfinite().all() and distance.mean() < 2.5 * ring.sigma


# --------------------------------------------------------------------------------------------------- readings, samplers


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("step", [999, 749, 249, 19])
def test_our_reading_is_the_stock_schedulers(rotary, step):
    fam = family(rotary=rotary)
    pipe, cond = fam.pipe, fam.encode(PROMPTS[:2])
    x = torch.randn(2, *fam.latent_shape, generator=torch.Generator().manual_seed(1))
    text, _ = pipe.encode_prompt(PROMPTS[:2], do_classifier_free_guidance=False)
    torch.testing.assert_close(cond.text, text, rtol=0, atol=0)
    seen = x.permute(AXES).contiguous()
    turns = pipe._prepare_rotary_positional_embeddings(32, 32, 3, "cpu") if rotary else None
    with torch.no_grad():
        raw = pipe.transformer(seen, text, torch.full((2,), step), image_rotary_emb=turns, return_dict=False)[0]
        ours = Role("teacher", Backbone(fam, fam.pretrained))(x, torch.full((2,), (step + 1) / 1000), cond)
    pipe.scheduler.set_timesteps(50)
    theirs = pipe.scheduler.step(raw, step, seen).pred_original_sample.permute(AXES)
    assert (ours.x0 - theirs).abs().max() <= 1e-6
    assert (theirs - x).abs().max() > 0.1


@pytest.mark.parametrize(("steps", "guidance", "rotary"), [(4, 1.0, True), (5, 3.0, False), (50, 1.0, False)])
def test_our_ode_sampler_is_the_stock_ddim_pipeline(steps, guidance, rotary):
    """Both take the steps 1000 k / n - 1 ("trailing") where n divides 1000, and end at alpha-bar 1."""
    fam = family(rotary=rotary)
    theirs = stock_call(fam.pipe, steps, guidance=guidance)
    noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(5)).permute(AXES)
    teacher = Role("teacher", Backbone(fam, fam.pretrained))
    ours = sample_ode(teacher, fam.encode(PROMPTS[:2]), fam.unconditional(PROMPTS[:2]), noise, steps=steps, path=fam.path, shift=fam.shift, guidance=guidance)
    assert (ours.permute(AXES) - theirs).abs().max() <= 1e-5
    assert (ours.permute(AXES) - stock_call(fam.pipe, steps + 1, guidance=guidance)).abs().max() > 1e-3


def test_decoding_is_the_pipelines_and_has_a_gradient_everywhere():
    fam = family()
    x = 3 * torch.randn(2, *fam.latent_shape, generator=torch.Generator().manual_seed(0))
    media = fam.decode(x)
    assert media.shape == (2, 3, 9, 32, 32)
    theirs = fam.pipe.decode_latents(x.permute(AXES))
    torch.testing.assert_close(media, theirs / 2 + 0.5, rtol=1e-5, atol=1e-5)
    shown = fam.pipe.video_processor.postprocess_video(video=theirs, output_type="pt")
    torch.testing.assert_close(media.clamp(0, 1), shown.transpose(1, 2), rtol=1e-5, atol=1e-5)
    # random weights draw grey; an offset out of the range must not end the gradient
    fam.pipe.vae.decoder.conv_out.conv.bias.data += 50
    x = x[:1].clone().requires_grad_()
    media = fam.decode(x)
    assert media.min() > 1
    (slope,) = torch.autograd.grad(media.sum(), x)
    assert slope.abs().flatten(2).amax(-1).min() > 0


def test_latents_of_media_are_what_the_transformer_sees():
    fam = family()
    media = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0))
    x = fam.encode_media(media)
    assert x.shape == (1, *fam.latent_shape)
    torch.testing.assert_close(x / 0.7, fam.pipe.vae.encode(media * 2 - 1).latent_dist.mode())


# --------------------------------------------------------------------------------------------------------------- family


def test_what_the_protocol_asks():
    fam = family()
    module = fam.new_backbone()
    assert fam.latent_shape == (4, 3, 4, 4) and fam.prediction_type == "v_prediction" and fam.shift == 1
    assert fam.time_width(module) == 24 and fam.feature_width(module) == 32
    backbone = Backbone(fam, module)
    critic = Role("fake", backbone, exits=2, head=True)
    x, cond, t = torch.randn(2, *fam.latent_shape), fam.encode(PROMPTS[:2]), torch.tensor([0.5, 1.0])
    torch.nn.init.normal_(critic.head.logit.weight)
    plain = critic(x, t, cond)
    torch.nn.init.normal_(critic.exits.weight)
    told = critic(x, t, cond.at_exit(torch.tensor([0, 1])))
    assert plain.logit.shape == (2,) and (told.x0 - plain.x0).abs().max() > 1e-4
    seen = []
    fam.feature_block(module).register_forward_hook(lambda m, a, out: seen.append(out.shape))
    critic(x, t, cond)
    assert seen == [(2, 12, 32)], "video tokens alone, once a forward"
    again = Role("fake", Backbone(fam, copy.deepcopy(module)), head=True)
    assert again(x, t, cond).logit.shape == (2,), "a copy of a watched module shows its tokens once"


def test_one_text_beside_another_and_without_limit():
    fam = family()
    many = [f"{i} things" for i in range(30)]
    first = fam.encode(many[:3]).text
    fam.prompt_cache.limit = 20 * fam.prompt_cache.nbytes // 3
    fam.encode(many)
    assert fam.prompt_cache.nbytes == fam.prompt_cache.limit
    assert torch.equal(fam.encode(many[:3]).text, first), "encoded again, it is the same"
    assert fam.unconditional(PROMPTS[:2]).text.shape == (2, 226, 16)
    assert torch.equal(fam.unconditional(["a cat"]).text, fam.encode([""]).text)


def test_variants_and_sizes_that_do_not_fit_are_named(tmp_path):
    pipe = tiny_cogvideox_pipeline()
    for size in (Size(24, 32, 9), Size(32, 40, 9), Size(32, 32, 5)):
        with pytest.raises(ValueError, match="height and width are multiples of 16, frames are 8 k . 1"):
            CogVideoXFamily(pipe, size)
    for key, value, text in (
        ("in_channels", 8, "image-to-video"),
        ("max_text_seq_length", 64, "max_text_seq_length: 64"),
    ):
        other = tiny_cogvideox_pipeline()
        other.transformer.register_to_config(**{key: value})
        with pytest.raises(ValueError, match=text):
            CogVideoXFamily(other, SIZE)
    pipe.scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(ValueError, match="prediction_type: the scheduler's is 'epsilon'"):
        CogVideoXFamily(pipe, SIZE)


# --------------------------------------------------------------------------------------------------------------- export


def test_the_few_step_scheduler_after_saving_and_loading(tmp_path):
    from diffusers import LCMScheduler

    path = noise_path(tiny_cogvideox_pipeline().scheduler)
    for n in (1, 2, 4, 5, 8, 10):
        few_step_scheduler(path, few_step_levels(n), "v_prediction").save_pretrained(tmp_path)
        loaded = LCMScheduler.from_pretrained(tmp_path)
        loaded.set_timesteps(n)
        # no boundary condition is left, down to the first step
        skip, out = loaded.get_scalings_for_boundary_condition_discrete(torch.arange(1, 1000))
        assert skip.max() < 1e-12 and bool((out == 1).all())
        assert loaded.timesteps.tolist() == [1000 * k // n - 1 for k in range(n, 0, -1)]
        assert (loaded.alphas_cumprod.double() - path.table()[1:]).abs().max() < 1e-7 and loaded.alphas_cumprod[-1] == 0
    few_step_scheduler(path, (1.0, 0.667, 0.334), "v_prediction")
    assert len(float32_betas(path)) == 1000 and float32_betas(path)[-1] == 1


@pytest.mark.parametrize("levels", [few_step_levels(4, 3.0), few_step_levels(3), (1.0, 0.001), (1.0, 0.5, 0.0), (0.9, 0.5)])
def test_levels_that_no_stock_scheduler_gives_are_refused(levels):
    path = noise_path(tiny_cogvideox_pipeline().scheduler)
    with pytest.raises(ValueError, match="levels"):
        few_step_scheduler(path, levels, "v_prediction")


def test_readings_that_no_stock_scheduler_has_are_refused():
    path = noise_path(tiny_cogvideox_pipeline().scheduler)
    for kind in ("velocity", "eps"):
        with pytest.raises(ValueError, match="prediction_type"):
            few_step_scheduler(path, few_step_levels(4), kind)
    with pytest.raises(ValueError, match="no stock scheduler re-noises for 'x0' on RectifiedFlow"):
        few_step_scheduler(RectifiedFlow(), few_step_levels(4), "x0")


@pytest.mark.parametrize(("n", "rotary"), [(1, False), (2, True), (4, False)])
def test_an_exported_student_samples_like_ours(tmp_path, n, rotary):
    from diffusers import CogVideoXPipeline, LCMScheduler

    fam, levels = family(rotary=rotary), few_step_levels(n)
    student = role(fam)
    with torch.no_grad():
        for p in student.backbone.module.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    report = export_student(fam, student.backbone.module, levels, tmp_path / "student", INFO)
    assert report.sampler_difference <= 1e-5 and report.student_difference <= 1e-5 and report.comfyui_difference is None
    loaded = CogVideoXPipeline.from_pretrained(report.folder, local_files_only=True)
    assert isinstance(loaded.scheduler, LCMScheduler)
    theirs = stock_call(loaded, n)
    # noise in the pipeline's order of axes, turned into ours: the first and one more for each later level
    rng = torch.Generator().manual_seed(5)
    shape, cond = (2, 3, 4, 4, 4), fam.encode(PROMPTS[:2])
    x0 = x_t = torch.randn(shape, generator=rng).permute(AXES)
    with torch.no_grad():
        for j, level in enumerate(levels):
            x0 = student(x_t, torch.full((2,), level), cond).x0
            if j + 1 < n:
                x_t = fam.path.renoise(x0, torch.randn(shape, generator=rng).permute(AXES), torch.full((2,), levels[j + 1]))
    assert (x0.permute(AXES) - theirs).abs().max() <= 1e-5
    # the comparison can fail: guidance, and another student
    assert (stock_call(loaded, n, guidance=6.0) - theirs).abs().max() > 1e-3
    assert (
        verify_export(
            report.folder,
            lambda names, rng: sample_few_step(
                role(family(seed=3, rotary=rotary)), fam.encode(names), torch.randn(2, 3, 4, 4, 4, generator=rng).permute(AXES), levels, fam.path, rng
            ).permute(AXES),
            size=SIZE,
        )
        > 1e-2
    )
    with pytest.raises(ValueError, match="is a few-step student"):
        load(str(report.folder))


def test_the_card_says_how_to_run_it(tmp_path):
    fam = CogVideoXFamily(tiny_cogvideox_pipeline())
    report = export_student(fam, fam.pretrained, few_step_levels(4), tmp_path / "student", INFO)
    text = (report.folder / "README.md").read_text()
    assert "num_inference_steps=4, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)," in text
    assert "must be given: the pipeline's own defaults are 50 and 6" in text and "stock `LCMScheduler`" in text
    assert "No workflow is included: there is none for a CogVideoXPipeline" in text and "Wan pipelines do not" not in text
    assert sorted(p.name for p in report.folder.iterdir() if p.is_file()) == ["README.md", "instep_export.json", "model_index.json"]
    code = text.split("```python\n")[1].split("```")[0].replace('"."', repr(str(report.folder))).replace('"video.gif"', repr(str(tmp_path / "video.gif")))
    exec(compile(code, "card", "exec"), {})
    assert (tmp_path / "video.gif").stat().st_size > 100


def test_a_many_step_export_keeps_the_pipelines_scheduler(tmp_path):
    from diffusers import CogVideoXPipeline

    fam = family()
    report = export_many_step(fam, fam.new_backbone(), Sampling(few_step_levels(10), "ode", 6.0), tmp_path / "student", INFO)
    pipe = CogVideoXPipeline.from_pretrained(report.folder, local_files_only=True)
    assert type(pipe.scheduler).__name__ == "CogVideoXDDIMScheduler" and pipe.scheduler.config.timestep_spacing == "trailing"
    assert "guidance_scale=6" in (report.folder / "README.md").read_text()
    assert load(str(report.folder)).path == fam.path, "and serves as a teacher again"


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("rank", [None, 4])
def test_dmd2_trains_and_exports(tmp_path, rank):
    fam = family(rotary=rank is not None)
    recipe = dmd2(replace(SHORT, lora_rank=rank, ema=None), iterations=2, gan=0.01)
    options = RunOptions(save_every=2, probe_every=50, teacher_samples=2, execution=Execution(checkpointing="on" if rank else "off"))
    before = {key: p.clone() for key, p in fam.pretrained.state_dict().items()}
    run = train(recipe, fam, out=tmp_path / "run", prompts=PROMPTS, options=options)
    last = rows(run.out)[-1]
    assert last["step"] == 2 and last["grad/student"] > 0 and all(value == value for value in last.values() if isinstance(value, float))
    from diffusers import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained(run.student, local_files_only=True)
    theirs = stock_call(pipe, 2)
    rng = torch.Generator().manual_seed(5)
    noise, fresh = (torch.randn(2, 3, 4, 4, 4, generator=rng).permute(AXES) for _ in range(2))
    student, cond = run.state.roles["student"], fam.encode(PROMPTS[:2])
    with torch.no_grad():
        x_t = fam.path.renoise(student(noise, torch.ones(2), cond).x0, fresh, torch.full((2,), 0.5))
        ours = student(x_t, torch.full((2,), 0.5), cond).x0
    assert (ours.permute(AXES) - theirs).abs().max() <= 1e-5
    plain = tiny_cogvideox_pipeline(rotary=rank is not None)
    plain.scheduler = pipe.scheduler
    untrained = stock_call(plain, 2)
    assert (untrained - theirs).abs().max() > 1e-4, "training moved it"
    if rank is None:
        assert all(torch.equal(value, before[key]) for key, value in fam.pretrained.state_dict().items()), "the teacher stays"
    else:
        plain.load_lora_weights(run.student, weight_name="lora.safetensors")
        assert (stock_call(plain, 2) - theirs).abs().max() <= 1e-5


def test_shifted_levels_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"levels: \[1.0, 0.75\] cannot be represented by LCMScheduler.*train with shift 1"):
        train(dmd2(replace(SHORT, shift=3.0), iterations=2), family(), out=tmp_path / "run", prompts=PROMPTS)
    assert not (tmp_path / "run").exists()


def test_from_the_command_line(tmp_path, capsys):
    from instep.cli.main import main

    folder = tmp_path / "cog"
    tiny_cogvideox_pipeline().save_pretrained(folder)
    fam = load(str(folder))
    assert fam.size == SIZE and fam.name == "cog" and fam.source == str(folder)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    command = [
        "train",
        "dmd2",
        "--model",
        str(folder),
        "--prompts",
        str(prompts),
        "--out",
        str(tmp_path / "run"),
        "--iterations",
        "1",
        "--steps",
        "2",
        "--batch",
        "2",
        "--critic-updates",
        "1",
        "--no-evaluate",
    ]
    assert main([*command, "--shift", "3"]) == 2
    assert "train with shift 1" in capsys.readouterr().err
    assert main(command) == 0, "shift 1 is the default on this model"
    record = json.loads((tmp_path / "run" / "student" / "instep_export.json").read_text())
    assert record["levels"] == [1.0, 0.5] and record["info"]["size"] == {"height": 32, "width": 32, "frames": 9}
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "again"), "--dtype", "float16"]) == 0
    assert main(["sample", str(tmp_path / "run"), "--prompts", "a digit", "--copies", "1", "--out", str(tmp_path / "s.webp")]) == 0
    assert (tmp_path / "s.webp").stat().st_size > 100
    assert main(["sample", str(folder), "--prompts", "a digit", "--copies", "1", "--steps", "2", "--out", str(tmp_path / "t.webp")]) == 0
    capsys.readouterr()
    assert main(["plan", "dmd2", "--model", str(folder)]) == 0
    assert "stage match" in capsys.readouterr().out
