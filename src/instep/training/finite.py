"""What ends a run whose weights or samples are no longer finite, and which of its checkpoints are older than that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from instep.core.shards import local
from instep.core.unusable import Unusable, is_finite, named
from instep.diffusion.prediction import Condition, Denoiser, Prediction
from instep.training import checkpoint
from instep.training.history import Row
from instep.training.state import RewardFn

# Iterations in a row in which all steps of a role were skipped. A batch whose gradient is not finite is followed by one that is; weights that give none
# give none again, because they no longer change
SKIPPED = 10
BROKEN = "the student's samples hold values that are not finite"


class SkippedSteps:
    """How long each role's steps have been skipped, from the rows of the log."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.since: dict[str, int] = {}  # the step after which a role's steps were skipped
        self.step = 0
        for row in rows:
            self.row(int(row["step"]), row)

    def row(self, step: int, row: Mapping[str, Any]) -> None:
        self.step = step
        for key in (key for key in row if key.startswith("grad/") and key.endswith("/skipped")):
            name = key.split("/")[1]
            if row[key] == 1:
                self.since.setdefault(name, step - 1)
            else:
                self.since.pop(name, None)

    def too_many(self) -> str | None:
        """What is wrong, if the steps of a role were skipped `SKIPPED` times in a row."""
        names = [name for name, since in self.since.items() if self.step - since >= SKIPPED]
        return f"the gradient of the {named(names)} was not finite in {SKIPPED} iterations in a row" if names else None

    def bad_from(self, step: int) -> int:
        """The first step whose weights are not known to be good, where those of `step` are bad: a gradient that was finite speaks for those before it."""
        return min((step, *self.since.values()))

    def good(self, out: Path) -> tuple[int, ...]:
        """The newest checkpoint from before steps were skipped, where they are: those that are saved now may turn out to be bad."""
        older = (step for path in checkpoint.every(out / "checkpoints") if (step := checkpoint.step_of(path)) < self.bad_from(self.step))
        return tuple(older)[:1] if self.since else ()


class WatchedDenoiser:
    """A denoiser that notes whether all of its predictions were finite."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.finite = denoiser, True

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        answer = self.denoiser(x_t, t, cond)
        self.finite = self.finite and bool(answer.x0.isfinite().all())
        return answer


def of_finite_samples(reward_fn: RewardFn | None) -> RewardFn | None:
    """A reward that raises Unusable for samples that are not finite, so that the reward is not blamed for them."""
    if reward_fn is None:
        return None

    def score(x: Tensor, prompts: Any) -> Tensor:
        if not bool(x.isfinite().all()):
            raise Unusable(BROKEN)
        return reward_fn(x, prompts)

    return score


def ended(what: str, out: Path, step: int, skipped: SkippedSteps) -> Unusable:
    """The error of a run that ends at `step`, with what the user can do. Checkpoints that may be bad are removed, and the newest good one is kept."""
    folder, lower = out / "checkpoints", "--student.lr LOWER (and --fake.lr, if it is the fake's)"
    checkpoint.drop_after(folder, skipped.bad_from(step) - 1)
    newest = checkpoint.latest(folder)
    ends = f"run: {what} at step {step}, and the run ends; nothing was exported, and "
    if newest is None:
        return Unusable(f"{ends}it has no good checkpoint; begin anew in another folder with a lower learning rate, --out NEW {lower}")
    return Unusable(
        f"{ends}{newest} is its newest good checkpoint; the same command goes on from there and comes to the same end, because the learning rate belongs to "
        f"the run: begin another from it with a lower one, --start-from {out} --out NEW {lower}"
    )


def check_state(contents: Mapping[str, Any]) -> None:
    """Raises Unusable that names what is not finite in the contents of a checkpoint: weights, averages, the optimiser's moments, the reward's variance; of
    tensors in shards what this process holds."""
    bad = [name for name, value in _leaves(contents) if not _finite(value)]
    if bad:
        raise Unusable(f"{named(bad)} hold values that are not finite")


def _leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{at}/{key}" if at else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{at}/{i}")
    else:
        yield at, value


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return is_finite(local(value))
    return not isinstance(value, float) or math.isfinite(value)
