"""A run's state in shards, for `test_ranks_faults.py`: weights of odd sizes that are stepped by what each generator and cursor of a checkpoint gives."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from instep.core.ranks import ALONE, Ranks
from instep.core.shards import assign, part_of
from instep.diffusion.path import RectifiedFlow
from instep.methods.role_config import AdamWConfig
from instep.training import checkpoint, saved
from instep.training.batches import ShuffledIndices
from instep.training.hold import Held
from instep.training.saving import CheckpointWriter
from instep.training.state import NormRatio, TrainedParams, TrainState

# of no size that ranks share evenly: of three rows four ranks leave one without any
SHAPES = {"weight": (10, 6), "bias": (5,), "few": (3, 2), "one": (1,)}


class Network:
    """The owner of a role's parameters."""

    def __init__(self, seed: int, ranks: Ranks) -> None:
        rng = torch.Generator().manual_seed(seed)
        values = {key: torch.randn(shape, generator=rng) for key, shape in SHAPES.items()}
        if ranks.count > 1:
            mesh = init_device_mesh("cpu", (ranks.count,))
            values = {key: distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None) for key, x in values.items()}
        self.parameters = {key: nn.Parameter(x) for key, x in values.items()}

    def state(self) -> dict[str, Tensor]:
        return {key: p.detach() for key, p in self.parameters.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for key, p in self.parameters.items():
            assign(p, state[key])


class Source:
    """The cursor of an order of twelve prompts."""

    def __init__(self) -> None:
        self.order = ShuffledIndices(12, 5)

    def state(self) -> dict[str, int]:
        return {"prompts": self.order.position}

    def load_state(self, state: Mapping[str, int]) -> None:
        self.order.position = state["prompts"]


def steps(folder: Path, ranks: Ranks, count: int, to: Path | None = None) -> None:
    """Goes on from the newest checkpoint in `folder`, if there is one, for `count` steps, and saves the last in the folder `to` (None: the same)."""
    roles = {name: Network(seed, ranks) for seed, name in enumerate(("student", "fake"))}
    trained = {name: TrainedParams(roles[name].parameters, AdamWConfig(lr=0.1), ema=0.9) for name in roles}
    reference = tuple(Network(2, ranks).parameters.values())
    state = TrainState(roles, trained, RectifiedFlow(), (1,), torch.Generator().manual_seed(7), reference=reference, ranks=ranks)
    source, newest = Source(), checkpoint.latest(folder)
    if newest is not None:
        saved.load(state, source, checkpoint.load(newest))
    for _ in range(count):
        _step(state, source)
    CheckpointWriter(to or folder, 9, background=False, ranks=ranks).save(state.step, saved.contents(state, source))


def _step(state: TrainState, source: Source) -> None:
    """The weights follow the generators, the cursor and the controller; element by element, so that shards change nothing but rounding."""
    factor = float(torch.rand(())) + random.random() + float(np.random.rand()) + source.order.next(1)[0] + state.hold.count
    for trained in state.trained.values():
        for p in trained.masters.values():
            p.grad = part_of(factor * torch.randn(tuple(p.shape), generator=state.rng), p.detach())
        trained.optimizer.step()
        trained.settle(True)
    state.step += 1
    state.reference_stage, state.reward_variance = "align", [torch.tensor(factor)]
    state.ratios["align/reward"] = NormRatio(factor, 1.0, state.step)
    state.hold = replace(Held("align", True, {"diversity": factor}), count=state.step)


def alone(folder: Path, count: int) -> None:
    """`steps` in this process, one after another, each saved."""
    for _ in range(count):
        steps(folder, ALONE, 1)
