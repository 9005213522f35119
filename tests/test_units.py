"""Weights in one unit: the gradient of each term alone, and shares of matching's gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from fast import slow_but
from test_run import PROMPTS, brightness, family, rows, weights
from test_skeletons import LEVELS, batch_of, mlp_state, prompts
from test_stop import Brightness
from test_wan22 import family as two_experts

from instep.lab.run import common, ensemble_state
from instep.lab.world import World, flow_start
from instep.methods.align import AlignGroup
from instep.methods.matching import DistributionMatching
from instep.methods.policy import GRPO
from instep.methods.recipe import RolloutConfig, Stage
from instep.methods.term import Objective
from instep.recipes.after import rl_after
from instep.recipes.common import Common
from instep.recipes.dmdr import dmdr
from instep.recipes.refl import refl
from instep.training.execution import Execution
from instep.training.options import RunOptions
from instep.training.run import train
from instep.training.state import NormRatio
from instep.training.step import iteration
from instep.training.term_gradients import SHARE_EVERY, due

WORLD = World.named("ring8", members=1, reward="half")
# of the ratio of mean norms over 40 iterations to the share that was asked for
TOLERANCE = 0.15


@pytest.fixture(scope="module")
def start():
    return flow_start(WORLD, 0, steps=1500)


def gradients_of(stage: Stage, seen: list, *, measure: bool, micro: int = 1, steps: int = 1):
    """Runs a stage from one state; collects the student's gradient of every step, and returns the log of the last one and the state."""
    state = mlp_state(reward_fn=lambda x, names: x[:, 0])
    student, real = state.trained["student"], state.trained["student"].step

    def step(lr, optim):
        seen.append(torch.cat([p.grad.flatten() for p in student.parameters.values()]))
        return real(lr, optim)

    student.step = step
    log = {}
    for _ in range(steps):
        batches = [batch_of(prompts(8, state.rng)) for _ in range(micro)]
        log = iteration(state, stage, batches, 0.0, measure=measure)
    return log, state


def joint(*terms, **options) -> Stage:
    return Stage("joint", 10, 32, terms, (), RolloutConfig(LEVELS), group=4, **options)


@pytest.mark.parametrize("micro", [1, 3])
def test_measuring_changes_no_bit(micro):
    stage = joint(DistributionMatching(weight=0.5), AlignGroup(weight=0.5), GRPO(weight=0.3), inner_epochs=2)
    plain, measured = [], []
    gradients_of(stage, plain, measure=False, micro=micro, steps=3)
    log, _ = gradients_of(stage, measured, measure=True, micro=micro, steps=3)
    assert len(plain) == 6 and all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))
    assert {"term/dm/gradient", "term/group/gradient", "term/grpo/gradient"} <= log.keys()


