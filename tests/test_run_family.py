"""Every recipe of the matching family on a tiny random Wan: it runs, keeps what it needs, resumes to the same weights, and refuses what it cannot do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_run import PROMPTS, brightness, family, interrupted_before, rows, same

from instep.recipes import NAMES, find
from instep.recipes.common import Common
from instep.recipes.dmd import dmd, dmd2
from instep.recipes.magic import magic
from instep.recipes.refl import refl
from instep.rewards.base import FunctionReward
from instep.training.options import RunOptions
from instep.training.run import train

SHORT = Common(steps=2, batch=4, critic_updates=1)
FEW = RunOptions(save_every=1, probe_every=50, teacher_samples=4)
REWARD = FunctionReward(brightness, differentiable=True)
MATCHING = sorted(set(NAMES) - {"dm-align-pair", "dm-align-group", "pso-offline", "flow-grpo", "dance-grpo", "flow-dpo", "draft", "apo"})


def recipe_of(name, iterations=2):
    if name == "dmdr":
        return find(name)(SHORT, warm=1, iterations=iterations - 1, group=2)
    if name == "dollar":
        return find(name)(SHORT, fit=1, iterations=iterations - 1, cd_steps=1)
    if name == "sft-after":
        return find(name)(SHORT, distil=1, iterations=iterations - 1)
    if name == "rl-after":
        return find(name)(SHORT, distil=1, iterations=iterations - 1, group=2, rl="grpo")
    options = {"group": 2} if name in ("amd", "naive-adaptive") else {}
    return find(name)(SHORT, iterations=iterations, **options)


@pytest.mark.parametrize("name", MATCHING)
def test_every_recipe_runs_on_a_wan_pipeline(tmp_path, name):
    run = train(recipe_of(name), family(), out=tmp_path / "run", prompts=PROMPTS, reward=REWARD, options=FEW)
    last = rows(run.out)[-1]
    assert last["step"] == 2 and all(value == value for value in last.values() if isinstance(value, float)), "finite metrics"
    assert (run.student / "model_index.json").is_file()
    assert (run.out / "teacher_samples.safetensors").is_file() == (name in ("dmd", "dollar", "sft-after")), "only what is needed is made"


def test_a_discriminator_without_real_samples_takes_the_teachers(tmp_path):
    run = train(dmd2(SHORT, iterations=2, gan=0.01), family(), out=tmp_path / "run", prompts=PROMPTS, options=FEW)
    assert (run.out / "teacher_samples.safetensors").is_file()
    assert "force/gan/norm" in rows(run.out)[-1]
    state = run.state.roles["fake"].state()
    assert any(key.startswith("head.") for key in state) and state["head.logit.weight"].abs().max() > 0, "the head has been trained"


@pytest.mark.parametrize(
    "recipe", [dmd2(SHORT, iterations=3, gan=0.01), *(pytest.param(other(SHORT, iterations=3), marks=pytest.mark.slow) for other in (dmd, magic))]
)
def test_heads_adapters_and_stored_pairs_resume_to_the_same_weights(tmp_path, recipe):
    whole = train(recipe, family(), out=tmp_path / "whole", prompts=PROMPTS, options=FEW).out
    with interrupted_before(2):
        train(recipe, family(), out=tmp_path / "cut", prompts=PROMPTS, options=FEW)
    same(whole, train(recipe, family(), out=tmp_path / "cut", prompts=PROMPTS, options=FEW).out)


def test_the_adapter_of_magic_is_not_in_what_the_teacher_says(tmp_path):
    """The teacher's own metrics and the exported student are those of the pretrained network."""
    fam = family()
    run = train(magic(SHORT, iterations=2), fam, out=tmp_path / "run", prompts=PROMPTS, options=FEW)
    teacher = run.state.roles["teacher"]
    cond, t = fam.encode(PROMPTS[:2]), torch.tensor([0.5, 0.8])
    x = torch.randn(2, *fam.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, adapted = teacher(x, t, cond).x0, teacher.scaled(1.0)(x, t, cond).x0
        fresh = family()
        from instep.models.backbone import Backbone
        from instep.models.role import Role

        pretrained = Role("teacher", Backbone(fresh, fresh.pretrained))(x, t, cond).x0
    torch.testing.assert_close(plain, pretrained, rtol=0, atol=0)
    assert (adapted - plain).abs().max() > 0


def test_a_reward_without_a_gradient_is_refused_before_the_work(tmp_path):
    with pytest.raises(ValueError, match="climbs its gradient and 'brightness' is not differentiable; give one that is"):
        train(refl(SHORT, iterations=2), family(), out=tmp_path / "run", prompts=PROMPTS, reward=brightness, options=FEW)
    with pytest.raises(ValueError, match="climbs its gradient and none was given"):
        train(refl(SHORT, iterations=2), family(), out=tmp_path / "run", prompts=PROMPTS, options=FEW)
    assert not (tmp_path / "run").exists()


def broken(media, prompts):
    return media.flatten(1).mean(1).detach()


def infinite(media, prompts):
    return (media.flatten(1).mean(1) * 0).sqrt()


@pytest.mark.parametrize(("function", "text"), [(broken, "its scores have no gradient"), (infinite, "the gradient of 'infinite' is not finite")])
def test_a_gradient_that_does_not_work_is_refused_before_the_work(tmp_path, function, text):
    reward = FunctionReward(function, name=function.__name__, differentiable=True)
    with pytest.raises(ValueError, match=text):
        train(refl(SHORT, iterations=2), family(), out=tmp_path / "run", prompts=PROMPTS, reward=reward, options=FEW)
    assert not (tmp_path / "run").exists()


def test_a_reward_of_latents_is_given_latents(tmp_path):
    seen = []

    def size(x, prompts):
        seen.append(tuple(x.shape[1:]))
        return x.flatten(1).mean(1)

    fam = family()
    train(refl(SHORT, iterations=1), fam, out=tmp_path / "run", prompts=PROMPTS, reward=FunctionReward(size, differentiable=True, space="latent"), options=FEW)
    assert set(seen) == {fam.latent_shape}


def test_starting_from_another_kind_of_run(tmp_path):
    """Without an average there, it begins at the weights; with other steps it is refused, naming what differs."""
    plain = train(dmd2(replace(SHORT, ema=None), iterations=1), family(), out=tmp_path / "plain", prompts=PROMPTS, options=FEW)
    still = dmd2(replace(SHORT, student=replace(SHORT.student, lr=1e-12)), iterations=1)
    run = train(still, family(), out=tmp_path / "more", prompts=PROMPTS, options=FEW, start_from=plain.out)
    for key, value in run.state.trained["student"].ema.items():
        torch.testing.assert_close(value, plain.state.roles["student"].state()[key], rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match=r"state of role 'fake': exits.weight is \(2, .*\) there and \(4, .*\) here; start from a run of the same model"):
        train(dmd2(replace(SHORT, steps=4), iterations=1), family(), out=tmp_path / "four", prompts=PROMPTS, options=FEW, start_from=plain.out)


def test_another_reward_or_other_real_samples_are_another_run(tmp_path):
    train(recipe_of("amd", 1), family(), out=tmp_path / "run", prompts=PROMPTS, reward=REWARD, options=FEW)
    other = FunctionReward(lambda media, prompts: -brightness(media, prompts), name="darkness")
    with pytest.raises(ValueError, match="holds another run .its reward, reward_source differ"):
        train(recipe_of("amd", 1), family(), out=tmp_path / "run", prompts=PROMPTS, reward=other, options=FEW)


def test_starting_from_a_run_without_the_role_is_refused(tmp_path):
    plain = train(dmd2(SHORT, iterations=1), family(), out=tmp_path / "plain", prompts=PROMPTS, options=FEW).out
    with pytest.raises(ValueError, match="start_from: that run has no role 'teacher', which this recipe trains"):
        train(magic(SHORT, iterations=1), family(), out=tmp_path / "run", prompts=PROMPTS, options=FEW, start_from=plain)
    with pytest.raises(ValueError, match="tensors do not fit"):
        train(dmd2(SHORT, iterations=1, gan=0.1), family(), out=tmp_path / "gan", prompts=PROMPTS, options=FEW, start_from=plain)


def test_constant_and_broken_rewards_under_amd(tmp_path):
    """Equal rewards: no advantage, the same weights as plain matching in groups; NaN and wrong shapes are refused at once."""
    amd, plain = recipe_of("amd"), recipe_of("amd")
    stage = plain.stages[-1]
    from instep.methods.operators import Standard

    unweighed = replace(stage, terms=(replace(stage.terms[0], operator=Standard()),), critics=tuple(replace(c, tilt=0.0) for c in stage.critics))
    plain = replace(plain, stages=(unweighed,))
    constant = lambda media, prompts: torch.full((len(media),), 0.25)  # noqa: E731
    one = train(amd, family(), out=tmp_path / "amd", prompts=PROMPTS, reward=constant, options=FEW)
    other = train(plain, family(), out=tmp_path / "plain", prompts=PROMPTS, reward=constant, options=FEW)
    for key, value in one.state.roles["student"].state().items():
        torch.testing.assert_close(value, other.state.roles["student"].state()[key], rtol=1e-4, atol=1e-6)
    assert rows(one.out)[-1]["reward/constant_groups"] == 1.0
    for broken, said in (
        (lambda media, prompts: torch.full((len(media),), torch.nan), "returned nan"),
        (lambda media, prompts: torch.zeros(len(media), 2), r"returned \(2, 2\) for 2 samples"),
    ):
        with pytest.raises(ValueError, match=said):
            train(amd, family(), out=tmp_path / "broken", prompts=PROMPTS, reward=broken, options=FEW)
