"""Image-to-video: prompts that name their first frame, the family against the stock pipeline, every recipe on it, and the bundled model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from fast import slow_but
from PIL import Image
from pretrain.moving_digits_i2v import first_frame_distances
from pretrain.teacher import Latents, TeacherConfig, TeacherRun, text_table
from safetensors.torch import load_file
from test_apo import ONE_EACH, TINY
from test_run import brightness, interrupted_before, rows, same
from test_run_family import FEW, REWARD, SHORT, recipe_of
from tiny import FRAMES, HEIGHT, WIDTH, tiny_wan_i2v_pipeline, tiny_wan_pipeline

from instep.bundled import MOVING_DIGITS, digits, folder_of, load
from instep.bundled import moving_digits_i2v as bundle
from instep.bundled.baselines import Baselines
from instep.bundled.classifiers import load_classifier
from instep.bundled.drawn_frames import drawn_video, first_frame
from instep.bundled.evaluation import DigitsEvaluation, EvalSet
from instep.bundled.moving_digits_i2v import MovingDigitsImageFamily
from instep.bundled.worlds import MovingDigitsI2V, moving_digits_i2v
from instep.cli.main import main
from instep.core.size import Size
from instep.data.animation import save_animation
from instep.data.first_frame import digest, read_first_frame
from instep.data.media import pair_samples
from instep.data.pairs import PreferencePair
from instep.data.prompt import Prompt
from instep.data.samples import PairSamples, RealSamples
from instep.diffusion.sampling import sample_ode
from instep.models.backbone import Backbone
from instep.models.families import family_of
from instep.models.role import Role
from instep.models.wan import WanFamily
from instep.models.wan_i2v import WanImageCondition, WanImageFamily, known_latents
from instep.recipes import NAMES
from instep.recipes.apo import apo
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.rewards.base import FunctionReward, checked_scores
from instep.rewards.ranker import Ranked, reward_ranker
from instep.training.options import RunOptions
from instep.training.run import train

SIZE = Size(HEIGHT, WIDTH, FRAMES)
TEXTS = ["a seven moving left fast", "a digit", "an eight", "a two standing still"]
PROMPTS = [Prompt(text, f"train/{i}") for i, text in enumerate(TEXTS)]
QUICK = RunOptions(save_every=1, probe_every=50, teacher_samples=4)


def family() -> WanImageFamily:
    return MovingDigitsImageFamily(tiny_wan_i2v_pipeline(), SIZE, name="tiny-i2v")


def some_latents(seed, n=4):
    return torch.randn(n, *family().latent_shape, generator=torch.Generator().manual_seed(seed))


REAL = RealSamples(tuple(PROMPTS), some_latents(0))
PAIRS = PairSamples(tuple(PROMPTS), some_latents(1), some_latents(2))


# prompts and first frames


def test_first_frames_are_read_or_drawn(tmp_path):
    drawn = first_frame(PROMPTS[0], SIZE)
    assert torch.equal(drawn, digits.render("train", [digits.parse(TEXTS[0])], 0)[0, :, 0]) and torch.equal(drawn_video(PROMPTS[0])[:, 0], drawn)
    frames = (torch.rand(3, 48, 48, 3, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    Image.fromarray(frames[0].numpy()).save(tmp_path / "a.png")
    assert torch.equal(read_first_frame(Prompt("x", tmp_path / "a.png"), SIZE), frames[0].permute(2, 0, 1).float() / 255)
    assert read_first_frame(Prompt("x", tmp_path / "a.png"), Size(32, 32, 9)).shape == (3, 32, 32)
    save_animation(tmp_path / "b.webp", frames)
    found = read_first_frame(Prompt("x", tmp_path / "b.webp"), SIZE)
    assert (found * 255 - frames[0].permute(2, 0, 1)).abs().max() <= 1, "the first frame of a video"
    with pytest.raises(ValueError, match="'a seven' names no first frame, and this model begins its videos with one; write 'a seven .image: FILE.'"):
        read_first_frame(Prompt("a seven"), SIZE)
    with pytest.raises(ValueError, match="image: .*gone.png of prompt .* is not a file that exists"):
        family().check_prompts([PROMPTS[0], Prompt("x", tmp_path / "gone.png")])
    with pytest.raises(ValueError, match="is 48 x 48, not of the shape of 48 x 96"):
        read_first_frame(Prompt("x", tmp_path / "a.png"), Size(48, 96, 9))
    (tmp_path / "broken.png").write_bytes(b"not an image")
    for prompt in (Prompt("a seven", tmp_path / "broken.png"), Prompt("a cat runs", "train/3")):
        with pytest.raises(ValueError):  # before a run begins, not where the prompt is drawn
            family().check_prompts([PROMPTS[0], prompt])


def test_another_image_under_the_same_name_is_another_run(tmp_path):
    named = [Prompt("a seven", tmp_path / "a.png"), PROMPTS[0], Prompt("an eight", tmp_path / "a.png")]
    found = []
    for level in (10, 20, 10):
        Image.fromarray(torch.full((48, 48, 3), level, dtype=torch.uint8).numpy()).save(tmp_path / "a.png")
        found.append(digest(named))
    assert found[0] == found[2] != found[1] and digest(PROMPTS) is None


def test_latents_of_first_frames_are_kept_up_to_a_size(monkeypatch, tmp_path):
    import instep.models.wan_i2v as module

    for i in range(3):
        Image.fromarray(torch.full((48, 48, 3), 40 * i, dtype=torch.uint8).numpy()).save(tmp_path / f"{i}.png")
    made, names = family(), [Prompt("a seven", tmp_path / f"{i}.png") for i in range(3)]
    first = made.encode([*names, Prompt("an eight", tmp_path / "1.png")])
    assert len(made._first_frames) == 3 and torch.equal(first.first_frame[1], first.first_frame[3]), "two prompts of one first frame share its latents"
    monkeypatch.setattr(module, "KEPT_BYTES", int(1.5 * first.first_frame[0].nbytes))
    again = made.encode(names)
    assert len(made._first_frames) == 1 and torch.equal(again.first_frame, first.first_frame[:3])


def test_latents_of_first_frames_are_kept_for_each_size(tmp_path):
    """A family at another size shares what is kept, and takes nothing of the wrong size from it."""
    Image.fromarray(torch.full((48, 48, 3), 40, dtype=torch.uint8).numpy()).save(tmp_path / "a.png")
    made, names = family(), [Prompt("a seven", tmp_path / "a.png")]
    one = made.encode(names).first_frame
    larger = made.at(Size(2 * made.size.height, 2 * made.size.width, made.size.frames))
    other = larger.encode(names).first_frame
    assert one.shape[2:] == made.latent_shape[1:] and other.shape[2:] == larger.latent_shape[1:] != made.latent_shape[1:]
    assert torch.equal(made.encode(names).first_frame, one) and torch.equal(larger.encode(names).first_frame, other)


def test_rewards_are_told_the_text_unless_they_ask_for_the_first_frame():
    seen = []

    def reward(media, prompts):
        seen.append(list(prompts))
        return media.mean((1, 2, 3, 4))

    media = torch.rand(4, 3, 9, 48, 48, generator=torch.Generator().manual_seed(0))
    plain = FunctionReward(reward)
    checked_scores(plain, media, PROMPTS)
    nosy = FunctionReward(reward)
    object.__setattr__(nosy, "sees_first_frames", True)
    checked_scores(nosy, media, PROMPTS)
    assert seen == [TEXTS, PROMPTS]
    # two first frames of one text are two groups
    seen.clear()
    names = [Prompt("a digit", f"train/{i}") for i in (0, 0, 1, 1)]
    ranked = checked_scores(Ranked(reward_ranker(plain)), media, names)
    assert ranked.reshape(2, 2).sum(1).tolist() == [0, 0] and seen[0] == ["a digit"] * 2
    assert load_classifier("training").correct(media, PROMPTS).both.shape == (4,)


# the family


def test_what_is_known_is_what_the_stock_pipeline_joins():
    fam = family()
    pipe, shown = fam.pipe, first_frame(PROMPTS[1], SIZE)[None]
    image = pipe.video_processor.preprocess(shown, height=48, width=48)
    noise = torch.zeros(1, *fam.latent_shape)
    _, theirs = pipe.prepare_latents(image, 1, 16, 48, 48, 9, torch.float32, torch.device("cpu"), None, noise)
    torch.testing.assert_close(known_latents(pipe.vae, shown, 9), theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(fam.encode(PROMPTS[:2]).first_frame[1:], theirs, rtol=0, atol=1e-6)
    assert fam.latent_shape == (16, 3, 6, 6) and theirs.shape == (1, 20, 3, 6, 6)


def test_the_unconditional_prompt_takes_the_first_frame_of_its_rows():
    fam = family()
    cond, null = fam.encode(PROMPTS), fam.unconditional(PROMPTS)
    assert isinstance(null, WanImageCondition) and null.first_frame is None and len(null) == 4
    both = cond.stack(null)
    assert torch.equal(both.first_frame, torch.cat([cond.first_frame, cond.first_frame])) and len(both) == len(both.text) == 8
    three = cond.stack(cond.rolled(1)).stack(null)
    assert torch.equal(three.first_frame[8:], cond.rolled(1).first_frame), "of the rows right before it"
    assert torch.equal(both[torch.tensor([5])].first_frame[0], cond.first_frame[1]) and cond.repeat(2).first_frame.shape[0] == 8


def by_the_pipelines_levels(fam, teacher, prompts, noise, steps, guidance):
    """The family's sampler at the levels of the pipeline's own scheduler."""
    fam.pipe.scheduler.set_timesteps(steps)
    levels, x = fam.pipe.scheduler.sigmas.tolist(), noise
    cond, null = fam.encode(prompts), fam.unconditional(prompts)
    for t, s in zip(levels[:-1], levels[1:], strict=True):
        v = teacher(x.repeat(2, 1, 1, 1, 1), torch.full((2 * len(x),), t), cond.stack(null)).v
        c, u = v.chunk(2)
        x = x + (s - t) * (u + guidance * (c - u))
    return x


@torch.no_grad()
def test_stock_and_ours_draw_the_same_videos_and_the_first_frame_matters():
    fam = family()
    teacher, names = Role("teacher", Backbone(fam, fam.new_backbone())), PROMPTS[:2]
    noise = some_latents(5, 2)
    ours = by_the_pipelines_levels(fam, teacher, names, noise, 4, 3.0)
    fam.pipe.set_progress_bar_config(disable=True)

    def stock_call(prompt, x):
        image = first_frame(prompt, SIZE)[None]
        options = {"height": 48, "width": 48, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
        return fam.pipe(image=image, prompt=prompt.text, latents=x[None], **options).frames[0]

    theirs = torch.stack([stock_call(name, x) for name, x in zip(names, noise, strict=True)])
    assert (ours - theirs).abs().max() < 2e-4
    other = by_the_pipelines_levels(fam, teacher, [Prompt(names[0].text, "train/99")], noise[:1], 4, 3.0)
    assert (other - ours[:1]).abs().max() > 0.05


def test_variants_that_are_conditioned_otherwise_are_refused():
    pipe = tiny_wan_i2v_pipeline()
    pipe.register_to_config(expand_timesteps=True)
    with pytest.raises(ValueError, match="expand_timesteps True .* does not fit WanImageFamily"):
        WanImageFamily(pipe, SIZE)
    with pytest.raises(ValueError, match="a transformer of 36 channels in, 16 out does not fit its VAE; 16 and 16 do"):
        family_of(pipe)
    pipe = tiny_wan_i2v_pipeline()
    pipe.transformer_2 = pipe.transformer
    with pytest.raises(ValueError, match="two transformers"):
        WanImageFamily(pipe, SIZE)
    pipe.register_to_config(expand_timesteps=True)
    with pytest.raises(ValueError, match="a WanImageToVideoPipeline, of a variant that no family knows"):
        family_of(pipe)
    pipe = tiny_wan_i2v_pipeline()
    pipe.transformer.register_to_config(image_dim=8)
    with pytest.raises(ValueError, match="image_dim 8 .* needs the pipeline's image_encoder and image_processor"):
        family_of(pipe, SIZE)
    pipe = tiny_wan_i2v_pipeline()
    pipe.transformer = tiny_wan_pipeline().transformer
    with pytest.raises(ValueError, match="a transformer of 16 channels in, 16 out does not fit its VAE; 36 and 16 do"):
        WanImageFamily(pipe, SIZE)


# runs


def test_prompts_that_do_not_fit_the_model_are_refused_before_a_run_begins(tmp_path):
    with pytest.raises(ValueError, match="'a seven' names no first frame, and this model begins"):
        train(dmd2(SHORT, iterations=1), family(), out=tmp_path / "a", prompts=["a seven"], options=QUICK)
    with pytest.raises(ValueError, match="'a seven moving left fast' names no first frame"):
        train(apo(TINY, **ONE_EACH), family(), out=tmp_path / "b", prompts=PROMPTS, pairs=replace(PAIRS, prompts=tuple(TEXTS)), reward=brightness)
    text = WanFamily(tiny_wan_pipeline(), SIZE, name="tiny")
    with pytest.raises(ValueError, match="prompts: 'a seven moving left fast .image: train/0.' names a first frame, and tiny takes text alone"):
        train(dmd2(SHORT, iterations=1), text, out=tmp_path / "c", prompts=PROMPTS, options=QUICK)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    out = tmp_path_factory.mktemp("apo") / "whole"
    recipe = apo(TINY, **ONE_EACH)
    return recipe, train(recipe, family(), out=out, prompts=PROMPTS, reward=Ranked(reward_ranker(brightness)), pairs=PAIRS, options=QUICK)


def test_apo_runs_and_exports_what_the_stock_pipeline_samples_alike(aligned):
    from diffusers import WanImageToVideoPipeline

    _, run = aligned
    assert [row["stage"] for row in rows(run.out)] == ["start", "online", "half-online", "offline", "distill-guidance", "post-distillation"]
    pipe = WanImageToVideoPipeline.from_pretrained(run.student, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    fam = MovingDigitsImageFamily(pipe, SIZE)
    before = family().pretrained.state_dict()
    assert any(not torch.equal(value, before[key]) for key, value in pipe.transformer.state_dict().items()), "it was trained"
    with torch.no_grad():
        torch.manual_seed(3)
        theirs = fam.stock_sample(pipe, PROMPTS[:2], steps=4, guidance=1.5, output="latent")
        torch.manual_seed(3)
        noise = torch.cat([torch.randn(1, *fam.latent_shape) for _ in range(2)])
        ours = by_the_pipelines_levels(fam, Role("student", Backbone(fam, fam.new_backbone())), PROMPTS[:2], noise, 4, 1.5)
    assert (ours - theirs).abs().max() < 2e-4
    card = (run.student / "README.md").read_text()
    assert 'pipe(prompt="a seven moving left fast", image=load_image("first_frame.png"), num_inference_steps=6' in card and "import load_image" in card


@pytest.mark.parametrize("at", [1, 3])
def test_killed_anywhere_it_ends_the_same(aligned, tmp_path, at):
    recipe, run = aligned
    parts = {"out": tmp_path / "cut", "prompts": PROMPTS, "reward": Ranked(reward_ranker(brightness)), "pairs": PAIRS, "options": QUICK}
    with interrupted_before(at):
        train(recipe, family(), **parts)
    same(run.out, train(recipe, family(), **parts).out)


@pytest.mark.parametrize("lora", [None, 4])
def test_a_few_step_student_is_exported_and_checked_against_the_stock_pipeline(tmp_path, lora):
    run = train(dmd2(replace(SHORT, lora_rank=lora), iterations=1), family(), out=tmp_path / "run", prompts=PROMPTS, options=QUICK)
    Image.new("RGB", (WIDTH, HEIGHT), (90, 20, 200)).save(tmp_path / "first.png")
    assert (
        main(["sample", str(run.student), "--prompts", f"a seven [image: {tmp_path / 'first.png'}]", "--copies", "1", "--out", str(tmp_path / "s.webp")]) == 0
    )
    from instep.export.verify import verify_export

    assert verify_export(run.student, [1.0, 0.75], prompts=PROMPTS[:2], size=SIZE, family=family()) < 2e-4
    assert verify_export(run.student, [1.0, 0.5], prompts=PROMPTS[:1], size=SIZE, family=family()) > 1e-3, "other levels are other videos"
    assert verify_export(run.student, [1.0, 0.75]) < 2e-4, "prompts and size of its own"
    card = (run.student / "README.md").read_text()
    assert "pipeline_tag: image-to-video" in card and "there is none for a WanImageToVideoPipeline" in card
    assert not (run.student / "comfyui_workflow.json").exists()


def test_a_wide_first_frame_is_exported_with_as_it_is(tmp_path):
    """Without a sampler of its own to compare with, the export is checked at the first frame's shape: it fits no other."""
    from instep.export import ExportInfo, export_student

    wide = Size(HEIGHT, 2 * WIDTH, FRAMES)
    Image.new("RGB", (wide.width, wide.height), (90, 20, 200)).save(tmp_path / "wide.png")
    prompt = Prompt("a seven", str(tmp_path / "wide.png"))
    info = ExportInfo(recipe="dmd2", base_model="tiny", seed=0, command="", instep_version="0", training_prompts=1, size=wide, example_prompt=prompt)
    fam = WanImageFamily(tiny_wan_i2v_pipeline(), SIZE)
    report = export_student(fam, fam.pretrained, (1.0, 0.75), tmp_path / "out", info)
    assert report.student_difference < 2e-4
    told = [(report.folder / name).read_text() for name in ("README.md", "instep_export.json")]
    assert all("wide.png" in text and str(tmp_path) not in text for text in told), "where the first frame lies is nobody's business"


