"""Policy gradients on the few-step student itself: its re-noise steps are a Gaussian policy with an exact log-probability.

From x0 predicted at one level the student goes to the next by N(a(t') x0, b(t')^2): no step has to be made stochastic for the purpose. The
last step, to a clean sample, is deterministic and left out; a one-step student has no other, and is refused (`rollout._stacked`).
Log-probabilities are means over elements, as is usual for latents of any size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from instep.rollout import Trajectory, renoise_log_prob
from instep.terms import Need, Objective, View

# before the first update the policy is the one that rolled out: what is beyond rounding is a student that differs from itself
SAME = 1e-2


@dataclass(frozen=True, kw_only=True)
class _Policy(Objective):
    """What policy gradients share: one scalar a transition, each with its own forward pass."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reward", "trajectory"})

    def passes(self, group: int) -> tuple[float, float]:
        return 0.0, 1.0

    def log_prob(self, view: View, path: Trajectory, s: int) -> Tensor:
        """log pi(x_next | x_t) of transition s under the present student, [B], with its graph."""
        t, t_next = (level.expand(len(path.x_t[s])) for level in (path.t[s], path.t_next[s]))
        x0 = view.roles["student"](path.x_t[s], t, view.samples.cond).x0
        return renoise_log_prob(view.path, x0, path.x_next[s], t_next)

    @staticmethod
    def parts(view: View) -> tuple[Trajectory, Tensor]:
        path, advantage = view.samples.trajectory, view.samples.advantage
        assert path is not None and advantage is not None
        return path, advantage


@dataclass(frozen=True, kw_only=True)
class GRPO(_Policy):
    """-mean min(r A, clip(r, 1 - c, 1 + c) A) over the stored transitions, r the ratio of probabilities to the student that rolled out.

    DMDR's policy branch; matching beside it takes the place of a KL penalty. With one inner epoch every ratio is 1 and its gradient is the
    score function's; `Stage.inner_epochs` of 2 or more make use of the clip. `clip` is for log-probabilities that are means over elements.
    """

    name: str = "grpo"
    clip: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1:
            raise ValueError(f"clip: {self.clip} is not allowed; a bound on the ratio between 0 and 1 (1e-3 for latents, .2 in two dimensions)")

    def __call__(self, view: View) -> Iterator[Tensor]:
        path, advantage = self.parts(view)
        for s in range(len(path.t)):
            ratio = (self.log_prob(view, path, s) - path.log_prob[s]).exp()
            if view.epoch == 0 and bool((ratio.detach() - 1).abs().max() > SAME):
                raise RuntimeError(
                    f"grpo: before any update the ratio of probabilities is {float(ratio.detach().max()):.3f} and not 1, so the student gives another answer "
                    "than it rolled out with; dropout, a changed condition or half precision in the network are the usual causes"
                )
            yield surrogate(ratio, advantage, self.clip).mean() / len(path.t)


def surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate as a loss, [B] (Schulman et al. 2017, Eq. 7, with its sign turned)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


@dataclass(frozen=True, kw_only=True)
class DDPO(_Policy):
    """-mean A log pi over the last `truncate` transitions: the score function (Black et al. 2024; DOLLAR's Algorithm 2 takes the last 2)."""

    name: str = "ddpo"
    truncate: int = 2

    def __post_init__(self) -> None:
        if self.truncate < 1:
            raise ValueError(f"truncate: {self.truncate} is not allowed; 1 or more transitions")

    def __call__(self, view: View) -> Iterator[Tensor]:
        path, advantage = self.parts(view)
        steps = range(len(path.t))[-self.truncate :]
        for s in steps:
            yield -(advantage * self.log_prob(view, path, s)).mean() / len(steps)
