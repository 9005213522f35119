"""Tests are offline, seeded and single-threaded (under contention many threads are far slower)."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from instep.training import run

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
def few_teacher_samples() -> Iterator[None]:
    """A run that needs samples of its teacher makes 8 of them in 2 steps. The usual 512 in 50 steps take half a minute on the smallest model."""
    real = run.teacher_samples
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "TEACHER_STEPS", 2)
        patched.setattr(run, "teacher_samples", lambda *args, n, **given: real(*args, n=min(n, 8), **given))
        yield