# a recipe of every kind of term beside those above
@pytest.mark.parametrize("name", slow_but(["dm-align-pair", "dollar", "flow-grpo"], ["dm-align-pair", "dollar", "dmd", "flow-grpo", "amd", "refl"]))
def test_other_recipes_run(tmp_path, name):
    from instep.recipes.dm_align import dm_align_pair
    from instep.recipes.many_step import ManySteps, flow_grpo

    assert name in NAMES
    if name == "dm-align-pair":
        recipe = dm_align_pair(SHORT, distil=1, iterations=1)
    elif name == "flow-grpo":
        recipe = flow_grpo(ManySteps(steps=3, batch=4), iterations=1, group=2)
    else:
        recipe = recipe_of(name)
    run = train(recipe, family(), out=tmp_path / "run", prompts=PROMPTS, reward=REWARD, real=REAL if name == "dm-align-pair" else None, options=FEW)
    assert all(value == value for value in rows(run.out)[-1].values() if isinstance(value, float)), "finite metrics"
    assert json.loads((run.student / "model_index.json").read_text())["_class_name"] == "WanImageToVideoPipeline"


def test_a_users_pairs_begin_with_the_chosen_one(tmp_path):
    media = (torch.rand(2, 9, 48, 48, 3, generator=torch.Generator().manual_seed(1)) * 255).to(torch.uint8)
    for name, video in zip(("a.webp", "b.webp"), media, strict=True):
        save_animation(tmp_path / name, video)
    pair = PreferencePair("a seven", tmp_path / "a.webp", tmp_path / "b.webp")
    named = PreferencePair("a seven [image: train/1]", tmp_path / "a.webp", tmp_path / "b.webp")
    found = pair_samples([pair, named], family())
    assert found.prompts == (Prompt("a seven", tmp_path / "a.webp"), Prompt("a seven", "train/1"))
    assert pair_samples([pair], WanFamily(tiny_wan_pipeline(), SIZE)).prompts == (Prompt("a seven"),)
    family().check_prompts(found.prompts)


