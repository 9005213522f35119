"""DM-Align: distillation and alignment as two forces of one loop (paper Eq. 8, Algorithm 1)."""

from __future__ import annotations

from typing import Literal

from instep.diffusion.levels import Uniform
from instep.methods.align import AlignGroup, AlignPair, Sign
from instep.methods.recipe import Advantage, Recipe, RolloutConfig
from instep.methods.term import Force
from instep.recipes.common import Common

# Near t = 0 the estimates equal the samples, and their difference is divided by almost zero: distant samples of one prompt
# are blended, and images fade. Signed advantages cancel what the samples of a group share, so Group can use lower levels than Pair.
GROUP_LEVELS = Uniform(low=0.3, high=0.98)
PAIR_LEVELS = Uniform(low=0.8, high=0.98)

Through = Literal["last", "trajectory"]


def _joint(name: str, common: Common, align: Force, *, group: int, distil: int, iterations: int, spread: Literal["group", "run"], through: Through) -> Recipe:
    """A distillation-only stage, then matching and alignment together with weights that sum to one."""
    terms = (common.matching(1 - align.weight), align)
    rollout = RolloutConfig(common.levels, through)
    second = common.stage("align", iterations, terms, (common.critic(),), group=group, advantage=Advantage(spread), rollout=rollout)
    return common.recipe(name, common.distil(distil), second)


def dm_align_group(
    common: Common = Common(),
    *,
    distil: int = 80,
    iterations: int = 40,
    group: int = 8,
    top_n: int = 2,
    sign: Sign = "signed",
    spread: Literal["group", "run"] = "run",
    weight: float = 0.3,
    levels: Uniform = GROUP_LEVELS,
    through: Through = "last",
) -> Recipe:
    """Distil and align with a reward: DM-Align (Group), from prompts alone.

    Args:
        common: options of every recipe.
        distil: student updates of distribution matching alone, before the reward joins.
        iterations: student updates of matching and alignment together.
        group: samples a prompt, compared with each other.
        top_n: number of a group's best samples in the preferred mean.
        sign: signed (the paper's text: high samples move away from the mean), pull (only low ones move), printed (Eq. 7 to the letter).
        spread: divisor of the advantages: each group's own standard deviation of rewards, or that of the whole run, so that groups of
            equally good samples add little noise.
        weight: weight of the alignment force; matching gets the rest (paper: 0.5).
        levels: noise levels of the alignment force; at low ones it would blend samples that show different things.
        through: how far the alignment force reaches back: the last step, or the whole trajectory (more memory).
    """
    align = AlignGroup(weight=weight, top_n=top_n, sign=sign, levels=levels)
    return _joint("dm-align-group", common, align, group=group, distil=distil, iterations=iterations, spread=spread, through=through)


def dm_align_pair(
    common: Common = Common(),
    *,
    distil: int = 80,
    iterations: int = 40,
    weight: float = 0.1,
    levels: Uniform = PAIR_LEVELS,
    through: Through = "last",
) -> Recipe:
    """Distil and align with preferred real samples: DM-Align (Pair).

    Args:
        common: options of every recipe.
        distil: student updates of distribution matching alone, before the preferred samples join.
        iterations: student updates of matching and alignment together.
        weight: weight of the alignment force; matching gets the rest (paper: 0.5).
        levels: noise levels of the alignment force; at low ones it would blend samples that show different things.
        through: how far the alignment force reaches back: the last step, or the whole trajectory (more memory).
    """
    align = AlignPair(weight=weight, levels=levels)
    return _joint("dm-align-pair", common, align, group=1, distil=distil, iterations=iterations, spread="group", through=through)
