"""Each recipe, seeded, in the exact laboratory: its own stages through `iteration`, with the exact teacher; behaviour, not only that it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from instep.diffusion.levels import Uniform
from instep.diffusion.path import RectifiedFlow
from instep.diffusion.sampling import sample_few_step
from instep.lab.mixture import ExactTeacher, Mixture, labels
from instep.lab.networks import VelocityMLP
from instep.methods.recipe import Recipe
from instep.methods.role_config import AdamWConfig
from instep.methods.term import Batch
from instep.recipes.common import Common
from instep.recipes.dm_align import dm_align_group, dm_align_pair
from instep.recipes.dmd import dmd2
from instep.training.state import TrainedParams, TrainState
from instep.training.step import iteration

PATH, RING = RectifiedFlow(), Mixture.ring()
STUDENT, FAKE = AdamWConfig(1e-3, betas=(0.5, 0.99), clip=5.0, decay=0.6), AdamWConfig(2e-3, betas=(0.5, 0.99), clip=5.0, decay=0.6)
COMMON = Common(batch=256, guidance=1.0, shift=1.0, student=STUDENT, fake=FAKE, ema=None)


def new_state(reward_fn: Callable | None = None, weights: Mapping[str, Any] | None = None, seed: int = 0) -> TrainState:
    """A student that begins from a teacher, and its fake; or both with weights of an earlier state."""
    torch.manual_seed(seed)
    networks = {"student": VelocityMLP(PATH), "fake": VelocityMLP(PATH, exits=4)}
    if weights is None:
        pretrain(networks["student"])
    for name in weights or {}:
        networks[name].load_state_dict(weights[name])
    trained = {name: TrainedParams(dict(network.named_parameters()), {"student": STUDENT, "fake": FAKE}[name]) for name, network in networks.items()}
    roles = {**networks, "teacher": ExactTeacher(RING, PATH)}
    return TrainState(roles, trained, PATH, (2,), torch.Generator().manual_seed(seed), reward_fn)


def pretrain(net: VelocityMLP, steps: int = 400) -> None:
    """A few hundred steps of flow matching: students start from a teacher, not from noise."""
    rng, optimizer = torch.Generator().manual_seed(9), torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(steps):
        cond = labels([str(int(c)) for c in torch.randint(0, 2, (256,), generator=rng)])
        x0, t = RING.sample(cond.label, rng), torch.rand(256, generator=rng)
        eps = torch.randn(256, 2, generator=rng)
        loss = (net(PATH.renoise(x0, eps, t), t, cond).v - (eps - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def batches(state: TrainState, n: int, preferred: Callable | None) -> list[Batch]:
    names = tuple(str(int(c)) for c in torch.randint(0, 2, (n,), generator=state.rng))
    cond = labels(names)
    several = torch.stack([preferred(cond.label, state.rng) for _ in range(4)], 1) if preferred else None
    return [Batch(names, cond, labels([""] * n), preferred=several)]


def trained(recipe: Recipe, state: TrainState, preferred: Callable | None = None) -> TrainState:
    for step in range(recipe.steps):
        stage, progress = recipe.at(step)
        iteration(state, stage, batches(state, stage.batch // stage.group, preferred), progress)
    return state


@pytest.fixture(scope="module")
def distilled() -> dict[str, Any]:
    """The weights after 300 iterations of DMD2, from which students go on."""
    state = trained(dmd2(COMMON, iterations=300), new_state())
    return {name: state.roles[name].state_dict() for name in ("student", "fake")}


def run(distilled: Mapping[str, Any], recipe: Recipe, reward_fn: Callable | None = None, preferred: Callable | None = None) -> Tensor:
    """Trains the recipe from the distilled student and returns 2,000 samples of it."""
    state = trained(recipe, new_state(reward_fn, distilled), preferred)
    rng = torch.Generator().manual_seed(123)
    names = [str(i % 2) for i in range(2000)]
    return sample_few_step(state.roles["student"], labels(names), torch.randn(2000, 2, generator=rng), recipe.levels, PATH, rng)


def quality(x: Tensor) -> float:
    return float((torch.cdist(x, RING.means).amin(1) < 3 * RING.sigma).float().mean())


def right_share(x: Tensor) -> float:
    return float((x[:, 0] > 0).float().mean())


def total_variation(x: Tensor) -> float:
    share = torch.bincount(torch.cdist(x, RING.means).argmin(1), minlength=8) / len(x)
    return float(0.5 * (share - 1 / 8).abs().sum())


def rightness(x: Tensor, prompts) -> Tensor:
    return x[:, 0].clamp(-2, 2)


def preferred_right(label: Tensor, rng: torch.Generator) -> Tensor:
    """Real samples of the right-hand modes of each class."""
    x = RING.sample(label, rng)
    return torch.cat([x[:, :1].abs(), x[:, 1:]], 1)


@pytest.fixture(scope="module")
def control(distilled) -> Tensor:
    return run(distilled, dmd2(COMMON, iterations=150))


def test_dmd2_matches_the_mixture(control):
    assert quality(control) > 0.5
    assert total_variation(control) < 0.15
    assert abs(right_share(control) - 0.5) < 0.1, "without a reward neither side is preferred"


# the paper's letter at a tenth of its weight: divided by the distance to its own estimate, the force is strong in two dimensions
LETTER = {"reach": "last", "toward": "mean", "normaliser": "own", "spread": "group", "group": 8, "top_n": 2, "weight": 0.05, "matching": 0.95}


@pytest.mark.slow
@pytest.mark.parametrize("sign", ["signed", "pull"])
def test_group_takes_the_student_to_the_rewarded_side(control, distilled, sign):
    """A weight of .05 moves every sample, and leaves most of the quality."""
    aligned = run(distilled, dm_align_group(COMMON, distil=0, iterations=150, sign=sign, **LETTER), rightness)
    assert right_share(aligned) > 0.9
    assert quality(aligned) > quality(control) - 0.35


def test_the_default_reading_aligns_and_keeps_the_quality(control, distilled):
    """Toward the nearest preferred sample, at the exit, in units of the distance to it; with half of the weight, where seeds differ far less than it gains."""
    aligned = run(distilled, dm_align_group(COMMON, distil=0, iterations=150, weight=0.5, matching=0.5), rightness)
    assert right_share(aligned) > right_share(control) + 0.06
    assert quality(aligned) > quality(control) - 0.15


@pytest.mark.slow
def test_printed_sign_takes_it_to_the_other_side(distilled):
    """Eq. 7 to the letter moves low samples away from the preferred mean: the reward falls. (A hundred iterations later samples are driven off the plane.)"""
    assert right_share(run(distilled, dm_align_group(COMMON, distil=0, iterations=60, sign="printed", **LETTER), rightness)) < 0.48


@pytest.mark.parametrize(("within", "more"), [(None, 0.1), (1.0, 0.07)])
def test_pair_moves_toward_the_preferred_side(control, distilled, within, more):
    """By default the nearer part of a batch moves, and fewer samples change sides than where all move."""
    aligned = run(distilled, dm_align_pair(COMMON, distil=0, iterations=150, within=within), preferred=preferred_right)
    assert right_share(aligned) > right_share(control) + more
    assert quality(aligned) > quality(control) - 0.25


@pytest.mark.slow
def test_high_levels_alone_hardly_align(control, distilled):
    """High levels keep images from fading; on modes this far apart they also take nearly all of the alignment away."""
    aligned = run(
        distilled,
        dm_align_group(COMMON, distil=0, iterations=150, **{**LETTER, "weight": 0.5, "matching": 0.5, "sign": "signed", "levels": Uniform(low=0.8, high=0.98)}),
        rightness,
    )
    assert abs(right_share(aligned) - right_share(control)) < 0.15
    assert quality(aligned) > quality(control) - 0.15