# the bundled model


@torch.no_grad()
def test_widened_it_begins_as_the_text_to_video_model():
    base = load(MOVING_DIGITS)
    net = bundle.widened(base.pretrained, 4)
    x, t, text = some_latents(0, 2), torch.tensor([900.0, 300.0]), torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    known = torch.cat([x.roll(1, 0), x, x[:, :4]], 1)[:, :20]
    plain = load(MOVING_DIGITS).pipe.transformer
    torch.testing.assert_close(net(torch.cat([x, known], 1), t, text)[0], plain(x, t, text)[0], rtol=0, atol=1e-5)
    assert bundle.changed(net, plain).keys() == {"patch_embedding.weight"}


def test_training_moves_what_is_not_shared_and_goes_on_exactly(tmp_path):
    base = load(MOVING_DIGITS).pipe
    rng = torch.Generator().manual_seed(0)
    data = Latents(torch.randn(16, 16, 3, 6, 6, generator=rng).half(), torch.arange(16) % 10, torch.arange(16) % 9, torch.randn(16, 20, 3, 6, 6, generator=rng))
    table = text_table(base.tokenizer, base.text_encoder)

    def run():
        return TeacherRun(TeacherConfig(steps=4, batch=2), 0, data, table, lambda: bundle.widened(base.transformer, 4))

    whole, first, second = run(), run(), run()
    for _ in range(3):
        whole.advance()
    first.advance()
    first.save(tmp_path / "state.safetensors")
    second.load(tmp_path / "state.safetensors")
    for _ in range(2):
        second.advance()
    assert all(torch.equal(a, b) for a, b in zip(whole.net.state_dict().values(), second.net.state_dict().values(), strict=True))
    moved = bundle.changed(whole.net, base.transformer).keys()
    assert any("attn1" in key for key in moved) and not any(part in f".{key}" for key in moved for part in bundle.FROZEN)
    assert whole.exported().config.in_channels == 36


