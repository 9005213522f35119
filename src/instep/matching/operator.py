"""H of AMD's Eq. 6: how the real and the fake displacement make a direction. One class a row of its Table 1."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Displacements:
    """d = x - x0_hat, each [B, ...]: `real` with guidance, `fake` without."""

    real: Tensor
    fake: Tensor


@dataclass(frozen=True)
class Operator:
    """Base: (displacements, advantage [B] or None) -> direction [B, ...] that is descended."""

    def __call__(self, d: Displacements, advantage: Tensor | None) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Standard(Operator):
    """d_real - d_fake = x0_fake - x0_real (DMD, DMD2; AMD Table 1, first rows)."""

    def __call__(self, d: Displacements, advantage: Tensor | None) -> Tensor:
        return d.real - d.fake
