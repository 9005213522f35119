"""Where an iteration's batches come from: prompts in a seeded order, and real samples where a recipe asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from instep.models.base import Family
from instep.terms import Batch
from instep.train.recipe import Stage


@dataclass(frozen=True)
class Preferred:
    """Real samples that people would prefer, each with its prompt: latents [N, C, (F,) H, W]."""

    prompts: tuple[str, ...]
    latents: Tensor

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.latents) or not self.prompts:
            raise ValueError(f"preferred: {len(self.prompts)} prompts for {len(self.latents)} samples; give one prompt a sample, at least one")


class Order:
    """An endless seeded shuffle of 0..n-1; its state is a cursor, and each pass is a pure function of seed and pass number."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.position = n, seed, 0
        self._pass, self._order = -1, torch.empty(0, dtype=torch.long)

    def next(self, k: int) -> list[int]:
        return [self._one() for _ in range(k)]

    def _one(self) -> int:
        number, index = divmod(self.position, self.n)
        if number != self._pass:
            rng = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
            self._pass, self._order = number, torch.randperm(self.n, generator=rng)
        self.position += 1
        return int(self._order[index])


class Source:
    """Batches for any stage: prompts alone, or preferred samples with theirs."""

    def __init__(self, family: Family, prompts: Sequence[str], preferred: Preferred | None, seed: int) -> None:
        if not prompts:
            raise ValueError("prompts: the list is empty; give at least one prompt")
        self.family, self.prompts, self.preferred = family, tuple(prompts), preferred
        self._orders = {"prompts": Order(len(self.prompts), seed)}
        if preferred is not None:
            self._orders["preferred"] = Order(len(preferred.prompts), seed + 1)

    def next(self, stage: Stage) -> list[Batch]:
        """The micro-batches of one iteration."""
        return [self._one(stage) for _ in range(stage.accumulate)]

    def _one(self, stage: Stage) -> Batch:
        n, real = stage.batch // stage.group, None
        if stage.needs_real:
            assert self.preferred is not None
            rows = self._orders["preferred"].next(n)
            names = tuple(self.preferred.prompts[i] for i in rows)
            real = self.preferred.latents[rows]
        else:
            names = tuple(self.prompts[i] for i in self._orders["prompts"].next(n))
        return Batch(names, self.family.encode(names), self.family.null(n), real)

    def state(self) -> dict[str, Any]:
        return {name: order.position for name, order in self._orders.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, order in self._orders.items():
            order.position = int(state[name])
