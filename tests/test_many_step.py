"""Recipes that train the many-step model itself: sampled by its own sampler, stochastic only while it learns, exported with its own scheduler."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from fast import slow_but
from test_run import PROMPTS, brightness, family, rows

from instep.data.prompt import as_prompts
from instep.diffusion import rollout
from instep.diffusion.guidance import GuidedDenoiser
from instep.diffusion.path import RectifiedFlow
from instep.diffusion.prediction import to_prediction
from instep.diffusion.sampling import Sampling, sample_ode
from instep.diffusion.transitions import Deterministic, FlowSDE
from instep.lab.mixture import ExactTeacher, Mixture, labels
from instep.lab.run import common, ensemble_state
from instep.lab.run import train as train_lab
from instep.lab.spec import build
from instep.lab.world import World, flow_start
from instep.methods.recipe import RolloutConfig, Stage
from instep.methods.term import Batch, Objective, View
from instep.models import load
from instep.recipes import find
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.recipes.many_step import ManySteps, dance_grpo, draft, flow_dpo, flow_grpo
from instep.rewards.base import FunctionReward
from instep.training.options import RunOptions
from instep.training.run import train

TINY = ManySteps(steps=3, batch=4)
NAMES = ("flow-grpo", "dance-grpo", "flow-dpo", "draft")
REWARD = FunctionReward(brightness, "brightness", differentiable=True)


def test_the_student_is_sampled_as_its_teacher_is():
    ring, path = Mixture.ring(), RectifiedFlow()
    cond, null = labels(["0", "1"] * 20), labels([""] * 40)
    noise = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    recipe = flow_grpo(ManySteps(steps=7, guidance=1.5, shift=3.0))
    mine = recipe.sampling(ExactTeacher(ring, path), cond, null, noise, path, torch.Generator())
    theirs = sample_ode(ExactTeacher(ring, path), cond, null, noise, steps=7, path=path, shift=3.0, guidance=1.5)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)  # levels of a recipe are rounded to seven digits


ALTERNATING = [(name, (None, 4)[i % 2]) for i, name in enumerate(NAMES)]


@pytest.mark.parametrize(("name", "lora"), slow_but(ALTERNATING, product(NAMES, (None, 4))))
def test_every_recipe_runs_and_leaves_a_pipeline_with_its_own_scheduler(tmp_path, name, lora):
    from diffusers import DiffusionPipeline

    fam = family()
    recipe = find(name)(replace(TINY, lora_rank=lora), iterations=2, **({} if name == "draft" else {"group": 2}))
    run = train(recipe, fam, out=tmp_path / "run", prompts=PROMPTS, reward=REWARD, options=RunOptions(save_every=1, probe_every=50))
    last = rows(run.out)[-1]
    assert last["step"] == 2 and all(value == value for value in last.values() if isinstance(value, float))
    assert "fake" not in run.state.roles
    pipe = DiffusionPipeline.from_pretrained(run.student, local_files_only=True)
    assert type(pipe.scheduler).__name__ == type(fam.pipe.scheduler).__name__ and pipe.scheduler.config.shift == fam.pipe.scheduler.config.shift
    record = json.loads((run.student / "instep_export.json").read_text())
    assert record["sampler"] == "ode" and record["guidance"] == 3.0 and "num_inference_steps=3, guidance_scale=3" in (run.student / "README.md").read_text()
    assert record["levels"] == list(recipe.levels)
    # the folder is a model like any other, of the size it was trained at: a few-step student can be made of it
    again = load(str(run.student))
    assert again.size == fam.size
    if name == "flow-dpo" and lora is None:
        student = train(dmd2(Common(steps=2, batch=2, critic_updates=1), iterations=1), again, out=tmp_path / "few", prompts=PROMPTS)
        with pytest.raises(ValueError, match="is a few-step student .2 steps., which cannot serve as a many-step teacher"):
            load(str(student.student))


def test_a_policy_gradient_through_a_guided_stochastic_sampler_starts_at_ratio_one(monkeypatch):
    """On the exact mixture's students: every ratio is 1 before the first update, at each of the trained steps, and leaves 1 after it."""
    import instep.methods.policy as module

    seen = []
    real = module.surrogate
    monkeypatch.setattr(module, "surrogate", lambda r, a, c: (seen.append(r.detach().clone()), real(r, a, c))[1])
    world = World.named("ring8", members=2, reward="half")
    start = flow_start(world, 0, steps=100)
    recipe = build("dance-grpo:steps=10,guidance=1.5,fraction=0.5,inner_epochs=2,iterations=1", common(), 1)
    train_lab("x", recipe, world, ensemble_state(recipe, world, start, 0))
    assert len(seen) == 2 * round(0.5 * 9), "half of the nine stochastic steps, in two epochs"
    n = len(seen) // 2
    assert all((r - 1).abs().max() < 1e-4 for r in seen[:n]) and all((r - 1).abs().max() > 1e-4 for r in seen[n:])


