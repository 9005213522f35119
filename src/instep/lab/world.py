"""The setting of a laboratory run: a mixture, a reward on its modes, where students start, and the batches they train on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from instep.data.prompt import as_prompts
from instep.diffusion.path import Path, RectifiedFlow, VariancePreserving
from instep.diffusion.sampling import sample_ode
from instep.lab.mixture import ExactTeacher, Mixture, labels
from instep.lab.networks import VelocityMLP
from instep.methods.recipe import Stage
from instep.methods.term import Batch, Pairs, Stored
from instep.rewards.base import FunctionReward, checked_scores

GEOMETRIES: dict[str, Callable[[], Mixture]] = {
    "ring8": Mixture.ring,
    "grid9": Mixture.grid,
    "moons": Mixture.moons,
    "rings": Mixture.rings,
}

RewardName = Literal["none", "half", "right", "on-mode"]
StartName = Literal["flow", "far"]

# the exact teacher's sampler: fewer, shifted steps are visibly worse
ODE_STEPS = 40
# how softly the `half` reward changes from one mode to the next
BLUR = 0.4
# the position of a far start: every class at one point well off every mode
FAR = (5.0, 5.0)


@dataclass(frozen=True)
class World:
    """A mixture under a path, `members` seeds that train side by side, and which modes the reward prefers (None: there is no reward)."""

    mixture: Mixture
    path: Path = RectifiedFlow()
    members: int = 3
    reward: RewardName = "none"

    @classmethod
    def named(cls, geometry: str, *, members: int = 3, reward: RewardName = "none", path: Literal["flow", "vp"] = "flow") -> World:
        """A bundled geometry; ValueError with the list of them otherwise."""
        if geometry not in GEOMETRIES:
            raise ValueError(f"geometry: {geometry!r} is not known; allowed: {', '.join(GEOMETRIES)}")
        return cls(GEOMETRIES[geometry](), RectifiedFlow() if path == "flow" else VariancePreserving.linear(), members, reward)

    @property
    def rewarded(self) -> Tensor | None:
        """The modes that the reward prefers, booleans [M]: the right half of each class. None without such a reward."""
        if self.reward not in ("half", "right"):
            return None
        chosen = torch.zeros(len(self.mixture.means), dtype=torch.bool)
        for c in range(self.mixture.label_count):
            mine = (self.mixture.classes == c).nonzero().flatten()
            # ties (a symmetric geometry) go to the upper mode
            rank = self.mixture.means[mine, 0] + 1e-3 * self.mixture.means[mine, 1]
            chosen[mine[rank.argsort(descending=True)[: len(mine) // 2]]] = True
        return chosen

    def score(self, x: Tensor, prompts) -> Tensor:
        """The reward of samples [B, 2], checked as any user's is; differentiable but for on-mode.

        half: near 1 where a rewarded mode is nearest, near 0 elsewhere; right: the first coordinate, between -2 and 2; on-mode: 1 within 3
        sigma of a mode of the sample's own class, else 0.
        """
        return checked_scores(FunctionReward(self._score, name=self.reward), x, prompts)

    def _score(self, x: Tensor, prompts) -> Tensor:
        if self.reward == "right":
            return x[:, 0].clamp(-2, 2)
        distance = torch.cdist(x, self.mixture.means.to(x))
        if self.reward == "half":
            assert self.rewarded is not None
            return (-distance.square() / (2 * BLUR**2)).softmax(1)[:, self.rewarded].sum(1)
        own = self.mixture.member(labels(prompts).label)
        return (distance.masked_fill(~own, torch.inf).amin(1) < 3 * self.mixture.sigma).float()

    @property
    def teacher(self) -> ExactTeacher:
        return ExactTeacher(self.mixture, self.path)

    def batch(self, stage: Stage, guidance: float, rng: torch.Generator) -> Batch:
        """Prompts of every member for one micro-batch of `stage`, with exact real samples or the exact teacher's outputs if the stage needs them."""
        n = self.members * (stage.batch // stage.group)
        member = self.member(n)
        names = self.draw(n, rng)
        cond, null = labels(names, member), labels([""] * n, member)
        real = self.mixture.sample(cond.label, rng, self.rewarded if "preferred" in stage.needs else None) if stage.needs & {"real", "preferred"} else None
        several = [self.mixture.sample(cond.label, rng, self.rewarded) for _ in range(stage.preferred_count - 1)]
        preferred = torch.stack([real, *several], 1) if real is not None and stage.preferred_count else None
        pairs = None
        if "pairs" in stage.needs:
            if self.rewarded is None:
                raise ValueError(f"reward: stage {stage.name!r} needs labelled pairs; they come from --reward half (or right), whose modes are the chosen ones")
            pairs = Pairs(self.mixture.sample(cond.label, rng, self.rewarded), self.mixture.sample(cond.label, rng, ~self.rewarded))
        stored = None
        if "stored" in stage.needs:
            noise = torch.randn(n, 2, generator=rng)
            x0 = sample_ode(self.teacher, cond, null, noise, steps=ODE_STEPS, path=self.path, guidance=guidance)
            stored = Stored(cond, noise, x0)
        return Batch(as_prompts(names), cond, null, real, pairs, stored, preferred)

    def member(self, n: int) -> Tensor:
        """Which member each of n rows belongs to: blocks of n / members."""
        return torch.arange(self.members).repeat_interleave(n // self.members)

    def draw(self, n: int, rng: torch.Generator) -> tuple[str, ...]:
        """n random classes."""
        return tuple(str(int(c)) for c in torch.randint(self.mixture.label_count, (n,), generator=rng))


def flow_start(
    world: World, seed: int, *, start: StartName = "flow", steps: int = 5000, width: int = 64, on_step: Callable[[], object] = lambda: None
) -> VelocityMLP:
    """An ensemble trained by flow matching on the mixture, or for a `far` start on a blob at FAR; it initialises students and fakes.

    One prompt in ten is unconditional, so that the network can serve as a learned, guided teacher.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = VelocityMLP(world.path, members=world.members, classes=world.mixture.label_count, width=width)
    rng, n = torch.Generator().manual_seed(seed), 256 * world.members
    optimizer = torch.optim.Adam(net.parameters(), 2e-3, fused=True)
    member = world.member(n)
    for step in range(steps):
        names = world.draw(n, rng)
        cond = labels(names, member)
        x0 = world.mixture.sample(cond.label, rng) if start == "flow" else torch.tensor(FAR) + 0.3 * torch.randn(n, 2, generator=rng)
        kept = torch.rand(n, generator=rng) >= 0.1
        cond = labels([name if keep else "" for name, keep in zip(names, kept.tolist(), strict=True)], member)
        t, eps = torch.rand(n, generator=rng) * 0.98 + 0.01, torch.randn(n, 2, generator=rng)
        # each member's own mean, so that what a member learns does not depend on how many there are
        loss = world.members * (net(world.path.renoise(x0, eps, t), t, cond).v - (eps - x0)).square().mean()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, 2 * (1 - step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_step()
    return net