@pytest.mark.parametrize("micro", [1, 3])
def test_the_norm_of_a_term_is_that_of_a_run_with_it_alone(micro):
    """Weight excluded: the gradient that the term leaves where all others have weight 0, summed over micro-batches and transitions."""
    terms = (DistributionMatching(weight=0.5), AlignGroup(weight=0.4), GRPO(weight=0.3))
    log, _ = gradients_of(joint(*terms), [], measure=True, micro=micro)
    for term in terms:
        alone: list[torch.Tensor] = []
        gradients_of(joint(*(replace(other, weight=float(other is term)) for other in terms)), alone, measure=False, micro=micro)
        assert log[f"term/{term.name}/gradient_unweighted"] == pytest.approx(float(alone[0].norm()), rel=1e-4)
        assert log[f"term/{term.name}/gradient"] == pytest.approx(term.weight * float(alone[0].norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("rl", "weight"), slow_but([("refl", 0.1), ("grpo", 0.5), ("ddpo", 0.1), ("dpo", 0.5)], product(("refl", "grpo", "ddpo", "dpo"), (0.1, 0.5)))
)
def test_a_share_is_that_part_of_matchings_gradient(start, rl, weight):
    recipe = dmdr(common(2), warm=0, iterations=200, rl=rl, weight=weight)
    state, stage = ensemble_state(recipe, WORLD, start, 0), recipe.stages[0]
    rows = [iteration(state, stage, [WORLD.batch(stage, 1.0, state.rng)], n / 200, measure=n >= 20) for n in range(60)]
    mean = lambda name: sum(row[f"term/{name}/gradient"] for row in rows[20:]) / 40  # noqa: E731
    assert mean(stage.terms[1].name) / mean("dm") == pytest.approx(weight, rel=TOLERANCE)
    assert rows[0][f"term/{stage.terms[1].name}/gradient"] == 0, "the first iteration measures, and leaves the term out"


def test_raw_weights_are_as_far_apart_as_the_losses(start):
    norms = {}
    for rl in ("ddpo", "dpo"):
        recipe = dmdr(common(2), warm=0, iterations=10, rl=rl, weight_unit="raw")
        state, stage = ensemble_state(recipe, WORLD, start, 0), recipe.stages[0]
        norms[rl] = iteration(state, stage, [WORLD.batch(stage, 1.0, state.rng)], 0.0, measure=True)[f"term/{rl}/gradient"]
        assert not state.ratios
    assert norms["dpo"] > 100 * norms["ddpo"]


def test_running_ratio():
    ratio = NormRatio().moved(2.0, 4.0)
    assert ratio.value == 0.5
    assert ratio.moved(4.0, 4.0) == NormRatio(3.0, 4.0, 2), "the mean of the first measurements"
    for _ in range(40):
        ratio = ratio.moved(1.0, 8.0)
    assert ratio.value == pytest.approx(1 / 8, rel=1e-2) and ratio.count == NormRatio.HORIZON
    assert ratio.moved(float("nan"), 1.0) == ratio
    assert NormRatio().moved(1.0, 0.0).value == 0, "a term that has no gradient yet gets no weight"


def test_measurements_of_shares():
    stage = refl(common(2), iterations=40).stages[0]
    assert [n for n in range(20) if due(stage, n / 40)] == [0, 1, 2, 4, SHARE_EVERY, 2 * SHARE_EVERY, 3 * SHARE_EVERY]
    assert not any(due(refl(common(2), iterations=40, weight_unit="raw").stages[0], n / 40) for n in range(20))


def test_a_share_needs_matching():
    with pytest.raises(ValueError, match="unit: share is not allowed for 'grpo'"):
        joint(GRPO(unit="share"))
    assert refl(common(2), matching=0.0).stages[0].terms[1].unit == "raw"
    assert rl_after().stages[1].terms[0].unit == "raw", "reinforcement learning alone keeps its published unit"


@dataclass(frozen=True, kw_only=True)
class Silent(Objective):
    name: str = "silent"

    def __call__(self, view):
        return iter(())


def test_a_term_without_a_gradient_is_left_out():
    stage = joint(DistributionMatching(), Silent(unit="share"))
    log, state = gradients_of(stage, [], measure=True)
    assert "term/dm/gradient" in log and not any("silent" in key for key in log) and not state.ratios


EXECUTIONS = {
    "full copies": (None, Execution()),
    "lora": (4, Execution()),
    "bfloat16": (None, Execution(dtype="bfloat16")),
    "micro-batches": (4, Execution(micro_batch=2)),
    "checkpointing": (None, Execution(checkpointing="on")),
    "offload": (None, Execution(offload=True)),
}


@pytest.mark.parametrize("name", slow_but(["offload"], EXECUTIONS))
def test_every_execution_measures_and_changes_nothing(name, tmp_path):
    """Two micro-batches, two inner epochs, a force and a policy: the same weights with and without measurements, and norms of both terms."""
    rank, execution = EXECUTIONS[name]
    recipe = dmdr(
        Common(batch=4, steps=2, critic_updates=1, accumulate=2, lora_rank=rank), warm=0, iterations=2, group=2, rl="grpo", weight_unit="raw", inner_epochs=2
    )
    for every in (0, 1):
        options = RunOptions(save_every=1, probe_every=50, terms_every=every, execution=execution)
        train(recipe, family(), out=tmp_path / str(every), prompts=PROMPTS, reward=brightness, options=options)
    one, other = (weights(tmp_path / str(every)) for every in (0, 1))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not any(key.startswith("term/") for row in rows(tmp_path / "0") for key in row)
    for row in rows(tmp_path / "1")[1:]:
        assert row["term/dm/gradient"] > 0 and row["term/grpo/gradient"] > 0
        assert row["term/grpo/gradient"] == pytest.approx(0.5 * row["term/grpo/gradient_unweighted"], rel=1e-5)


def test_two_experts_have_one_norm(tmp_path):
    """The norm is that of all trained experts' gradients; a share is measured whichever of them a micro-batch trains."""
    recipe = refl(Common(batch=2, steps=4, critic_updates=1, shift=5.0), iterations=4)
    train(recipe, two_experts(), out=tmp_path / "run", prompts=PROMPTS, reward=Brightness(), options=RunOptions(save_every=4, probe_every=50, terms_every=1))
    seen = rows(tmp_path / "run")[1:]
    assert all(row["term/dm/gradient"] > 0 and row["term/reward/gradient_unweighted"] > 0 for row in seen)
    assert seen[0]["term/reward/weight"] == 0 and seen[-1]["term/reward/weight"] > 0
