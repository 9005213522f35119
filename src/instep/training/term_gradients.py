"""The gradient of each term alone, and the weights that give a term a share of matching's gradient.

Every term ends in one gradient of the student's parameters, whatever it acts on. Its norm there is the one size that terms of every kind have in common: at
weight 0.5 the norms of ReFL, GRPO and DPO differ by a factor of 3,500 on one student. A term of unit `share` therefore states its weight as a part of the norm
of matching's gradient, and the factor between the two is a running ratio of measured norms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from instep.core.ranks import ALONE, Ranks
from instep.core.shards import is_divided, local, total_norm
from instep.methods.recipe import Recipe, Stage
from instep.methods.term import Term
from instep.training.state import NormRatio, TrainedParams, TrainState

# iterations between two measurements of a stage whose terms have shares; before the first interval is over they are at 0, 1, 2 and 4
SHARE_EVERY = 5


class TermGradients:
    """Gradients of an iteration's terms, each alone and without its weight, as sums over the micro-batches.

    They are measured by a backward pass of their own: the student's gradient is put away before it and put back after it, bit for bit. A term's sum is one
    more float32 copy of the trained parameters; of several micro-batches the sums of all terms are alive together.
    """

    def __init__(self, trained: TrainedParams, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._masters = list(trained.masters.values())
        self._sums: dict[str, list[Tensor | None]] = {}
        self._norms: dict[str, Tensor] = {}

    def add(self, name: str, backward: Callable[[], None], *, last: bool) -> None:
        """Adds the gradient that `backward` leaves in the student's parameters to the sum of the term `name`; after the `last` one only its norm is kept."""
        kept = [p.grad for p in self._masters]
        for p in self._masters:
            p.grad = None
        backward()
        found = [p.grad for p in self._masters]
        for p, grad in zip(self._masters, kept, strict=True):
            p.grad = grad
        before = self._sums.get(name)
        self._sums[name] = found if before is None else [a if b is None else b if a is None else a + b for a, b in zip(before, found, strict=True)]
        if last:
            self._close(name)

    def norms(self) -> dict[str, Tensor]:
        """The norm of each term's gradient, scalar tensors; a term without a gradient in this iteration is left out."""
        for name in list(self._sums):
            self._close(name)
        return self._norms

    def _close(self, name: str) -> None:
        sums = self._sums.pop(name)
        there = self._ranks.any_of(torch.tensor([g is not None for g in sums])).tolist()
        found = [torch.zeros_like(p) if g is None else g for g, p, has in zip(sums, self._masters, there, strict=True) if has]
        if found:
            self._ranks.average([local(g) for g in found if not is_divided(g)])
            self._norms[name] = total_norm(found, self._ranks)


def weights_now(state: TrainState, stage: Stage) -> dict[str, float]:
    """The weight of every term of a stage in this iteration, by name.

    Raw weights as they are given; shares by the ratios measured so far, 0 before the first; those of rewards times the run's multiplier.
    """
    return {term.name: _weight(state, stage, term) for term in stage.terms}


def _weight(state: TrainState, stage: Stage, term: Term) -> float:
    weight = term.weight
    if term.unit == "share":
        ratio = state.ratios.get(_key(stage, term))
        weight = 0.0 if ratio is None else weight * ratio.value
    return weight * state.multiplier if state.multiplier != 1 and term in stage.rewarded else weight


def due(stage: Stage, progress: float) -> bool:
    """Whether the ratios of a stage's shares are measured in this iteration."""
    if all(term.unit == "raw" for term in stage.terms):
        return False
    n = round(progress * stage.steps)
    return n % SHARE_EVERY == 0 or (n < SHARE_EVERY and n & (n - 1) == 0)


def measured_share(recipe: Recipe, stage: Stage, every: int) -> float:
    """The part of a stage's iterations, in [0, 1], in which the gradients of its terms are measured; `every`: see `RunOptions.terms_every`."""
    first = sum(one.steps for one in recipe.stages[: recipe.stages.index(stage)])
    return sum(due(stage, n / stage.steps) or at_interval(first + n, every) for n in range(stage.steps)) / max(stage.steps, 1)


def at_interval(step: int, every: int) -> bool:
    """Whether iteration `step` (from 0) is the last of an interval of `every` (0: of none)."""
    return every > 0 and (step + 1) % every == 0


def observe(state: TrainState, stage: Stage, norms: Mapping[str, float]) -> None:
    """Moves the ratios of a stage's shares by measured norms without weights. Terms without a gradient, and norms that are not finite, change nothing."""
    matching = stage.matching
    if matching is None or matching.name not in norms:
        return
    for term in stage.terms:
        if term.unit == "share" and term.name in norms:
            key = _key(stage, term)
            state.ratios[key] = state.ratios.get(key, NormRatio()).moved(matching.weight * norms[matching.name], norms[term.name])


def _key(stage: Stage, term: Term) -> str:
    return f"{stage.name}/{term.name}"
