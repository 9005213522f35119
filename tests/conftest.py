"""Tests are offline, seeded and single-threaded (under contention many threads are far slower)."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from little_drawn import shorten

from instep.lab.networks import VelocityMLP
from instep.lab.world import World, flow_start

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Every export collects garbage. It would look at half a million objects of libraries each time, a fifth of the time of a tiny run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def little_drawn() -> Iterator[None]:
    """See `little_drawn.shorten`."""
    with pytest.MonkeyPatch.context() as patched:
        shorten(patched.setattr)
        yield


@pytest.fixture(scope="session")
def start() -> VelocityMLP:
    """A flow on ring8 from which students of the laboratory begin. No test changes it; it takes 12 s, so a process makes it once."""
    torch.manual_seed(0)
    return flow_start(World.named("ring8", members=2), 0, steps=1500)
