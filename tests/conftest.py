"""Tests are offline, seeded and single-threaded (under contention many threads are far slower)."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

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