@pytest.fixture(scope="module")
def image_to_video() -> MovingDigitsI2V:
    return moving_digits_i2v()


def test_what_ships_is_small_and_shares_the_rest(image_to_video):
    folder = folder_of("moving-digits-i2v")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 3e6
    base, own = load(MOVING_DIGITS).pretrained.state_dict(), image_to_video.family.pretrained.state_dict()
    stored = load_file(folder / bundle.CHANGED)
    assert {key for key in own if own[key].shape != base[key].shape or not torch.equal(own[key], base[key])} == stored.keys()
    record = json.loads((folder / "pretrain.json").read_text())
    assert record["measured"]["teacher"]["steps"] == record["config"]["teacher"]["steps"]


@torch.no_grad()
def test_the_bundled_model_begins_with_its_first_frame_and_follows_the_prompt(image_to_video):
    fam = image_to_video.family
    names = [Prompt(prompt, f"reference/{1000 + i}") for i, prompt in enumerate(digits.full_prompts()[::6])]
    teacher = Role("teacher", Backbone(fam, fam.new_backbone()))
    noise = torch.randn(len(names), *fam.latent_shape, generator=torch.Generator().manual_seed(0))
    x = sample_ode(teacher, fam.encode(names), fam.unconditional(names), noise, steps=8, path=fam.path, shift=fam.shift, guidance=2.0)
    media = fam.decode(x).clamp(0, 1)
    first_frames = torch.stack([first_frame(name, SIZE) for name in names])
    decoded = fam.decode(fam.encode_media(torch.stack([drawn_video(name) for name in names]))).clamp(0, 1)[:, :, 0]
    found = first_frame_distances(media, first_frames, decoded)
    assert found["first_frame_to_given"] < 0.4 * found["first_frame_to_another_given"], found
    assert load_classifier("heldout").correct(media, names).both.float().mean() > 0.8


