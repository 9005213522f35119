"""AMD's Table 1, generated from the recipes: each row's use of the generalised operator of Eq. 6."""

from __future__ import annotations

from collections.abc import Sequence

from instep.diffusion.levels import AboveExit, AnnealedBeta, LevelSampler
from instep.methods.adversarial import Adversarial
from instep.methods.critics import FakeScoreGANLoss, FakeScoreLoss
from instep.methods.matching import DistributionMatching
from instep.methods.recipe import Recipe, Stage
from instep.methods.regression import Regression
from instep.methods.reward_gradient import RewardGradient
from instep.methods.term import Term
from instep.recipes.amd import amd, naive_adaptive
from instep.recipes.decoupled_dmd import decoupled_dmd
from instep.recipes.dmd import dmd, dmd2
from instep.recipes.dmdr import dmdr
from instep.recipes.magic import magic
from instep.recipes.refl import refl

HEADINGS = ("recipe", "operator H", "external force", "re-noise levels", "teacher", "fake")

# the command line of each row, and its recipe
FAMILY: dict[str, Recipe] = {
    "dmd": dmd(),
    "dmd2 --gan 0.01": dmd2(gan=0.01),
    "dmd2": dmd2(),
    "decoupled-dmd": decoupled_dmd(),
    "magic": magic(),
    "refl": refl(),
    "dmdr": dmdr(),
    "amd": amd(),
    "naive-adaptive": naive_adaptive(),
}

EXTERNAL = {Regression: "x - x_gt (stored pairs)", Adversarial: "-grad log D(x_t)", RewardGradient: "-grad R(x)"}


def rows(name: str, recipe: Recipe) -> list[tuple[str, ...]]:
    """A row for each stage that has steps, named where there are several."""
    stages = [stage for stage in recipe.stages if stage.steps]
    return [cells(name if len(stages) == 1 else f"{name}, stage {stage.name}", stage) for stage in stages]


def cells(name: str, stage: Stage) -> tuple[str, ...]:
    """Returns a stage's row: one cell for each of `HEADINGS`."""
    force = next(term for term in stage.terms if isinstance(term, DistributionMatching))
    others = [external(term) for term in stage.terms if term is not force]
    fake = next(critic for critic in stage.critics if isinstance(critic, FakeScoreLoss) and critic.role == "fake")
    levels = levels_cell(force.levels) if force.ca_levels is None else f"DM {levels_cell(force.levels)}, CA {levels_cell(force.ca_levels)}"
    teacher = "fixed" if force.adapter is None else "adapter, annealed to fixed"
    return name, force.operator.formula, ", ".join(others) or "0", levels, teacher, critic_cell(fake)


def external(term: Term) -> str:
    """Returns an external force's cell; a term outside Table 1 is shown by its name."""
    return EXTERNAL.get(type(term), term.name)


def levels_cell(levels: LevelSampler) -> str:
    """Returns the cell of the level distribution."""
    named = {AboveExit: "above the exit", AnnealedBeta: "annealed from high noise"}
    return named.get(type(levels), "all")


def critic_cell(critic: FakeScoreLoss) -> str:
    """Returns the cell of the fake's loss."""
    weight = "" if not critic.tilt else "exp(-a) x " if critic.tilt == 1 else f"exp(-{critic.tilt:g} a) x "
    return f"{weight}denoising" + (" + logistic" if isinstance(critic, FakeScoreGANLoss) else "")


def table() -> list[tuple[str, ...]]:
    """Headings and all rows."""
    return [HEADINGS, *(row for name, recipe in FAMILY.items() for row in rows(name, recipe))]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table, the first one its headings."""
    head, *body = rows
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| `{row[0]}` | {' | '.join(row[1:])} |" for row in body), ""])
