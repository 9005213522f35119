"""H of AMD's Eq. 6: combines the real and the fake displacement into a direction. Each row of its Table 1 is one class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from instep.core.ranks import ALONE, Ranks
from instep.diffusion.path import broadcast


@dataclass(frozen=True)
class Displacements:
    """d = x - x0_hat and the parts of Eq. 9, each [B, ...].

    `real` with guidance and `fake` without; `dm` = d_cond - d_fake (without guidance) and `ca` = (w - 1)(d_cond - d_uncond), so that
    real - fake = dm + ca.
    """

    real: Tensor
    fake: Tensor
    dm: Tensor
    ca: Tensor


def relative(reward: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Rewards [B] over their root mean square on all ranks."""
    return reward / ranks.mean(reward.square().mean()).sqrt().clamp(min=1e-12)


@dataclass(frozen=True)
class Operator:
    """Base: (displacements, advantage [B], reward [B]; None where not scored) -> direction [B, ...] that is descended.

    `formula` is its cell in AMD's Table 1. The reward is `relative`, and there for an operator that `reads_reward`.
    """

    formula: ClassVar[str]
    needs_advantage: ClassVar[bool] = False

    @property
    def reads_reward(self) -> bool:
        return False

    def __call__(self, d: Displacements, advantage: Tensor | None, reward: Tensor | None = None) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Standard(Operator):
    """d_real - d_fake = x0_fake - x0_real (DMD, DMD2; AMD Eq. 7)."""

    formula: ClassVar[str] = "d_real - d_fake"

    def __call__(self, d: Displacements, advantage: Tensor | None, reward: Tensor | None = None) -> Tensor:
        return d.real - d.fake


@dataclass(frozen=True)
class Decoupled(Operator):
    """d_dm + d_ca: Standard at a shared level; with levels of its own for CA, Decoupled-DMD (AMD Eq. 9)."""

    formula: ClassVar[str] = "d_ca + d_dm"

    def __call__(self, d: Displacements, advantage: Tensor | None, reward: Tensor | None = None) -> Tensor:
        return d.dm + d.ca


@dataclass(frozen=True)
class MatchingOnly(Operator):
    """d_dm alone, without the guidance term: it keeps a student near the teacher's distribution while a policy gradient moves it (DMDR's authors)."""

    formula: ClassVar[str] = "d_dm"

    def __call__(self, d: Displacements, advantage: Tensor | None, reward: Tensor | None = None) -> Tensor:
        return d.dm


@dataclass(frozen=True)
class AdvantageGuided(Operator):
    """d_dm + advantage d_ca: only samples better than their group follow the guidance, worse ones go against it (DMDR's authors' second variant).

    Without guidance (w = 1) the advantage has no effect.
    """

    formula: ClassVar[str] = "d_dm + a d_ca"
    needs_advantage: ClassVar[bool] = True

    def __call__(self, d: Displacements, advantage: Tensor | None, reward: Tensor | None = None) -> Tensor:
        assert advantage is not None, "advantage-weighted guidance needs an advantage; its stage must score rewards"
        return d.dm + broadcast(advantage, d.ca) * d.ca


@dataclass(frozen=True)
class _Steered(Operator):
    needs_advantage: ClassVar[bool] = True

    sensitivity: float = 0.5
    """s of Eq. 13: how far an advantage of one moves the two weights from 1."""

    def __post_init__(self) -> None:
        if self.sensitivity < 0:
            raise ValueError(f"sensitivity: {self.sensitivity} is not allowed; 0 (no adaptation) or more, the weights are 1 +- s times the advantage")

    def weights(self, advantage: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha = 1 + s a and beta = 1 - s a (Eq. 13), shaped to multiply `like`."""
        assert advantage is not None, f"{type(self).__name__} weighs by the advantage; its stage must score rewards"
        adaptation = self.sensitivity * broadcast(advantage, like)
        return 1 + adaptation, 1 - adaptation


@dataclass(frozen=True)
class Adaptive(_Steered):
    """beta d_dm + alpha d_ca (AMD Eq. 10): low samples are matched to the distribution, high ones follow the condition."""

    formula: ClassVar[str] = "alpha d_ca + beta d_dm"

    def __call__(self, d: Displacements, advantage: Tensor | None, reward: Tensor | None = None) -> Tensor:
        alpha, beta = self.weights(advantage, d.dm)
        return beta * d.dm + alpha * d.ca


@dataclass(frozen=True)
class NaiveAdaptive(_Steered):
    """alpha d_real - beta d_fake (AMD Eq. 8), the baseline that leaves the manifold.

    With alpha != beta a multiple of x - x0_hat remains, which at high noise is large and points away from the mean, or toward it.
    """

    formula: ClassVar[str] = "alpha d_real - beta d_fake"

    def __call__(self, d: Displacements, advantage: Tensor | None, reward: Tensor | None = None) -> Tensor:
        alpha, beta = self.weights(advantage, d.real)
        return alpha * d.real - beta * d.fake


@dataclass(frozen=True)
class RewardTilted(Operator):
    """(d_real - d_fake) times a factor of the sample's reward (DMDR Eq. 4, RT-DM).

    `zscore`: exp(advantage). `literal`: exp(r / rms(r)) over the batch. The paper prints the norm in place of the root mean square, which grows with the
    number of rows and would make the factor depend on the micro-batch; where rewards differ little beside their size the literal factor is nearly one for all
    samples, whatever the norm. A factor on the force does not move its zero: with exact teachers neither form tilts the fixed point (docs/errata.md); a
    critic's `tilt` does.
    """

    formula: ClassVar[str] = "exp(r/norm) (d_real - d_fake)"
    needs_advantage: ClassVar[bool] = True

    form: Literal["literal", "zscore"] = "zscore"

    @property
    def reads_reward(self) -> bool:
        return self.form == "literal"

    def __call__(self, d: Displacements, advantage: Tensor | None, reward: Tensor | None = None) -> Tensor:
        exponent = reward if self.form == "literal" else advantage
        assert exponent is not None, "reward-tilted matching weighs by the reward; its stage must score"
        return broadcast(exponent.exp(), d.real) * (d.real - d.fake)
