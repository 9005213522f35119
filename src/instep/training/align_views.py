"""The alignment force beside matching's on the same samples at the same noise levels, decoded (DM-Align, Fig. 6)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from instep.core.ranks import ALONE
from instep.diffusion.levels import LevelSampler
from instep.diffusion.noise import Rng
from instep.methods.align import Align
from instep.methods.matching import DistributionMatching
from instep.methods.recipe import Recipe, Stage
from instep.methods.term import View
from instep.models.family import Family
from instep.training.batches import BatchSource
from instep.training.rollouts import roll_out, score_rollout
from instep.training.scalars import Scalars
from instep.training.state import TrainState
from instep.training.step import draw_band
from instep.training.views import decoded_views

# samples that are shown
MOST = 6


@dataclass(frozen=True)
class AlignViews:
    """Videos by name, uint8 [N, F, H, W, 3], and numbers by name [N]: the levels and, of a group, the advantages; with the prompt of each sample."""

    tensors: dict[str, Tensor]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class _Given(LevelSampler):
    """The levels of another force, so that both look at the same ones."""

    levels: Tensor

    def __call__(self, n: int, *, progress: float, t_exit: Tensor | None, rng: Rng) -> Tensor:
        return self.levels


def align_stage(recipe: Recipe, step: int) -> Stage | None:
    """The stage whose alignment force is shown at the run's step: the one that ends there, or the one that begins; None if neither has such a force."""
    at = {max(step - 1, 0), min(step, recipe.steps - 1)}
    return next((stage for stage in (recipe.at(i)[0] for i in sorted(at)) if _align(stage) is not None), None)


def _align(stage: Stage) -> Align | None:
    return next((term for term in stage.forces if isinstance(term, Align)), None)


@torch.no_grad()
def align_views(state: TrainState, stage: Stage, family: Family, source: BatchSource, seed: int) -> AlignViews | None:
    """Samples, what they are drawn to, and both forces and targets, before their weights: one group in the order of its rewards, or one sample a prompt.

    The first prompts of the batches are shown. It has a generator of its own and changes nothing. None for a stage without both forces.
    """
    align, matching = _align(stage), stage.matching
    if align is None or matching is None:
        return None
    apart = replace(state, rng=torch.Generator().manual_seed(seed), ranks=ALONE)
    batch = source.first(replace(stage, batch=stage.group if stage.group > 1 else MOST))
    seen = View(
        apart.roles,
        apart.path,
        batch,
        1.0,
        apart.rng,
        weights=apart.weights,
        band=draw_band(apart, stage),
        boundary=apart.boundary,
    )
    rollout = score_rollout(apart, stage, seen, roll_out(apart, stage, seen, with_graph=False, to_the_end=stage.to_the_end), Scalars())
    seen = seen.with_rollout(rollout)
    pulled = align.explain(seen)
    matched = _matching_at(matching, align, pulled.level).explain(seen)
    rows = _shown(seen.samples.reward, len(pulled.x)).to(pulled.x.device)
    latents = {"generator": pulled.x[rows], "preferred": pulled.preferred[rows], "align_target": pulled.target[rows], "target": matched.target[rows]}
    tensors = decoded_views(family, latents, {"align_force": "align_target", "force": "target"})
    tensors["levels"] = pulled.level[rows].cpu().float()
    if seen.samples.advantage is not None:
        tensors["advantages"] = seen.samples.advantage[rows].cpu().float()
    prompts = [prompt for prompt in batch.prompts for _ in range(stage.group)]
    return AlignViews(tensors, tuple(str(prompts[i]) for i in rows.tolist()))


def _matching_at(matching: DistributionMatching, align: Align, levels: Tensor) -> DistributionMatching:
    """The stage's matching force on the samples and at the levels of the alignment force."""
    return replace(matching, on=align.on, levels=_Given(levels.cpu()))


def _shown(reward: Tensor | None, n: int) -> Tensor:
    """Rows that are shown: all, or at most `MOST` of a group from the best to the worst."""
    order = torch.arange(n) if reward is None else reward.cpu().argsort(descending=True, stable=True)
    return order if n <= MOST else order[torch.linspace(0, n - 1, MOST).round().long()]
