"""The batches of each iteration: prompts in a seeded order, and real samples if a recipe needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from instep.core.ranks import ALONE, Ranks
from instep.data.prompt import Prompt, as_prompts
from instep.data.samples import PairSamples, RealSamples
from instep.diffusion.transfer import to_device
from instep.methods.recipe import Stage
from instep.methods.term import Batch, Pairs, Stored
from instep.models.family import Family

if TYPE_CHECKING:
    from instep.data.samples import TeacherSamples


class ShuffledIndices:
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


class BatchSource:
    """Batches for any stage: prompts alone, or real samples or labelled pairs with their prompts; and stored teacher outputs if a stage needs them.

    With several `ranks` each takes its own consecutive share of every batch, and all have the same cursors.
    """

    def __init__(
        self,
        family: Family,
        prompts: Sequence[Prompt | str],
        real: RealSamples | None,
        seed: int,
        stored: TeacherSamples | None = None,
        pairs: PairSamples | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if not prompts:
            raise ValueError("prompts: the list is empty; give at least one prompt")
        self.family, self.prompts, self.real, self.stored, self.pairs = family, as_prompts(prompts), real, stored, pairs
        self.device, self.ranks = family.device, ranks
        self._same: dict[str, dict[Prompt, list[int]]] = {}
        self._orders = {"prompts": ShuffledIndices(len(self.prompts), seed)}
        if real is not None:
            self._orders["real"] = ShuffledIndices(len(real.prompts), seed + 1)
        if stored is not None:
            self._orders["stored"] = ShuffledIndices(len(stored.prompts), seed + 2)
        if pairs is not None:
            self._orders["pairs"] = ShuffledIndices(len(pairs.prompts), seed + 3)

    def next(self, stage: Stage) -> list[Batch]:
        """The micro-batches of one iteration."""
        return [self._one(stage, self.ranks) for _ in range(stage.accumulate)]

    def first(self, stage: Stage) -> Batch:
        """The first micro-batch of a run, whole, for one process alone; no cursor moves."""
        now = self.state()
        self.load_state(dict.fromkeys(now, 0))
        batch = self._one(stage, ALONE)
        self.load_state(now)
        return batch

    def _one(self, stage: Stage, ranks: Ranks) -> Batch:
        n, latents, pairs, preferred = stage.batch // stage.group, None, None, None
        mine = ranks.share(n)
        if "pairs" in stage.needs:
            assert self.pairs is not None
            rows = self._orders["pairs"].next(n)
            names, rows = tuple(self.pairs.prompts[i] for i in rows), rows[mine]
            pairs = Pairs(*(to_device(x[rows], self.device) for x in (self.pairs.chosen, self.pairs.rejected)))
            latents = pairs.chosen if stage.needs & {"real", "preferred"} else None
            preferred = self._preferred("pairs", self.pairs.preferred, rows, stage.preferred_count)
        elif stage.needs & {"real", "preferred"}:
            assert self.real is not None
            rows = self._orders["real"].next(n)
            names, rows = tuple(self.real.prompts[i] for i in rows), rows[mine]
            latents = to_device(self.real.latents[rows], self.device)
            preferred = self._preferred("real", self.real, rows, stage.preferred_count)
        else:
            names = tuple(self.prompts[i] for i in self._orders["prompts"].next(n))
        following = None if ranks.parts == 1 else names[mine.stop % n]
        names = names[mine]
        cond, null = self.family.encode(names), self.family.unconditional(names)
        stored = self._stored(n, ranks) if "stored" in stage.needs else None
        return Batch(names, cond, null, latents, pairs, stored, preferred, following and (following, self.family.encode([following])))

    def _preferred(self, name: str, samples: RealSamples, rows: Sequence[int], count: int) -> Tensor | None:
        """For each row its sample and the next ones of the same prompt, [B, count, ...]; a prompt with fewer begins again. None for count 0."""
        if not count:
            return None
        if name not in self._same:
            self._same[name] = {}
            for i, prompt in enumerate(samples.prompts):
                self._same[name].setdefault(prompt, []).append(i)
        same = [self._same[name][samples.prompts[row]] for row in rows]
        chosen = [[others[(others.index(row) + i) % len(others)] for i in range(count)] for row, others in zip(rows, same, strict=True)]
        return to_device(samples.latents[torch.tensor(chosen)], self.device)

    def _stored(self, n: int, ranks: Ranks) -> Stored:
        assert self.stored is not None
        rows = self._orders["stored"].next(n)[ranks.share(n)]
        noise, latents = (to_device(x[rows], self.device) for x in (self.stored.noise, self.stored.latents))
        return Stored(self.family.encode([self.stored.prompts[i] for i in rows]), noise, latents)

    def state(self) -> dict[str, Any]:
        return {name: order.position for name, order in self._orders.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, order in self._orders.items():
            order.position = int(state[name])