def test_bundled_pairs_begin_alike_and_the_rejected_one_goes_wrong(image_to_video):
    pairs, again = image_to_video.pairs(48), image_to_video.pairs(48)
    assert torch.equal(pairs.rejected, again.rejected) and pairs.prompts == again.prompts
    # a causal VAE: the first latent is the first frame's
    assert torch.equal(pairs.chosen[:, :, 0], pairs.rejected[:, :, 0]) and not torch.equal(pairs.chosen[:, :, 1:], pairs.rejected[:, :, 1:])
    real = image_to_video.real(4)
    torch.testing.assert_close(real.latents[:, :, 0], image_to_video.family.encode(real.prompts).first_frame[:, 4:, 0], rtol=0, atol=1e-4)
    good, bad = (image_to_video.family.decode(x).clamp(0, 1) for x in (pairs.chosen, pairs.rejected))
    classifier = load_classifier("monitor")
    assert classifier.correct(good, pairs.prompts).both.float().mean() > 0.9 > 0.6 > classifier.correct(bad, pairs.prompts).both.float().mean()


def test_motions_that_stay_on_the_canvas():
    names = [digits.MOTIONS[i] for i in digits.motions_from(torch.tensor([20.0, 4.0]))]
    assert names == ["still", "left slowly", "left fast", "down slowly", "down fast"]
    start, travel = digits.random_paths(torch.arange(9), torch.Generator().manual_seed(0))
    assert all(i in digits.motions_from(start[i]) for i in range(9)) and torch.equal(travel, digits.travels(torch.arange(9)))


