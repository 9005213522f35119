"""AMD: matching that adapts to how good a sample is (Bai et al., Algorithm 1; its Table 1, last column), and its baseline."""

from __future__ import annotations

from dataclasses import replace

from instep.diffusion.rollout import Where
from instep.methods.operators import Adaptive, NaiveAdaptive, Operator
from instep.methods.recipe import Advantage, Recipe
from instep.recipes.common import Common

# Eq. 12: each group's own deviation, clipped
CLIPPED = Advantage(spread="group", clip=1.0)


def _adaptive(name: str, common: Common, operator: Operator, distil: int, iterations: int, group: int, tilt: float) -> Recipe:
    second = common.stage("adapt", iterations, (common.matching(operator=operator),), (common.critic(tilt=tilt),), group=group, advantage=CLIPPED)
    return common.recipe(name, common.distil(distil), second)


def amd(
    common: Common = Common(),
    *,
    distil: int = 0,
    iterations: int = 100,
    group: int = 8,
    sensitivity: float = 0.5,
    tilt: float = 1.0,
    reward_on: Where = "final",
) -> Recipe:
    """Distil and align with a reward, without its gradient: adaptive matching and a fake that focuses on failures (AMD).

    Args:
        common: options of every recipe.
        distil: student updates of plain matching before (the two-stage protocol of the paper's SiT runs); 0 leaves the stage out.
        iterations: student updates of adaptive matching.
        group: samples a prompt (K), compared with each other.
        sensitivity: s of Eq. 13, how far an advantage shifts weight between matching and guidance; 0 leaves score adaptation out.
        tilt: the fake's loss is weighed by exp(-tilt advantage) (Eq. 14: 1); 0 leaves landscape sharpening out.
        reward_on: the sample that is scored: final, at the end of the student's steps; or exit, the supervised step's own estimate (Algorithm 1), which costs
            (Q + 1) / 2 passes of Q steps a sample in place of Q. At 1 step they are the same.
    """
    recipe = _adaptive("amd", common, Adaptive(sensitivity), distil, iterations, group, tilt)
    return replace(recipe, stages=(*recipe.stages[:-1], replace(recipe.stages[-1], reward_on=reward_on)))


def naive_adaptive(common: Common = Common(), *, distil: int = 0, iterations: int = 100, group: int = 8, sensitivity: float = 0.5, tilt: float = 0.0) -> Recipe:
    """Baseline for AMD: separate weights for the real and the fake displacement (Eq. 8). It leaves the manifold; for comparison only.

    Args:
        common: options of every recipe.
        distil: student updates of plain matching before.
        iterations: student updates of naive adaptation.
        group: samples a prompt (K), compared with each other.
        sensitivity: s of Eq. 13.
        tilt: the fake's loss is weighed by exp(-tilt advantage); 0 leaves the weight out.
    """
    return _adaptive("naive-adaptive", common, NaiveAdaptive(sensitivity), distil, iterations, group, tilt)
