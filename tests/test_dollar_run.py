"""DOLLAR as a run: resumed, started from another run, with a reward that is a black box; its health checks; and what it does in the laboratory."""

from __future__ import annotations

import pytest
import torch
from fast import slow_but
from test_health import history
from test_run import PROMPTS, family, interrupted_before, rows, same

from instep.data.samples import RealSamples
from instep.lab.run import common, ensemble_state
from instep.lab.run import train as train_lab
from instep.lab.spec import build
from instep.lab.world import World
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.recipes.dollar import dollar
from instep.rewards.base import FunctionReward
from instep.rewards.ranker import Ranked, RewardRanker
from instep.rewards.several import several
from instep.training import checkpoint
from instep.training.health import examine
from instep.training.options import RunOptions
from instep.training.run import train

SHORT = Common(steps=2, batch=4, critic_updates=1)
OPTIONS = RunOptions(save_every=1, probe_every=50, keep=9)
# a number that comes out of numpy: no gradient can come through it
BLACK_BOX = FunctionReward(lambda media, prompts: media.detach().numpy().mean((1, 2, 3, 4)), name="black box")


def real(n: int = 8) -> RealSamples:
    rng = torch.Generator().manual_seed(0)
    return RealSamples(tuple(PROMPTS[i % len(PROMPTS)] for i in range(n)), torch.randn(n, *family().latent_shape, generator=rng))


@pytest.mark.parametrize("lora", slow_but([4], [None, 4]))
def test_a_run_with_a_latent_reward_and_an_average_resumes_to_the_same_weights(tmp_path, lora):
    recipe = dollar(Common(steps=2, batch=4, critic_updates=1, lora_rank=lora), fit=1, iterations=3, target="average", cd_steps=2, latent_reward_updates=2)
    whole = train(recipe, family(), out=tmp_path / "whole", prompts=PROMPTS, reward=BLACK_BOX, real=real(), options=OPTIONS)
    last = rows(whole.out)[-1]
    assert {"force/latent/norm", "objective/consistency", "critic/latent_reward", "reward/train"} <= last.keys()
    assert {"latent_reward/correlation", "latent_reward/error"} <= last.keys()
    first, second = (checkpoint.load(checkpoint.at(whole.out / "checkpoints", step)) for step in (1, 2))
    assert all(torch.equal(p, first["ema"]["student"][key]) for key, p in first["roles"]["student"].items()), "fitting leaves the student as it is"
    before, after = first["roles"], second["roles"]
    moved = {name: any(not torch.equal(p, before[name][key]) for key, p in after[name].items()) for name in ("student", "fake", "latent_reward")}
    assert all(moved.values()), "and then all three are trained"
    with interrupted_before(2):
        train(recipe, family(), out=tmp_path / "cut", prompts=PROMPTS, reward=BLACK_BOX, real=real(), options=OPTIONS)
    again = train(recipe, family(), out=tmp_path / "cut", prompts=PROMPTS, reward=BLACK_BOX, real=real(), options=OPTIONS)
    same(whole.out, again.out)
    latent_rewards = [checkpoint.load(checkpoint.latest(out / "checkpoints"))["roles"]["latent_reward"] for out in (whole.out, again.out)]
    assert all(torch.equal(a, latent_rewards[1][key]) for key, a in latent_rewards[0].items())
    student, mean = (again.state.roles[name].named_parameters() for name in ("student", "average"))
    assert len(student) == len(mean) == len(again.state.average)


def test_a_latent_reward_is_new_after_a_run_without_and_kept_after_one_with(tmp_path):
    """Pretrained or concurrent: --start-from hands it on."""
    plain = train(dmd2(SHORT, iterations=1), family(), out=tmp_path / "plain", prompts=PROMPTS, options=OPTIONS)
    fitted = train(
        dollar(SHORT, fit=2, iterations=0),
        family(),
        out=tmp_path / "fit",
        prompts=PROMPTS,
        reward=BLACK_BOX,
        real=real(),
        options=OPTIONS,
        start_from=plain.out,
    )
    assert all(torch.equal(p, plain.state.trained["student"].parameters[key]) for key, p in fitted.state.trained["student"].parameters.items())
    more = dollar(SHORT, fit=0, cd=0, iterations=1, latent_reward_updates=1)
    run = train(more, family(), out=tmp_path / "run", prompts=PROMPTS, reward=BLACK_BOX, real=real(), options=OPTIONS, start_from=fitted.out)
    assert run.state.trained["latent_reward"].steps == 2 * 4 + 1 and float(run.state.latent_reward.seen) == 3 * 12
    with pytest.raises(ValueError, match="does not fit this one; start from a run with the same --kind"):
        train(
            dollar(SHORT, fit=0, kind="video", iterations=1),
            family(),
            out=tmp_path / "other",
            prompts=PROMPTS,
            reward=BLACK_BOX,
            real=real(),
            options=OPTIONS,
            start_from=fitted.out,
        )


def test_a_latent_reward_of_another_reward_is_not_taken_over(tmp_path, capsys):
    fit = dollar(SHORT, fit=1, iterations=0)
    first = train(fit, family(), out=tmp_path / "fit", prompts=PROMPTS, reward=BLACK_BOX, real=real(), options=OPTIONS)
    other = FunctionReward(lambda media, prompts: 1000 * BLACK_BOX.function(media, prompts), name="thousandfold")
    run = train(fit, family(), out=tmp_path / "run", prompts=PROMPTS, reward=other, real=real(), options=OPTIONS, start_from=first.out)
    assert "was fitted to 'black box', not to 'thousandfold': a new one begins" in capsys.readouterr().out
    assert float(run.state.latent_reward.seen) == 12 and float(run.state.latent_reward.mean) > 100


