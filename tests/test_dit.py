"""The class-conditional family: labels, guidance, decoding, roles on it, training, its export; the classifiers and the bundled digits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from pretrain.digits import ClassTeacherConfig, DigitClassifierConfig, DigitsConfig, deform, pretrain_digits, train_class_teacher

from instep.bundled import DIGITS, folder_of, load
from instep.bundled.digit_classifiers import load_digit_classifier
from instep.bundled.digits import WORDS, scans_of
from instep.bundled.worlds import class_digits
from instep.cli.sample import find_pipeline
from instep.core.size import Size
from instep.data.samples import RealSamples
from instep.diffusion.guidance import predict_guided
from instep.diffusion.sampling import sample_few_step, sample_ode
from instep.methods.role_config import LoRA, RoleConfig
from instep.models.backbone import Backbone
from instep.models.dit import DiTFamily
from instep.models.role import Role
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.recipes.dmdr import dmdr
from instep.recipes.many_step import ManySteps, flow_grpo
from instep.recipes.refl import refl
from instep.training.options import RunOptions
from instep.training.run import train

ONE = Common(steps=1, batch=4, critic_updates=1, shift=1.0, guidance=1.5)
DIGIT_NAMES = tuple(str(i) for i in range(10))


def tiny_dit(seed: int = 0, **changes):
    """Two layers of width 16 on four patches; random weights everywhere, so that classes and times differ."""
    from diffusers import DiTTransformer2DModel

    options = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 4,
        "num_embeds_ada_norm": 10,
        "attention_bias": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiTTransformer2DModel(**(options | changes))


@pytest.fixture
def family():
    return DiTFamily(tiny_dit(), WORDS)


def noise(n: int, seed: int = 0):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_a_role_predicts_the_flow_at_a_thousandfold_time(family):
    role, x_t, t = Role("teacher", Backbone(family, family.pretrained)), noise(3), torch.tensor([1.0, 0.5, 0.1])
    answer = role(x_t, t, family.encode(["seven", "7", " Two "]))
    raw = family.pretrained(x_t, timestep=torch.tensor([1000.0, 500.0, 100.0]), class_labels=torch.tensor([7, 7, 2]), return_dict=False)[0]
    assert torch.equal(answer.v, raw) and raw.shape == x_t.shape
    assert torch.allclose(answer.x0, x_t - t.view(-1, 1, 1, 1) * raw)


def test_the_null_condition_is_the_extra_row_and_guidance_goes_away_from_it(family):
    role, x_t, t = Role("teacher", Backbone(family, family.pretrained)), noise(4), torch.full((4,), 0.7)
    cond, null = family.encode(DIGIT_NAMES[:4]), family.unconditional(DIGIT_NAMES[:4])
    assert null.label.tolist() == [10] * 4 and len(family.pretrained.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight) == 11
    guided = predict_guided(role, x_t, t, cond, null, 3.0)
    c, u = role(x_t, t, cond).x0, role(x_t, t, null).x0
    assert (c - u).abs().max() > 1e-4, "the label says something"
    assert torch.allclose(guided.x0, u + 3 * (c - u), atol=1e-5)


def test_no_label_is_dropped_even_in_training_mode(family):
    module, x_t, label = family.new_backbone().train(), noise(64), torch.zeros(64, dtype=torch.long)
    each = module(x_t[:1].repeat(64, 1, 1, 1), timestep=torch.full((64,), 500.0), class_labels=label, return_dict=False)[0]
    assert torch.allclose(each, each[:1].expand_as(each), atol=1e-5), "a dropped label would answer differently"


def test_media_are_three_equal_unclamped_channels_with_a_gradient(family):
    x = (3 * noise(2)).requires_grad_()
    media = family.decode(x)
    assert media.shape == (2, 3, 8, 8) and media.max() > 1 and torch.equal(media[:, 0], media[:, 2])
    media.sum().backward()
    assert torch.allclose(x.grad, torch.full_like(x, 1.5)), "also where the image saturates"
    assert torch.allclose(family.encode_media(media), x, atol=1e-6)


def test_an_exit_embedding_reaches_every_block(family):
    backbone = Backbone(family, family.new_backbone())
    role, x_t, t, cond = Role("fake", backbone, exits=1), noise(3), torch.full((3,), 0.4), family.encode(["1", "2", "3"])
    plain, told = role(x_t, t, cond).x0, cond.at_exit(torch.zeros(3, dtype=torch.long))
    assert torch.equal(role(x_t, t, told).x0, plain), "it starts at zero: the fake starts as the teacher"
    with torch.no_grad():
        role.exits.weight.add_(1.0)
    assert torch.equal(role(x_t, t, cond).x0, plain)
    assert (role(x_t, t, told).x0 - plain).abs().max() > 1e-3
    seen = []
    for embedder in family.time_embedders(backbone.module):
        embedder.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    role(x_t, t, cond), role(x_t, t, told)
    without, with_exit = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(without) == 3, "two blocks, and the first once more for the output"
    for a, b in zip(without, with_exit, strict=True):
        assert torch.allclose(b - a, torch.ones_like(a), atol=1e-5)


def test_heads_read_tokens(family):
    role = Role("fake", Backbone(family, family.new_backbone()), head=True)
    assert role(noise(2), torch.full((2,), 0.5), family.encode(["1", "2"])).logit.shape == (2,)


@pytest.mark.parametrize("prompt", ["10", "eleven", "a seven"])
def test_an_unknown_class_is_refused_with_the_list(family, prompt):
    with pytest.raises(ValueError, match="allowed: 0, 1, .*nine"):
        family.encode(["3", prompt])


def test_networks_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="in_channels: 4"):
        DiTFamily(tiny_dit(in_channels=4, out_channels=4))
    with pytest.raises(ValueError, match="out_channels: 2"):
        DiTFamily(tiny_dit(out_channels=2))
    with pytest.raises(ValueError, match="names: 2"):
        DiTFamily(tiny_dit(), ("cat", "dog"))
    from diffusers import DDIMScheduler

    tiny_dit().save_pretrained(tmp_path / "transformer")
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match="DDIMScheduler.*FlowMatchEulerDiscreteScheduler"):
        load(str(tmp_path))


def brightness(media, prompts):
    return media.mean((1, 2, 3))


class Bright:
    """A differentiable reward."""

    name, differentiable, space = "bright", True, "pixel"
    score = staticmethod(brightness)


RECIPES = {
    "dmd2": dmd2(ONE, iterations=2),
    "gan": dmd2(ONE, iterations=2, gan=0.01),
    "refl": refl(ONE, iterations=2),
    "dmdr": dmdr(ONE, warm=1, iterations=1, group=2),
    "lora": dmd2(replace(ONE, lora_rank=2), iterations=2),
    "two steps": dmd2(replace(ONE, steps=2), iterations=2),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train_and_export_parts_that_sample_alike(tmp_path, family, name):
    from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

    recipe = RECIPES[name]
    real = RealSamples(DIGIT_NAMES, noise(10).clamp(-1, 1)) if "real" in recipe.needs else None
    before = family.new_backbone().state_dict()
    run = train(recipe, family, out=tmp_path / "run", prompts=DIGIT_NAMES, reward=Bright(), real=real, options=RunOptions(save_every=10, probe_every=50))
    rows = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and all(v == v for v in rows[-1].values() if isinstance(v, float))
    network = DiTTransformer2DModel.from_pretrained(run.student / "transformer")
    assert any((network.state_dict()[k] - v).abs().max() > 0 for k, v in before.items()), "the student has moved"
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(run.student / "scheduler")
    scheduler.set_timesteps(len(recipe.levels))
    assert torch.allclose(scheduler.sigmas[:-1], torch.tensor(recipe.levels), atol=1e-6)
    again, start, cond = DiTFamily.load(run.student), noise(5), family.encode(DIGIT_NAMES[:5])
    ours = sample_few_step(Role("s", Backbone(again, again.pretrained)), cond, start, recipe.levels, family.path, torch.Generator().manual_seed(3))
    x = start
    rng = torch.Generator().manual_seed(3)
    for t, sigma, after in zip(scheduler.timesteps, scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        v = network(x, timestep=t.expand(5), class_labels=cond.label, return_dict=False)[0]
        x = (1 - after) * (x - sigma * v) + (after * torch.randn(x.shape, generator=rng) if after > 0 else 0)
    assert torch.allclose(ours, x.detach(), atol=1e-4)
    card = (run.student / "README.md").read_text()
    assert "DiTTransformer2DModel" in card and "no stock diffusers pipeline" in card


def test_the_card_of_an_export_runs(tmp_path, family):
    run = train(RECIPES["two steps"], family, out=tmp_path / "run", prompts=DIGIT_NAMES, options=RunOptions(save_every=10, probe_every=50))
    code = (run.student / "README.md").read_text().split("```python\n")[1].split("```")[0].replace('"student"', repr(str(run.student)))
    found: dict = {}
    with torch.no_grad():
        exec(code, found)
    assert found["images"].shape == (10, 1, 8, 8) and found["images"].isfinite().all()
    with pytest.raises(ValueError, match="no stock pipeline samples; the loop that does is in .*student/README.md"):
        find_pipeline(str(run.out))


def test_what_one_step_or_no_pipeline_cannot_do_is_refused(tmp_path, family):
    with pytest.raises(ValueError, match="1-step student has no stochastic step"):
        dmdr(ONE, warm=0, iterations=1, group=2, rl="grpo")
    many = flow_grpo(ManySteps(steps=3, batch=4), iterations=1, group=2)
    with pytest.raises(ValueError, match="has no stock pipeline, and this recipe leaves a many-step model"):
        train(many, family, out=tmp_path / "run", prompts=DIGIT_NAMES, reward=Bright(), options=RunOptions())


def test_adapters_find_their_layers(family):
    backbone = Backbone(family, family.pretrained)
    backbone.add_adapter("student", LoRA(2, 2.0))
    layers = [key.split(".lora_")[0].split("blocks.0.") for key in backbone.adapter_parameters("student") if "blocks.0" in key]
    assert {name.removeprefix("attn1.") for _, name in layers} == set(family.lora_targets)
    assert RoleConfig().lora is None


def test_classifiers_score_the_class_and_have_a_gradient():
    classifier, (scans, classes) = load_digit_classifier("training"), scans_of("reference")
    media, names = scans[:50, None].expand(-1, 3, -1, -1), [str(int(c)) for c in classes[:50]]
    assert classifier.correct(media, names).float().mean() > 0.9
    wrong = [WORDS[(int(n) + 1) % 10] for n in names]
    assert (classifier.score(media, names) > classifier.score(media, wrong)).float().mean() > 0.9 and classifier.score(media, names).max() <= 0
    assert torch.allclose(load_digit_classifier("training", scale="probability").score(media, names), classifier.score(media, names).exp())
    x = media.clone().requires_grad_()
    classifier.score(x, wrong).sum().backward()
    with torch.no_grad():
        assert classifier.score(x + 0.01 * x.grad.sign(), wrong).mean() > classifier.score(x, wrong).mean()
    with pytest.raises(ValueError, match="'eleven' is no digit"):
        classifier.score(media[:1], ["eleven"])
    with pytest.raises(ValueError, match=r"reads \[B, 3, 8, 8\]"):
        classifier.score(media[:, :1], names)


def test_the_bundled_model_is_what_its_record_says():
    folder = folder_of(DIGITS)
    about = json.loads((folder / "pretrain.json").read_text())
    assert about["bytes"] <= 4e6
    for name, expected in about["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected, name
    for classifier in ("training", "monitor", "heldout"):
        assert about["measured"][f"classifier {classifier}"] > 0.97


def test_the_bundled_teacher_draws_the_class_that_is_asked_for():
    family, classifier = load(DIGITS), load_digit_classifier("heldout")
    assert family.size == Size(8, 8, 1) and load(DIGITS, Size(8, 8, 1)).latent_shape == (1, 8, 8)
    with pytest.raises(ValueError, match="8 x 8"):
        load(DIGITS, Size(48, 48, 9))
    teacher, names = Role("teacher", Backbone(family, family.pretrained)), list(DIGIT_NAMES) * 10
    cond, null = family.encode(names), family.unconditional(names)

    def draw(steps, guidance):
        x = sample_ode(teacher, cond, null, noise(100), steps=steps, path=family.path, shift=family.shift, guidance=guidance)
        return family.decode(x).clamp(0, 1)

    def spread(media):
        return float(torch.stack([media[c::10].std(0).mean() for c in range(10)]).mean())

    guided, plain, naive = draw(20, 1.5), draw(20, 1.0), draw(1, 1.0)
    assert classifier.correct(guided, names).float().mean() >= 0.95 and classifier.correct(plain, names).float().mean() >= 0.9
    assert spread(guided) < spread(plain) and spread(naive) < spread(plain) / 3, "guidance narrows, and one naive step draws the class's mean"


def test_real_samples_are_the_training_split_in_latents():
    digits = class_digits()
    real, (scans, _) = digits.real(), scans_of("train")
    assert len(real.prompts) == 800 and torch.allclose(digits.family.decode(real.latents)[:, 1], scans)
    assert set(digits.monitor.metrics(digits.family.decode(real.latents[:20]), real.prompts[:20])) == {"monitor_both", "monitor_score"}


def test_a_little_deformation_keeps_the_digit():
    scans, classes = scans_of("reference")
    rng, classifier = torch.Generator().manual_seed(0), load_digit_classifier("heldout")
    deformed = deform(scans, rng)
    assert deformed.shape == scans.shape and (deformed - scans).abs().mean() > 0.01 and torch.allclose(deform(scans, rng, 0.0), scans, atol=1e-5)
    assert classifier.correct(deformed[:, None].expand(-1, 3, -1, -1), [str(int(c)) for c in classes]).float().mean() > 0.95


@pytest.mark.slow
def test_pretraining_writes_a_model_that_loads_and_depends_on_the_seed_alone(tmp_path):
    short = DigitsConfig(
        tuple(DigitClassifierConfig(name, 1, steps=3) for name in ("training", "monitor", "heldout")), ClassTeacherConfig(steps=3), samples=20, guidances=(1.0,)
    )
    sums = []
    for name in ("a", "b"):
        pretrain_digits(tmp_path / name, 0, torch.get_num_threads(), short)
        sums.append(json.loads((tmp_path / name / "pretrain.json").read_text())["sha256"])
    assert sums[0] == sums[1]
    first, other = (train_class_teacher(short.teacher, seed).proj_out_2.weight for seed in (0, 1))
    assert not torch.equal(first, other)
    assert load(str(tmp_path / "a")).names == WORDS
    with pytest.raises(ValueError, match="threads: 0"):
        pretrain_digits(tmp_path / "d", threads=0)
