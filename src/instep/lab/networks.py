"""The laboratory's students and fakes: small networks, several seeds of one as a batched ensemble, and free particles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from instep.diffusion.guidance_scales import GuidanceRange
from instep.diffusion.path import Path, broadcast
from instep.diffusion.prediction import Condition, Denoiser, Prediction, PredictionType, to_prediction, velocity_of_x0
from instep.lab.mixture import LabelCondition
from instep.methods.latent_reward_model import LatentReward
from instep.models.embeddings import FEATURES
from instep.models.family import block_numbers


class VelocityMLP(nn.Module):
    """A small velocity network, three layers of `width`: inputs x, t, four Fourier pairs of t, a one-hot class and a one-hot exit.

    `members` independent networks run as one batch: `cond.member` selects the network of each row. `rank` gives every layer a low-rank
    adapter (zero at first), weighted by `scale`; `head` a discriminator head on the last hidden layer, whose first logit is zero.
    `prediction_type`: the type of its output. With `guidance_range` it is conditioned on guidance scales: a small network of the scales, zero at
    first, is added to the first layer, where the time enters.
    """

    def __init__(
        self,
        path: Path,
        *,
        members: int = 1,
        classes: int = 2,
        exits: int = 0,
        width: int = 64,
        dim: int = 2,
        rank: int = 0,
        head: bool = False,
        scale: float = 1.0,
        prediction_type: PredictionType = "velocity",
        guidance_range: GuidanceRange | None = None,
    ) -> None:
        super().__init__()
        self.prediction_type: PredictionType = prediction_type
        self.path, self.members, self.classes, self.exits, self.rank, self.scale = path, members, classes, exits, rank, scale
        self.width = width
        sizes = [dim + 1 + 8 + classes + exits, width, width, width, dim]
        self.layers = nn.ModuleList(Layer(members, *pair, rank) for pair in zip(sizes, sizes[1:], strict=False))
        self.head = nn.ModuleList([Layer(members, width, width), Layer(members, width, 1).zeroed()]) if head else None
        self.guidance_range = guidance_range
        self.guidance_embedding = nn.ModuleList([Layer(members, FEATURES, width), Layer(members, width, width).zeroed()]) if guidance_range else None

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition, scale: float | None = None, skips: tuple[int, ...] = ()) -> Prediction:
        assert isinstance(cond, LabelCondition)
        angle = math.pi * t[:, None] * torch.arange(1, 5, device=t.device)
        parts = [x_t, t[:, None], angle.sin(), angle.cos(), _one_hot(cond.label, self.classes)]
        if self.exits:
            parts.append(_one_hot(torch.full_like(cond.label, -1) if cond.exit_id is None else cond.exit_id, self.exits))
        scale = self.scale if scale is None else scale
        packing = MemberPacking.of(cond.member, self.members, len(x_t))
        h = self.layers[0](packing.pack(torch.cat(parts, 1).to(x_t)), scale)
        if self.guidance_embedding is not None and self.guidance_range is not None and cond.guidance_scales is not None:
            first, second = self.guidance_embedding
            h = h + second(nn.functional.silu(first(packing.pack(self.guidance_range.features(cond.guidance_scales).to(x_t)))))
        h = nn.functional.silu(h)
        for i, layer in enumerate(self.layers[1:-1]):
            h = h if i in skips else nn.functional.silu(layer(h, scale))
        answer = to_prediction(self.prediction_type, packing.unpack(self.layers[-1](h, scale)), self.path, x_t, t)
        if self.head is None:
            return answer
        hidden, out = self.head
        return Prediction(answer.x0, answer.v, packing.unpack(out(nn.functional.silu(hidden(h)))).squeeze(1))

    def scaled(self, scale: float) -> Denoiser:
        """The same network with its adapter at `scale`."""
        if not self.rank:
            raise ValueError("role: this network has no adapter to scale; give it a rank")
        return lambda x_t, t, cond: self(x_t, t, cond, scale)

    def skipping(self, blocks: Sequence[int]) -> Denoiser:
        """The same network without the hidden layers of these numbers; those that keep the width count, from 0."""
        chosen = block_numbers(blocks, len(self.layers) - 2)
        return lambda x_t, t, cond: self(x_t, t, cond, None, chosen)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Its adapters if it has any, else all parameters."""
        named = dict(self.named_parameters())
        return {k: p for k, p in named.items() if ".adapter_" in k} if self.rank else named

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {key: p.detach() for key, p in self.trainable().items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for key, p in self.trainable().items():
            p.copy_(state[key])


class LatentRewardMLP(LatentReward):
    """The laboratory's latent reward model: three layers of `width` on x and a one-hot class, `members` side by side as in `VelocityMLP`."""

    def __init__(self, *, members: int = 1, classes: int = 2, width: int = 64, dim: int = 2) -> None:
        super().__init__()
        self.members, self.classes = members, classes
        sizes = [dim + classes, width, width, 1]
        self.layers = nn.ModuleList(Layer(members, *pair) for pair in zip(sizes, sizes[1:], strict=False))

    def rate(self, x: Tensor, cond: Condition) -> Tensor:
        assert isinstance(cond, LabelCondition)
        packing = MemberPacking.of(cond.member, self.members, len(x))
        h = packing.pack(torch.cat([x, _one_hot(cond.label, self.classes).to(x)], 1))
        for layer in self.layers[:-1]:
            h = nn.functional.silu(layer(h))
        return packing.unpack(self.layers[-1](h)).squeeze(1)


class Layer(nn.Module):
    """`members` linear layers [M, in, out] side by side, each started as `nn.Linear` would be; with `rank`, a low-rank addition."""

    def __init__(self, members: int, inputs: int, outputs: int, rank: int = 0) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))
        self.rank = rank
        if rank:
            self.adapter_down = nn.Parameter(torch.empty(members, inputs, rank).uniform_(-bound, bound))
            self.adapter_up = nn.Parameter(torch.zeros(members, rank, outputs))

    def zeroed(self) -> Self:
        """The layer with zeros for weight and bias."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        return self

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        out = torch.baddbmm(self.bias, x, self.weight)
        return out + scale * (x @ self.adapter_down @ self.adapter_up) if self.rank and scale else out


@dataclass(frozen=True)
class MemberPacking:
    """Where each of B rows sits in a padded batch [M, n, ...] of M members; None where there is one member."""

    at: Tensor | None
    members: int
    each: int

    @classmethod
    def of(cls, member: Tensor | None, members: int, rows: int) -> MemberPacking:
        if members == 1:
            return cls(None, 1, rows)
        assert member is not None, "an ensemble needs to know which member each row belongs to"
        order, counts = member.argsort(stable=True), torch.bincount(member, minlength=members)
        first = counts.cumsum(0) - counts
        sorted_members = member[order]
        each = int(counts.max())
        at = torch.empty_like(member)
        at[order] = torch.arange(rows, device=member.device) - first[sorted_members] + each * sorted_members
        return cls(at, members, each)

    def pack(self, x: Tensor) -> Tensor:
        """[B, D] -> [M, n, D]; empty places are zero."""
        if self.at is None:
            return x[None]
        return x.new_zeros(self.members * self.each, x.shape[1]).index_copy(0, self.at, x).unflatten(0, (self.members, self.each))

    def unpack(self, x: Tensor) -> Tensor:
        """[M, n, D] -> [B, D]."""
        return x[0] if self.at is None else x.flatten(0, 1)[self.at]


def _one_hot(index: Tensor, n: int) -> Tensor:
    """One-hot rows; an index below zero gives zeros."""
    return (index[:, None] == torch.arange(n, device=index.device)).float()


class Particles(nn.Module):
    """A free point cloud in place of a student: sample i *is* parameter i, whatever the noise. With the exact fake it isolates a
    method's fixed point from networks and optimisers."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(start.clone())

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        assert len(x_t) == len(self.x), "a particle student runs on all of its particles"
        return Prediction(self.x, self.x)

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())


class ExactFake:
    """The exact denoiser of a point cloud: a softmax over its points, no training.

    `label` [N] restricts each class to its own points. `log_weight` of points [N, D] -> [N] is that of a critic that weighs its samples
    (AMD Eq. 14): the fake then models q W instead of q.
    """

    def __init__(self, particles: Particles, path: Path, label: Tensor | None = None, log_weight: Callable[[Tensor], Tensor] | None = None) -> None:
        self.particles, self.path, self.label, self.log_weight = particles, path, label, log_weight

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        points = self.particles.x.detach()
        a, b = broadcast(self.path.a(t), x_t), broadcast(self.path.b(t), x_t)
        logits = -0.5 * (x_t[:, None] - a[:, None] * points).square().sum(-1) / b.square()
        if self.log_weight is not None:
            logits = logits + self.log_weight(points)
        if self.label is not None:
            assert isinstance(cond, LabelCondition)
            other = (cond.label[:, None] != self.label) & (cond.label[:, None] >= 0)
            logits = logits.masked_fill(other, -math.inf)
        x0 = logits.softmax(1) @ points
        return Prediction(x0, velocity_of_x0(self.path, x_t, t, x0))
