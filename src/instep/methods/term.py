"""The parts of a recipe: forces on samples, objectives on parameters, critics, and the view that they all receive.

A force is dL/dx of a **batch-mean** loss, shaped like x, and is descended. An objective is a scalar with its own forward pass.
`training/step.py` weighs and adds them; it depends on nothing else of a method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from instep.core.ranks import ALONE, Ranks
from instep.data.prompt import Prompt
from instep.diffusion.bands import WHOLE, Band, draw_in_band
from instep.diffusion.guidance import GuidanceByLevel, by_level
from instep.diffusion.levels import LevelSampler
from instep.diffusion.noise import Rng, rand, randn
from instep.diffusion.path import Path
from instep.diffusion.prediction import Condition, Denoiser
from instep.diffusion.rollout import Rollout, Where
from instep.methods.latent_reward_model import LatentReward

# the inputs that a term or a critic may need from its stage: the reward of final samples, a reward with a gradient, real samples of the batch's
# prompts, real ones that people prefer, stored outputs of the teacher with the noise they came from, the trajectory of the rollout, the
# student at the beginning of the stage, the end of the student's rollout, labelled pairs of samples, the student's running average, the latent
# reward model, rewards of the samples it learns from
Need = Literal["reward", "gradient", "real", "preferred", "stored", "trajectory", "reference", "final", "pairs", "average", "latent_reward", "labels"]
NOTHING: frozenset[Need] = frozenset()
# what a weight is a factor of: the term as it is, or the norm of matching's gradient
WeightUnit = Literal["raw", "share"]


@dataclass(frozen=True)
class Pairs:
    """Labelled preferences: latents [B, ...] of the chosen and the rejected sample of each prompt."""

    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class Stored:
    """Outputs of the teacher `x0` [R, ...] with their prompts' conditions and the noise [R, ...] each was sampled from."""

    cond: Condition
    noise: Tensor
    x0: Tensor


@dataclass(frozen=True)
class Labels:
    """Latents x [N, ...] with their prompts' conditions, and the targets of a latent reward model for them [N]."""

    x: Tensor
    cond: Condition
    target: Tensor


@dataclass(frozen=True)
class Batch:
    """A micro-batch: B prompts, encoded, and real samples (latents [B, ...]), pairs or `stored` if a method needs them.

    `cond` and `null` are one row a prompt; `null` encodes the negative or the empty prompt, for guidance. `stored` has its own prompts.
    `preferred` [B, n, ...] are several preferred samples of each prompt, of which `real` is the first. `following` is the prompt after the last one, with its
    condition, in a batch that is the share of one process; None: the first one again.
    """

    prompts: tuple[Prompt, ...]
    cond: Condition
    null: Condition
    real: Tensor | None = None
    pairs: Pairs | None = None
    stored: Stored | None = None
    preferred: Tensor | None = None
    following: tuple[Prompt, Condition] | None = None

    def rows(self, rows: slice) -> Batch:
        pairs = self.pairs and Pairs(self.pairs.chosen[rows], self.pairs.rejected[rows])
        real = None if self.real is None else self.real[rows]
        preferred = None if self.preferred is None else self.preferred[rows]
        return Batch(self.prompts[rows], self.cond[rows], self.null[rows], real, pairs, self.stored, preferred)


def raise_unless(true: Tensor | bool, error: Callable[[], Exception]) -> None:
    """Raises `error()` unless the scalar is true."""
    if not bool(true):
        raise error()