@pytest.mark.parametrize(
    "spec",
    [
        "flow-grpo:steps=10,clip=0.2",
        "dance-grpo:steps=10,clip=0.2",
        pytest.param("flow-grpo:steps=10,clip=0.2,sde=cps", marks=pytest.mark.slow),
        "flow-dpo:steps=10,beta=5,iterations=90",
        "draft:steps=10,through=10",
    ],
)
def test_the_many_step_model_learns_what_is_rewarded(spec, start):
    """In the laboratory: half of the modes are rewarded, the learned many-step model has a share of .5."""
    world = World.named("ring8", members=2, reward="half")
    recipe = build(spec, common(), 40)
    state = ensemble_state(recipe, world, start, 0)
    from instep.lab.run import snapshot

    before = snapshot(state, recipe, world).metrics
    after = train_lab("x", recipe, world, state).metrics
    share = lambda metrics: sum(f["share"] for f in metrics) / len(metrics)  # noqa: E731

    assert share(after) > share(before) + 0.1


def test_what_does_not_go_together_is_refused():
    class Policy(Objective):
        @property
        def needs(self):
            return frozenset({"reward", "trajectory"})

    with pytest.raises(ValueError, match="transition: deterministic steps are no policy, and stage 'rl' has a policy gradient"):
        Stage("rl", 1, 8, (Policy(name="p"),), (), RolloutConfig((1.0, 0.5), transition=Deterministic()), group=4)
    with pytest.raises(ValueError, match="fraction: 0 is not allowed"):
        dance_grpo(fraction=0)
    with pytest.raises(ValueError, match="noise: 0 is not allowed"):
        flow_grpo(noise=0)
    with pytest.raises(ValueError, match="steps: 1 is not allowed; a many-step model has 2 to 1000"):
        build("flow-grpo", common(), 9)
    assert flow_dpo().stages[0].needs == {"reward", "reference"} and isinstance(flow_grpo().stages[0].rollout.transition, FlowSDE)
    assert Sampling((1.0,)).kind == "few-step"


@pytest.mark.parametrize("through", [1, 2])
def test_a_rewards_gradient_reaches_the_last_guided_steps(through, monkeypatch):
    """Students x0 = k x_t (k / 2 without the class) in three guided Euler steps: the gradient of k is that of the last `through` steps, written out."""
    levels, w, n, path = (1.0, 0.6, 0.3), 1.5, 4, RectifiedFlow()
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(rollout, "randn", lambda *shape_and_rng: x)
    k = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def student(x_t, t, cond):
        return to_prediction("x0", torch.where(cond.label[:, None] < 0, k / 2, k) * x_t, path, x_t, t)

    (stage,) = draft(ManySteps(steps=3, batch=n, guidance=w), through=through).stages
    cond, null, rng = labels(["0"] * n), labels([""] * n), torch.Generator().manual_seed(0)
    found = rollout.rollout_few_step(
        GuidedDenoiser(student, null, w),
        cond,
        levels,
        path,
        (2,),
        torch.zeros(n, dtype=torch.long),
        rng,
        live=stage.live,
        to_the_end=stage.to_the_end,
        through=stage.rollout.through,
        transition=stage.rollout.transition,
        guidance=w,
    )
    seen = View({}, path, Batch(as_prompts(["0"] * n), cond, null), 0.0, rng, found, lambda x, prompts: x.square().sum(1))
    found.final.x.backward(stage.forces[0](seen))
    for j, (t, s) in enumerate(zip(levels, (*levels[1:], 0.0), strict=True)):
        now = k if j >= 3 - through else k.detach()
        x0 = (now / 2 + w * (now - now / 2)) * x
        x = x0 + s * (x - x0) / t
    (by_hand,) = torch.autograd.grad(-x.square().sum(1).mean(), k)
    torch.testing.assert_close(k.grad, by_hand)
    with pytest.raises(ValueError, match="guidance: 1.5 is not allowed for the rollout of stage 'climb'; of a guided student forces act on the final sample"):
        replace(stage, inner_epochs=2)
