"""Diffusion-APO's recipe: five stages, each alone or in sequence, on a tiny Wan and in the laboratory; labelled pairs from files and the bundled model."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from fast import slow_but
from test_run import PROMPTS, brightness, family, rows, same

from instep.cli.export import newest_step, read_run, sampling_of
from instep.core.size import Size
from instep.data.animation import save_animation
from instep.data.media import fitted, pair_samples, read_media, slow_motion
from instep.data.prompt import texts_of
from instep.data.samples import PairSamples
from instep.diffusion.level_windows import HighLow
from instep.diffusion.levels import OneOf, Uniform
from instep.lab.run import common, ensemble_state, snapshot
from instep.lab.run import train as train_lab
from instep.lab.spec import build
from instep.lab.world import World
from instep.methods.preference import Preference
from instep.methods.role_config import AdamWConfig
from instep.recipes.apo import apo
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.recipes.many_step import ManySteps
from instep.rewards.ranker import Ranked, reward_ranker
from instep.training import loop as module
from instep.training.options import RunOptions
from instep.training.run import train

TINY = ManySteps(steps=6, batch=4)
QUICK = RunOptions(save_every=1, probe_every=50)
ONE_EACH = {"online": 1, "half_online": 1, "offline": 1, "distill_guidance": 1, "post_distillation": 1}
NONE = dict.fromkeys(ONE_EACH, 0)
RANKED = Ranked(reward_ranker(brightness))


def some_pairs(n=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shape = family().latent_shape
    return PairSamples(tuple(PROMPTS[i % len(PROMPTS)] for i in range(n)), torch.randn(n, *shape, generator=rng), torch.randn(n, *shape, generator=rng))


PAIRS = some_pairs()


def test_the_five_stages_are_the_papers():
    recipe = apo()
    assert [stage.name for stage in recipe.stages] == ["online", "half-online", "offline", "distill-guidance", "post-distillation"]
    online, half, offline, distill, post = recipe.stages
    assert (online.group, online.rollout.guidance, half.group, offline.rollout, distill.rollout) == (2, 3.0, 1, None, None)
    assert online.batch == 2 * offline.batch, "as many pairs an update"
    terms = [stage.terms[0] for stage in (online, half, offline, post)]
    assert [term.pairs for term in terms] == ["online", "half-online", "offline", "offline"]
    assert all(term.levels == HighLow(10, (3.0, 4.0, 5.0, 6.0), 5.0, 4, 1) for term in terms)
    assert [stage.guided for stage in recipe.stages] == [True, True, True, False, False]
    assert [recipe.sampling_at(step).guidance for step in (0, 1, 60, 61, 360, 375)] == [3.0, 3.0, 3.0, 1.0, 1.0, 1.0]
    assert recipe.sampling.guidance == 1.0 and recipe.guidance == 3.0
    # ablations
    assert apo(random_shift=False, offset=0, distill_guidance=0, post_distillation=0).stages[0].terms[0].levels == HighLow(10, (3.0,), 0.0)
    (dpo,) = apo(**NONE | {"offline": 5}, uniform=1).stages
    assert [type(part) for part in dpo.terms[0].levels.window] == [Uniform]
    (few,) = apo(ManySteps(steps=4), **NONE | {"online": 5}, few_step=True).stages
    assert few.terms[0].levels.window == (OneOf(ManySteps(steps=4).levels),) and few.rollout.guidance == 1


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="distill_guidance: 600 is not allowed with few_step"):
        apo(few_step=True)
    with pytest.raises(ValueError, match="post_distillation: 15 is not allowed here"):
        apo(distill_guidance=0)
    with pytest.raises(ValueError, match="steps: a sampler of 2 steps with shift 4"):
        apo(ManySteps(steps=2))
    with pytest.raises(ValueError, match="pairs: stage 'half-online' of apo needs labelled pairs"):
        train(apo(TINY, **ONE_EACH), family(), out=tmp_path / "a", prompts=PROMPTS, reward=brightness, options=QUICK)
    with pytest.raises(ValueError, match="real: stage 'half-online' of apo needs preferred samples"):
        recipe = apo(TINY, **NONE | {"half_online": 1}, positive=1.0)
        train(recipe, family(), out=tmp_path / "b", prompts=PROMPTS, options=QUICK)
    with pytest.raises(ValueError, match="pairs: latents of shape .2,. do not fit the model's"):
        wrong = PairSamples(("a",), torch.zeros(1, 2), torch.zeros(1, 2))
        train(apo(TINY, **NONE | {"offline": 1}), family(), out=tmp_path / "c", prompts=PROMPTS, pairs=wrong, options=QUICK)
    with pytest.raises(ValueError, match="pairs: 2 prompts, chosen samples .3, 2. and rejected ones .3, 2."):
        PairSamples(("a", "b"), torch.zeros(3, 2), torch.zeros(3, 2))


@pytest.fixture(scope="module", params=[None, 4])
def whole(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("apo") / "whole"
    recipe = apo(replace(TINY, lora_rank=request.param), **ONE_EACH, skip=0.5, skip_blocks=(1,))
    return recipe, train(recipe, family(), out=out, prompts=PROMPTS, reward=RANKED, pairs=PAIRS, options=QUICK)


def test_the_whole_pipeline_runs_and_leaves_a_model_that_is_sampled_without_guidance(whole):
    recipe, run = whole
    seen = rows(run.out)
    assert [row["stage"] for row in seen] == ["start", "online", "half-online", "offline", "distill-guidance", "post-distillation"]
    # each stage begins at its own reference
    assert all(row["objective/dpo"] == pytest.approx(0.6931472, abs=1e-4) for row in seen[2:] if "objective/dpo" in row) and "objective/guidance" in seen[4]
    assert run.state.reference_stage == "post-distillation" and "probe/train_score" not in seen[-1], "the mean of a comparison says nothing"
    record = json.loads((run.student / "instep_export.json").read_text())
    assert record["guidance"] == 1.0 and record["sampler"] == "ode"
    assert "guidance_scale=1" in (run.student / "README.md").read_text()
    written = read_run(run.out)
    assert sampling_of(written) == recipe.sampling and newest_step(run.out) == 5
    assert [sampling_of(written, step) == recipe.sampling_at(step) for step in range(6)] == [True] * 6
    assert not (run.out / "teacher_samples.safetensors").exists(), "chosen samples serve as real ones"


@pytest.mark.parametrize("at", slow_but([3], range(5)))
def test_killed_anywhere_it_ends_the_same(whole, tmp_path, monkeypatch, at):
    """Between stages (each has one step), and before the first."""
    recipe, run = whole
    real_iteration = module.iteration

    def stops(state, *args):
        if state.step == at:
            raise KeyboardInterrupt
        return real_iteration(state, *args)

    parts = {"out": tmp_path / "cut", "prompts": PROMPTS, "reward": RANKED, "pairs": PAIRS, "options": QUICK}
    monkeypatch.setattr(module, "iteration", stops)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, family(), **parts)
    monkeypatch.setattr(module, "iteration", real_iteration)
    same(run.out, train(recipe, family(), **parts).out)
    with pytest.raises(ValueError, match="holds another run .its real, pairs differ"):
        train(recipe, family(), **parts | {"pairs": some_pairs(seed=1)})


@pytest.mark.parametrize(("fresh", "steps"), [(True, [1, 2, 1, 2]), (False, [1, 2, 3, 4])])
def test_each_stage_begins_with_an_optimiser_that_knows_of_no_other(start, fresh, steps):
    """Moments of preferences, whose gradients are hundreds of times larger, would hold guidance distillation back for as long as AdamW remembers."""
    world = World.named("ring8", members=2, reward="half")
    recipe = apo(replace(LAB, guidance=1.5), **NONE | {"offline": 2, "distill_guidance": 2})
    assert all(stage.fresh for stage in recipe.stages)
    recipe = replace(recipe, stages=tuple(replace(stage, fresh=fresh) for stage in recipe.stages))
    state = ensemble_state(recipe, world, start, 0)
    seen = []
    train_lab("x", recipe, world, state, on_step=lambda: seen.append({int(s["step"]) for s in state.trained["student"].optimizer.state.values()}))
    assert seen == [{n} for n in steps]


def test_guidance_distillation_has_an_optimiser_of_its_own(start):
    world = World.named("ring8", members=2, reward="half")
    own = AdamWConfig(5e-4, betas=(0.8, 0.95), weight_decay=0.1, decay=0.5)
    recipe = apo(replace(LAB, guidance=1.5), **NONE | {"offline": 1, "distill_guidance": 2, "post_distillation": 1}, distill_guidance_optim=own)
    state, seen = ensemble_state(recipe, world, start, 0), []
    groups = state.trained["student"].optimizer.param_groups
    train_lab("x", recipe, world, state, on_step=lambda: seen.append([(g["lr"], g["betas"], g["weight_decay"]) for g in groups]))
    usual = [(LAB.student.lr_at(0, 0.0), LAB.student.betas, LAB.student.weight_decay)]
    assert seen[0] == seen[3] == usual and seen[1] == seen[2] == [(5e-4, (0.8, 0.95), 0.1)]
    assert apo().stages[3].optim == AdamWConfig(3e-4, betas=(0.9, 0.999), decay=0.5)
    assert {s.optim for s in apo().stages if s.name != "distill-guidance"} == {None}


@pytest.mark.parametrize("stage", list(ONE_EACH))
def test_each_stage_is_a_run_of_its_own(tmp_path, stage):
    """From the run before it, with `start_from`; a stage asks only for what it needs. What was guided into the weights is not guided again."""
    recipe = apo(TINY, **NONE | {stage: 1})
    (only,) = recipe.stages
    given = {"reward": brightness} if "reward" in only.needs else {}
    given |= {"pairs": PAIRS} if only.needs & {"pairs", "real"} else {}
    # the last stage goes on with a student that has learned its guidance
    before = apo(TINY, **NONE | {"distill_guidance": 1}) if stage == "post_distillation" else recipe
    run = train(before, family(), out=tmp_path / "one", prompts=PROMPTS, options=QUICK, **given)
    assert recipe.sampling.guidance == (1.0 if stage in ("distill_guidance", "post_distillation") else 3.0)
    parts = {"out": tmp_path / "two", "prompts": PROMPTS, "options": QUICK, "start_from": run.out, **given}
    if stage == "distill_guidance":
        with pytest.raises(ValueError, match="stage 'distill-guidance' would guide it a second time"):
            train(recipe, family(), **parts)
        recipe = apo(TINY, **NONE | {"post_distillation": 1})
    assert rows(train(recipe, family(), **parts).out)[-1]["step"] == 1


def test_a_few_step_student_goes_on_with_preferences_at_its_own_levels(tmp_path):
    few = train(dmd2(Common(steps=3, batch=4, critic_updates=1), iterations=1), family(), out=tmp_path / "few", prompts=PROMPTS, options=QUICK)
    recipe = apo(ManySteps(steps=3, batch=4), **NONE | {"online": 1, "half_online": 1, "offline": 1, "post_distillation": 1}, few_step=True)
    run = train(recipe, family(), out=tmp_path / "apo", prompts=PROMPTS, reward=brightness, pairs=PAIRS, options=QUICK, start_from=few.out)
    assert json.loads((run.student / "instep_export.json").read_text())["levels"] == list(few.recipe.levels)


LAB = ManySteps(steps=10, batch=256, guidance=1.0, student=AdamWConfig(3e-4, betas=(0.5, 0.99), clip=1e9, decay=0.6), ema=None)


def win_rate(world, before, after):
    """Share of the same noises whose sample scores visibly higher than at the start, those that score alike (within .1) as half."""
    a, b = (world.score(x.flatten(0, 1), [""] * x.flatten(0, 1).shape[0]) for x in (after.samples, before.samples))
    return float(0.5 + 0.5 * ((a > b + 0.1).float() - (a < b - 0.1).float()).mean())


@pytest.mark.parametrize("stage", slow_but(["half_online", "offline"], ["online", "half_online", "offline"]))
@pytest.mark.parametrize(("kind", "steps"), [pytest.param("dpo", 250, marks=pytest.mark.slow), ("apo", 50)])
def test_in_the_laboratory_both_win_against_the_start(start, stage, kind, steps):
    """Half of the modes are chosen; as many gradient evaluations of each (one level or five an update)."""
    world = World.named("ring8", members=2, reward="half")
    recipe = apo(LAB, **NONE | {stage: steps}, beta=2.0, uniform=1 if kind == "dpo" else 0)
    state = ensemble_state(recipe, world, start, 0)
    before = snapshot(state, recipe, world)
    run = train_lab("x", recipe, world, state)
    share = lambda metrics: sum(f["share"] for f in metrics) / len(metrics)  # noqa: E731
    assert win_rate(world, before, run.snapshots[-1]) > 0.53
    assert share(run.metrics) > share(before.metrics) + 0.04


def test_the_laboratory_takes_its_name():
    recipe = build("apo:steps=10,online=5,half_online=0,offline=5,distill_guidance=0,post_distillation=0,beta=5", common(), 60)
    assert [(stage.name, stage.steps) for stage in recipe.stages] == [("online", 5), ("offline", 5)]
    world = World.named("ring8", reward="on-mode")
    with pytest.raises(ValueError, match="reward: stage 'offline' needs labelled pairs; they come from --reward half"):
        world.batch(recipe.stages[1], 1.0, torch.Generator())


def test_pairs_of_the_bundled_model_are_told_apart_by_a_classifier_that_did_not_make_them():
    from instep.bundled.classifiers import load_classifier
    from instep.bundled.worlds import moving_digits

    digits = moving_digits()
    pairs, again = digits.pairs(48), digits.pairs(48)
    assert torch.equal(pairs.rejected, again.rejected) and pairs.prompts == again.prompts
    classifier = load_classifier("monitor")
    media = [digits.family.decode(x).clamp(0, 1) for x in (pairs.chosen, pairs.rejected)]
    good, bad = (classifier.correct(x, pairs.prompts).both.float().mean() for x in media)
    assert good > 0.9 and bad < 0.5
    assert (pairs.chosen - pairs.rejected).flatten(1).abs().sum(1).min() > 0, "no pair of equals"


def test_slow_motion_keeps_the_first_half():
    video = torch.arange(9.0)[None, None, :, None, None].expand(2, 3, 9, 2, 2)
    slowed = slow_motion(video)
    torch.testing.assert_close(slowed[0, 0, :, 0, 0], torch.arange(9.0) / 2)
    assert slowed.shape == video.shape
    with pytest.raises(ValueError, match="factor: 1 is not allowed"):
        slow_motion(video, 1)


@dataclass
class Labelled:
    prompt: str
    chosen: Path
    rejected: Path
    tie: bool = False


def test_labelled_files_become_latents(tmp_path):
    fam, rng = family(), torch.Generator().manual_seed(0)
    videos = torch.rand(3, 9, 48, 48, 3, generator=rng).mul(255).round().to(torch.uint8)
    for name, video in zip("abc", videos, strict=True):
        save_animation(tmp_path / f"{name}.webp", video)
    files = {name: tmp_path / f"{name}.webp" for name in "abc"}
    media = read_media(files["a"])
    torch.testing.assert_close(media, videos[0].permute(3, 0, 1, 2).float() / 255)
    made = pair_samples([Labelled("x", files["a"], files["b"]), Labelled("y", files["b"], files["c"], tie=True), Labelled("z", files["c"], files["a"])], fam)
    assert texts_of(made.prompts) == ["x", "z"], "a tie says nothing"
    torch.testing.assert_close(made.chosen[0], fam.encode_media(media[None])[0])
    torch.testing.assert_close(made.rejected[1], made.chosen[0])
    with pytest.raises(ValueError, match="pairs: all 1 of them are ties"):
        pair_samples([Labelled("y", files["b"], files["c"], tie=True)], fam)
    (tmp_path / "bad.webp").write_bytes(b"no image")
    with pytest.raises(ValueError, match="bad.webp cannot be read as an image"):
        read_media(tmp_path / "bad.webp")
    with pytest.raises(ValueError, match="ends in '.txt'; allowed: .webp"):
        read_media(tmp_path / "x.txt")
    with pytest.raises(ValueError, match="x has 9 frames and the model takes 13"):
        fitted(media, Size(48, 48, 13), "x")
    with pytest.raises(ValueError, match="x is 48 x 48, not of the shape of 48 x 96"):
        fitted(media, Size(48, 96, 9), "x")
    assert fitted(media, Size(24, 24, 5), "x").shape == (3, 5, 24, 24) and fitted(media, Size(96, 96, 9), "x").shape == (3, 9, 96, 96)


def test_preferences_of_people_are_a_preference(tmp_path):
    """The whole way of a file of pairs: read, encoded, trained on."""
    pairs = pytest.importorskip("instep.data.pairs", reason="the reader of preference files")
    rng = torch.Generator().manual_seed(0)
    for name in "ab":
        save_animation(tmp_path / f"{name}.webp", torch.rand(9, 48, 48, 3, generator=rng).mul(255).round().to(torch.uint8))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a digit", "chosen": "a.webp", "rejected": "b.webp"}) + "\n")
    fam = family()
    made = pair_samples(pairs.read_pairs(tmp_path / "pairs.jsonl"), fam)
    run = train(apo(TINY, **NONE | {"offline": 1}), fam, out=tmp_path / "run", prompts=PROMPTS, pairs=made, options=QUICK)
    assert isinstance(run.recipe.stages[0].terms[0], Preference)