@dataclass(frozen=True)
class View:
    """Everything that a term may use. `progress` in [0, 1) is the fraction of the stage done; `rng` has the random
    numbers of the batch's samples (`randn_like`, `rand`, level samplers). One row a sample, or one a group, is drawn at a time, and as often whatever values
    are at hand: so a sample's numbers are the same on any number of processes. `ranks` are these processes, for a statistic of the global batch, whose share
    the batch at hand is.

    `epoch` counts the inner epochs on one rollout. `reward_grad_fn` of latents [B, ...] and their prompts -> [B] can be differentiated, or [B, R] for
    several rewards with their `weights`; None where the run has no such reward. `latent_reward` is the latent reward model, `labels` are its training data.
    `require` takes a scalar tensor that is true and the error if it is not; the run looks at it where it waits for the device anyway.
    `boundary` is the level between two experts, and `band` the levels of the one that this micro-batch trains; all of them for a model of one network.
    """

    roles: Mapping[str, Denoiser]
    path: Path
    batch: Batch
    progress: float
    rng: Rng
    rollout: Rollout | None = None
    reward_grad_fn: Callable[[Tensor, Sequence[Prompt]], Tensor] | None = None
    epoch: int = 0
    weights: tuple[float, ...] = (1.0,)
    latent_reward: LatentReward | None = None
    labels: Labels | None = None
    band: Band = WHOLE
    boundary: float | None = None
    require: Callable[[Tensor, Callable[[], Exception]], None] = raise_unless
    ranks: Ranks = ALONE

    @property
    def samples(self) -> Rollout:
        assert self.rollout is not None, "this stage has no rollout, but a term needs one"
        return self.rollout

    def levels(self, sampler: LevelSampler, n: int, t_exit: Tensor | None = None) -> Tensor:
        """n levels of the sampler within the view's band, [n] on the host; `t_exit` [n] are the levels that the samples were predicted at."""
        return draw_in_band(lambda rng: sampler(n, progress=self.progress, t_exit=t_exit, rng=rng), self.band, self.rng)

    def guidance(self, guidance: float, guidance_2: float | None) -> float | GuidanceByLevel:
        """The guidance of this model; with two experts, each has its own scale."""
        return by_level(guidance, guidance_2, self.boundary)

    def with_rollout(self, rollout: Rollout | None) -> View:
        return replace(self, rollout=rollout)

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal noise like samples x [B, ...]."""
        return randn(x.shape, self.rng, x.device, x.dtype)

    def rand(self, n: int) -> Tensor:
        """Uniform numbers in [0, 1), one a sample or one a group, [n] on the host."""
        return rand((n,), self.rng)


@dataclass(frozen=True, kw_only=True)
class Term:
    """Base of forces and objectives: a name for the log and a weight in the sum.

    `unit` of the weight: `raw`, a factor on the term as it is published; or `share`, the norm of the term's gradient of the student's parameters as a part of
    that of the stage's matching force (0.5: half as long). The factor behind a share is measured while the run goes on (`training/term_gradients.py`).
    """

    name: str
    weight: float = 1.0
    unit: WeightUnit = "raw"

    @property
    def needs(self) -> frozenset[Need]:
        return NOTHING

    @property
    def preferred_count(self) -> int:
        """Preferred samples of each prompt that it chooses from; 0 for a term that does not choose."""
        return 0

    @property
    def skips(self) -> tuple[int, ...]:
        """Blocks of the network that it leaves out of a role's pass."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Force(Term):
    """Acts on the samples at `on`; called with a view it returns dL/dx there, [B, ...], L a batch mean."""

    on: Where = "exit"

    def __call__(self, view: View) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Objective(Term):
    """Acts on the student's parameters: yields scalars, each of which is backpropagated before the next is computed."""

    def __call__(self, view: View) -> Iterator[Tensor]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Critic:
    """Base of auxiliary trained models: `updates` optimiser steps on `role` for every student step.

    With `reuse` every update sees the student's own rollout, detached (DM-Align Algorithm 1, line 18: only the noise is
    fresh); without, each update rolls out anew.
    """

    role: str
    updates: int = 5
    reuse: bool = True

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"critic_updates: {self.updates} is not allowed; 1 or more (DMD2 uses 5)")

    @property
    def needs(self) -> frozenset[Need]:
        return NOTHING

    def prepare(self, view: View, reward_fn: Callable[[Tensor, Sequence[Prompt]], Tensor] | None, note: Callable[[str, Tensor], None]) -> View:
        """Computes what its updates on one rollout share; `reward_fn` is the run's reward without a gradient, `note` writes a scalar into the log."""
        return view

    def losses(self, view: View) -> Iterator[Tensor]:
        """Yields scalars whose sum this update descends; each is backpropagated before the next is computed."""
        raise NotImplementedError


def scalar_per_sample(x: Tensor) -> Tensor:
    """Mean over all but the batch axis, shaped to divide x: [B, ...] -> [B, 1, ...]."""
    return x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)


def as_force(g: Tensor) -> Tensor:
    """Gradient of mean over batch of 0.5 * mean over elements of (x - sg(x - g))^2, which is g / numel (DMD2's surrogate loss)."""
    return g / g.numel()
