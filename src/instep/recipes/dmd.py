"""Distribution matching with an external force: DMD (Yin et al. 2024a) and DMD2 (Yin et al. 2024b); AMD Table 1, first two columns."""

from __future__ import annotations

from instep.methods.adversarial import Adversarial
from instep.methods.recipe import Recipe
from instep.methods.regression import Regression
from instep.recipes.common import Common


def dmd(common: Common = Common(), *, distil: int = 0, iterations: int = 100, regression: float = 0.25) -> Recipe:
    """Distil only: match the teacher's distribution, with a regression on stored outputs of the teacher (DMD).

    Args:
        common: options of every recipe.
        distil: student updates of matching alone before; 0 leaves the stage out.
        iterations: student updates.
        regression: weight of the regression on stored pairs of noise and the teacher's output (DMD, ImageNet: 0.25).
    """
    stage = common.stage("regress", iterations, (common.matching(), Regression(weight=regression)), (common.critic(),))
    return common.recipe("dmd", common.distil(distil), stage)


def dmd2(common: Common = Common(), *, distil: int = 0, iterations: int = 100, gan: float = 0.0) -> Recipe:
    """Distil only: match the teacher's distribution in a few steps, with or without a discriminator (DMD2).

    Args:
        common: options of every recipe.
        distil: student updates without the discriminator before; 0 leaves the stage out.
        iterations: student updates.
        gan: weight of the adversarial force and of the discriminator's loss (DMD2: 5e-3 to 1e-2); 0 leaves both out, and needs no real
            samples.
    """
    adversarial = (Adversarial(weight=gan, levels=common.renoise),) if gan else ()
    stage = common.stage("match", iterations, (common.matching(), *adversarial), (common.critic(gan=gan),))
    return common.recipe("dmd2", common.distil(distil), stage, head=bool(gan))
