"""DM-Align: distillation and alignment as two forces of one loop (paper Eq. 8, Algorithm 1)."""

from __future__ import annotations

from typing import Literal, get_args

from instep.diffusion.levels import Uniform
from instep.diffusion.rollout import Where
from instep.methods.align import Align, AlignGroup, AlignPair, Estimator, Normaliser, Sign, Toward, best_of
from instep.methods.recipe import Advantage, Recipe, RolloutConfig, Spread
from instep.recipes.common import Common

# where the force acts, and how far its graph reaches back
Reach = Literal["exit", "last", "trajectory"]


def _point(reach: Reach) -> Where:
    if reach not in get_args(Reach):
        raise ValueError(f"reach: {reach!r} is not known; allowed: {', '.join(get_args(Reach))}")
    return "exit" if reach == "exit" else "final"


def _joint(
    name: str,
    common: Common,
    align: Align,
    *,
    matching: float,
    group: int,
    distil: int,
    iterations: int,
    reach: Reach,
    spread: Spread,
    shared_noise: float = 0.0,
) -> Recipe:
    """A distillation-only stage, then matching and alignment together."""
    terms = (common.matching(matching), align)
    rollout = RolloutConfig(common.levels, common.steps if reach == "trajectory" else 1, shared_noise=shared_noise)
    second = common.stage("align", iterations, terms, (common.critic(),), group=group, advantage=Advantage(spread), rollout=rollout)
    return common.recipe(name, common.distil(distil), second)


def dm_align_group(
    common: Common = Common(),
    *,
    distil: int = 80,
    iterations: int = 40,
    group: int = 4,
    top_n: int | None = None,
    toward: Toward = "nearest",
    sign: Sign = "pull",
    spread: Spread = "run",
    weight: float = 0.3,
    matching: float = 0.7,
    reach: Reach = "exit",
    normaliser: Normaliser = "target",
    estimate_by: Estimator = "fake",
    shared_noise: float = 0.0,
    levels: Uniform = Uniform(),
) -> Recipe:
    """Distil and align with a reward: DM-Align (Group), from prompts alone.

    The paper's letter: --distil 0 --reach last --toward mean --normaliser own --sign signed --spread group --weight 0.5 --matching 0.5.

    Args:
        common: options of every recipe.
        distil: student updates of distribution matching alone, before the reward joins; 0 joins it at once (the paper).
        iterations: student updates of matching and alignment together.
        group: samples a prompt, compared with each other. Keep many prompts in a batch: with few of them, matching alone loses modes.
        top_n: number of a group's best samples that are preferred; default: half of the group.
        toward: which preferred sample a sample is moved to. nearest: the one most like it, which keeps what it shows apart from what is wrong;
            mean: the average of them (the paper), paler than any; kernel: their mean weighted by how likely each is to be the sample's own noised
            point, without a network (collapsed on moving-words, docs/moving_words.md).
        sign: pull (only samples below their group's mean move), signed (the paper's text: those above it move away as well), printed (Eq. 7 to the letter,
            which lowers the reward).
        spread: divisor of the advantages: each group's own standard deviation of rewards (the usual one); that of the whole run, so that groups of
            equally good samples add little noise; or none: advantages in the reward's own unit.
        weight: weight of the alignment force (Eq. 8's lambda_align; paper: 0.5).
        matching: weight of the matching force beside it (Eq. 8's lambda_DMD; paper: 0.5).
        reach: which steps of the student the alignment reaches. exit: the supervised step, a random one, with the final sample's reward; last: the step
            that makes the final sample (the paper's x_final), too late to change what is drawn; trajectory: all steps, from the final sample (more memory).
        normaliser: unit of the force. target: distance to the preferred estimate, as matching divides by the distance to the teacher's; own: distance
            to the sample's own estimate, which explodes at low levels.
        estimate_by: whose estimates are compared: fake (the paper), or a variant of its Appendix C.2: teacher, student, or samples (no noise, no network).
        shared_noise: correlation of the initial noise within a group, 0 to 1. Samples that begin alike show the same thing, better or worse: rewards then
            choose less between what a prompt leaves open; more modes are kept, and less is gained. 1: one noise a group (DanceGRPO), from 2 steps on.
        levels: noise levels of the alignment force.
    """
    n, most = best_of(top_n, group), group - (toward == "nearest")
    if not 1 <= n <= most and group > 1:
        raise ValueError(f"top_n: {top_n} is not allowed; between 1 and {most} of a group of {group}" + _all_preferred(toward))
    align = AlignGroup(on=_point(reach), weight=weight, top_n=top_n, toward=toward, sign=sign, normaliser=normaliser, estimate_by=estimate_by, levels=levels)
    return _joint(
        "dm-align-group",
        common,
        align,
        matching=matching,
        group=group,
        distil=distil,
        iterations=iterations,
        reach=reach,
        spread=spread,
        shared_noise=shared_noise,
    )


def _all_preferred(toward: Toward) -> str:
    return " (were all preferred, each would be nearest to itself and feel no force)" if toward == "nearest" else ""


def dm_align_pair(
    common: Common = Common(),
    *,
    distil: int = 80,
    iterations: int = 40,
    candidates: int = 4,
    within: float | None = 1.0,
    toward: Toward = "nearest",
    weight: float = 0.5,
    matching: float = 0.5,
    reach: Reach = "exit",
    normaliser: Normaliser = "target",
    estimate_by: Estimator = "fake",
    levels: Uniform = Uniform(),
) -> Recipe:
    """Distil and align with preferred real samples: DM-Align (Pair). Preferred samples alone are enough; it reads no rejected ones.

    The paper's letter: --distil 0 --reach last --candidates 1 --within None --normaliser own.

    Args:
        common: options of every recipe.
        distil: student updates of distribution matching alone, before the preferred samples join; 0 joins them at once (the paper).
        iterations: student updates of matching and alignment together.
        candidates: most preferred samples of a prompt to choose from (the paper: 1). Where a prompt has fewer, they are all.
        within: which samples of a batch move: those whose nearest preferred sample is near, its squared distance (of latents) at most this factor of the
            batch's mean. The others are left to matching: they would be drawn halfway to another motion or viewpoint. None: all move (the paper).
        toward: which preferred sample a sample is moved to. nearest: the one most like it; mean: the average of them, paler than any; kernel: their mean
            weighted by how likely each is to be the sample's own noised point, without a network.
        weight: weight of the alignment force (Eq. 8's lambda_align; paper: 0.5).
        matching: weight of the matching force beside it (Eq. 8's lambda_DMD; paper: 0.5).
        reach: which steps of the student the alignment reaches. exit: the supervised step, a random one; last: the step that makes the final sample (the
            paper's x_final), too late to change what is drawn; trajectory: all steps, from the final sample (more memory).
        normaliser: unit of the force. target: distance to the preferred estimate, as matching divides by the distance to the teacher's; own: distance
            to the sample's own estimate, which explodes at low levels.
        estimate_by: whose estimates are compared: fake (the paper), or a variant of its Appendix C.2: teacher, student, or samples (no noise, no network).
        levels: noise levels of the alignment force.
    """
    align = AlignPair(
        on=_point(reach), weight=weight, candidates=candidates, within=within, toward=toward, normaliser=normaliser, estimate_by=estimate_by, levels=levels
    )
    return _joint("dm-align-pair", common, align, matching=matching, group=1, distil=distil, iterations=iterations, reach=reach, spread="group")
