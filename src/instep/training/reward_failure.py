"""A reward that fails in the middle of a run: the last whole iteration is saved, and the message tells how to go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from instep.rewards.base import RewardError
from instep.training import checkpoint
from instep.training.batches import BatchSource
from instep.training.state import TrainState


@dataclass(frozen=True)
class Before:
    """What an iteration changes before its first optimiser step, as it was: the generator, the cursors of the batches, the rewards' variance. `tried`: the
    optimiser steps that all roles had taken."""

    rng: Tensor
    source: dict[str, Any]
    variance: Sequence[Tensor] | None
    tried: int


def before(state: TrainState, source: BatchSource) -> Before:
    """The state before an iteration."""
    variance = None if state.reward_variance is None else list(state.reward_variance)
    return Before(state.rng.get_state(), source.state(), variance, _tried(state))


def undo(state: TrainState, source: BatchSource, began: Before) -> bool:
    """Puts the state back to where the iteration began. False, and nothing is changed, if a role has taken a step since."""
    if _tried(state) != began.tried:
        return False
    state.rng.set_state(began.rng)
    source.load_state(began.source)
    state.reward_variance = None if began.variance is None else list(began.variance)
    return True


def failed(error: RewardError, out: Path, step: int, total: int) -> RewardError:
    """The error again, with the iteration, what is kept, and how to go on."""
    newest = checkpoint.latest(out / "checkpoints")
    kept = "nothing was saved yet" if newest is None else f"saved at step {checkpoint.step_of(newest)} in {out}"
    fix = f"the same command goes on from there; a reward whose code you mend is another one: begin with it from this run, --start-from {out} --out NEW"
    return RewardError(f"{error} (iteration {step + 1} of {total}; {kept}; {'begin anew' if newest is None else fix})")


def _tried(state: TrainState) -> int:
    return sum(trained.tried for trained in state.trained.values())