@pytest.mark.slow
def test_commands_on_the_bundled_model(tmp_path, capsys):
    assert main(["sample", "moving-digits-i2v", "--steps", "2", "--copies", "1", "--out", str(tmp_path / "s.webp")]) == 0
    assert "a seven moving left fast [image: reference/0]" in capsys.readouterr().out
    assert main(["sample", "moving-digits-i2v", "--prompts", "a seven", "--out", str(tmp_path / "t.webp")]) == 2
    assert "'a seven' names no first frame" in capsys.readouterr().err
    assert main(["plan", "apo", "--model", "moving-digits-i2v"]) == 0
    assert "stage online" in capsys.readouterr().out


@pytest.mark.slow
def test_eval_measures_the_bundled_model_from_first_frames(tmp_path, capsys, monkeypatch, image_to_video):
    """A run's student beside the teacher and real videos, by prompts that each name a first frame of the reference split; the teacher's rows are kept."""
    open_ = [prompt for prompt in ("a seven", "a digit moving left fast") for _ in range(3)]
    small = EvalSet(tuple(digits.full_prompts()[::15]), tuple(open_), image_to_video=True)
    chosen = []
    monkeypatch.setattr("instep.bundled.evaluation.evaluation_set", lambda *args, image_to_video, negative: chosen.append(image_to_video) or small)
    monkeypatch.setenv("INSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")
    recipe = dmd2(Common(steps=2, batch=2), iterations=1)
    run = train(recipe, image_to_video.family, out=tmp_path / "run", prompts=image_to_video.prompts[:8], options=QUICK)
    assert main(["eval", str(run.out)]) == 0
    said = json.loads((run.out / "metrics.json").read_text())
    assert chosen == [True] and said["protocol"] == "quick, from a first frame" and "first frame" in capsys.readouterr().out
    by_name = {row["name"]: row["values"]["first_frame"]["value"] for row in said["rows"]}
    assert by_name["teacher, 50 steps, guided"] < 0.1 and by_name["real videos through the VAE"] < 0.05
    kept = {file.name for file in (tmp_path / "cache").iterdir()}
    mark = Baselines(image_to_video.family, DigitsEvaluation(True), small).fingerprint
    other = Baselines(image_to_video.family, DigitsEvaluation(True), replace(small, image_to_video=False)).fingerprint
    assert mark != other and all(mark in name for name in kept) and len(kept) == 6
    assert main(["report", str(run.out), "-o", str(tmp_path / "report.html")]) == 0
    assert "first frame" in (tmp_path / "report.html").read_text()
