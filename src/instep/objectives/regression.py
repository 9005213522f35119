"""Regression on stored outputs of the teacher (DMD Section 4.2; AMD Eq. 26)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from instep.terms import Need, Objective, View


@dataclass(frozen=True, kw_only=True)
class Regression(Objective):
    """0.5 mean (G(z) - x_gt)^2 over stored pairs of noise z and what the teacher made of it; its force on G(z) is (x - x_gt) / numel.

    On a batch of its own, as in DMD's Algorithm 1: the pairs are few, and the noise of the rollout stays fresh. It is the student's first step
    that is held to the pair: later ones start from noise that the teacher never saw. DMD compares with LPIPS; here it is latents.
    """

    name: str = "regression"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"stored"})

    def passes(self, group: int) -> tuple[float, float]:
        return 0.0, 1.0

    def __call__(self, view: View) -> Iterator[Tensor]:
        stored = view.batch.stored
        assert stored is not None, "regression needs stored pairs of noise and the teacher's output in the batch"
        start = stored.noise.new_ones(len(stored.noise))
        x = view.roles["student"](stored.noise, start, stored.cond).x0
        yield 0.5 * (x - stored.x0).square().mean()