def test_several_rewards_and_a_ranker(tmp_path):
    both = several((BLACK_BOX, 1.0), (FunctionReward(lambda media, prompts: 1000 * media.std((1, 2, 3, 4)), name="contrast"), 0.5))
    run = train(dollar(SHORT, fit=1, iterations=1, cd=0), family(), out=tmp_path / "both", prompts=PROMPTS, reward=both, real=real(), options=OPTIONS)
    assert {"reward/train/0", "reward/train/1"} <= rows(run.out)[-1].keys() and run.state.latent_reward.mean.shape == (2,)
    ranked = Ranked(RewardRanker(BLACK_BOX))
    with pytest.raises(ValueError, match="compares samples with each other, and stage 'fit' needs the score of each"):
        train(dollar(SHORT), family(), out=tmp_path / "ranked", prompts=PROMPTS, reward=ranked, real=real(), options=OPTIONS)


def test_consistency_alone_and_a_student_that_predicts_x0(tmp_path, capsys):
    alone = dollar(SHORT, matching=0, weight=0, cd=1.0, iterations=1, cd_steps=2)
    run = train(alone, family(), out=tmp_path / "cd", prompts=PROMPTS, options=RunOptions(teacher_samples=4), real=real())
    assert run.student is not None and "force/dm/norm" not in rows(run.out)[-1]
    direct = dollar(SHORT, weight=0, iterations=1, cd_steps=1, prediction_type="x0")
    other = train(direct, family(), out=tmp_path / "x0", prompts=PROMPTS, real=real(), options=OPTIONS)
    assert other.student is None and "not exported: the student predicts x0" in capsys.readouterr().out and not (other.out / "student").exists()
    with pytest.raises(ValueError, match="start_from: that run's student predicts x0, this recipe's what its model does"):
        train(dmd2(SHORT, iterations=1), family(), out=tmp_path / "mixed", prompts=PROMPTS, options=OPTIONS, start_from=other.out)
    assert "fake" not in run.state.roles
    assert other.state.roles["student"].prediction_type == "x0" and other.state.roles["fake"].prediction_type == "velocity"


def test_what_is_missing_is_said_before_the_run(tmp_path):
    with pytest.raises(ValueError, match="reward: stage 'fit' of dollar needs one"):
        train(dollar(SHORT), family(), out=tmp_path / "a", prompts=PROMPTS, real=real(), options=OPTIONS)
    with pytest.raises(ValueError, match="kind: 'image' does not fit this model"):
        train(dollar(SHORT, kind="image"), family(), out=tmp_path / "b", prompts=PROMPTS, reward=BLACK_BOX, real=real(), options=OPTIONS)


def test_health_knows_the_stage_that_only_fits_and_a_reward_that_is_climbed_by_proxy():
    recipe = dollar(SHORT, fit=60, iterations=60)
    fitting = history(60, 60)
    for row in fitting:
        row["stage"] = {"distil": "fit", "align": "dollar"}.get(row["stage"], row["stage"])
    still = [row for row in fitting if row["step"] <= 60]
    assert not [f.flag for f in examine(still, recipe) if f.flag == "stuck"], "nothing is to be learned yet"
    far = history(60, 60, probes=lambda step: {"mean_brightness": 0.05, "diversity": 0.01, "motion": 0.001} if step <= 60 else {})
    for row in far:
        row["stage"] = {"distil": "fit", "align": "dollar"}.get(row["stage"], row["stage"])
    assert not any(examine(far[: i + 1], recipe) for i in range(62)), "an untrained student that stands still is no finding"
    assert "stuck" in {f.flag for f in examine(fitting, recipe)}, "but sixty iterations later something should have been"
    hacked = history(60, 60, probes=lambda step: {"train_score": -0.5 + 0.02 * max(0, step - 60), "monitor_both": 0.9 - 0.005 * max(0, step - 60)})
    for row in hacked:
        row["stage"] = {"distil": "fit", "align": "dollar"}.get(row["stage"], row["stage"])
    assert "hacking" in {f.flag for f in examine(hacked, recipe)}


def lab(spec: str, start, iterations: int = 250, reward: str = "half"):
    world = World.named("ring8", members=2, reward=reward)
    recipe = build(spec, common(), iterations)
    run = train_lab(spec, recipe, world, ensemble_state(recipe, world, start, 0))
    return run, {key: sum(f[key] for f in run.metrics) / len(run.metrics) for key in run.metrics[0]}


@pytest.mark.slow
def test_a_black_box_is_followed_through_its_copy(start):
    """The share of rewarded samples rises without a gradient of the reward; without the copy it stays at a half."""
    _, plain = lab("dollar:weight=0,cd=0", start)
    run, climbed = lab("dollar:kind=image,cd=0,fit=100,weight=0.1", start)
    assert abs(plain["share"] - 0.5) < 0.06 and climbed["share"] > plain["share"] + 0.08
    x = torch.randn(512, 2)
    cond = run.world.batch(run.recipe.stages[0], 1.0, torch.Generator().manual_seed(0)).cond
    said = run.state.latent_reward.rate(x, cond).detach()
    assert float(torch.corrcoef(torch.stack([said, run.world.score(x, ["0"] * 512)]))[0, 1]) > 0.9


@pytest.mark.slow
def test_consistency_distillation_alone_makes_a_student(start):
    """From the many-step start, one step: better than the start in one step, by consistency alone; and beside matching it does no harm."""
    _, before = lab("dollar:weight=0,cd=0", start, iterations=1)
    _, alone = lab("dollar:weight=0,matching=0,cd=1", start)
    _, both = lab("dollar:weight=0", start)
    assert alone["quality"] > before["quality"] + 0.1 and both["quality"] > alone["quality"]
