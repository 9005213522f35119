"""Regression on samples: on stored outputs of the teacher (DMD Section 4.2; AMD Eq. 26), and on real ones (fine-tuning)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from instep.diffusion.levels import LevelSampler, Uniform
from instep.methods.critics import denoising_error
from instep.methods.term import Need, Objective, View


@dataclass(frozen=True, kw_only=True)
class Regression(Objective):
    """0.5 mean (G(z) - x_gt)^2 over stored pairs of noise z and the teacher's output for it; its force on G(z) is (x - x_gt) / numel.

    It has its own batch, as in DMD's Algorithm 1: the pairs are few, and the noise of the rollout stays fresh. Only the student's first step is
    regressed on the pair: later ones start from noise that the teacher never had. DMD compares with LPIPS; this compares latents.
    """

    name: str = "regression"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"stored"})

    def __call__(self, view: View) -> Iterator[Tensor]:
        stored = view.batch.stored
        assert stored is not None, "regression needs stored pairs of noise and the teacher's output in the batch"
        start = torch.ones(len(stored.noise), dtype=stored.noise.dtype)
        x = view.roles["student"](stored.noise, start, stored.cond).x0
        yield 0.5 * (x - stored.x0).square().mean()


@dataclass(frozen=True, kw_only=True)
class Denoising(Objective):
    """mean of the squared velocity error on real samples noised to `levels`: supervised fine-tuning, with the loss of pretraining.

    On a few-step student's own levels it teaches the mean of all clean samples behind a noisy one, which is a blur (DM-Align, Appendix C.1).
    """

    name: str = "sft"
    levels: LevelSampler = field(default_factory=Uniform)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"real"})

    def __call__(self, view: View) -> Iterator[Tensor]:
        real = view.batch.real
        assert real is not None, "fine-tuning needs real samples in the batch"
        t = view.levels(self.levels, len(real)).to(real.dtype)
        yield denoising_error(view.roles["student"], view, real, t, view.randn_like(real), view.batch.cond, "velocity").mean()
