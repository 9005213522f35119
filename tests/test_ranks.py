"""Several processes compute what one does: samples, gradients, statistics and weights are those of the same global batch in one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import many_ranks
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from instep.core.ranks import ALONE

# what CI has time for: one recipe of each kind of statistic
QUICK = ("lab/dmd2", "lab/dm-align-group", "lab/amd", "lab/dmdr", "lab/dollar", "lab/flow-grpo", "lab/apo", "wan/dm-align-group", "wan22/dm-align-group/lora")


def spawned(folder: Path, count: int, cases: Sequence[str]) -> list[dict[str, Tensor]]:
    """The results of `count` processes, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = folder / f"of-{count}"
    started = []
    for rank in range(count):
        there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{key: str(value) for key, value in there.items()}, "PYTHONPATH": os.pathsep.join(sys.path)}
        started.append(subprocess.Popen([sys.executable, many_ranks.__file__, str(file), *cases], env=environment))
    try:
        assert [process.wait(timeout=900) for process in started] == [0] * count
    finally:
        for process in started:
            process.kill()
    return [load_file(f"{file}-{rank}.safetensors") for rank in range(count)]


def check(case: str, found: Sequence[Mapping[str, Tensor]]) -> None:
    alone = many_ranks.results(case, ALONE)
    rtol, atol = (1e-10, 1e-12) if case.startswith("lab/") else (2e-4, 2e-6)
    for rank, results in enumerate(found):
        mine = {key.partition("|")[2]: x for key, x in results.items() if key.startswith(f"{case}|")}
        assert mine.keys() == alone.keys()
        for key, x in alone.items():
            torch.testing.assert_close(mine[key], x, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text, key=key, rank=rank: f"{key} of rank {rank}: {text}")
    assert any(key.startswith("student/") for key in alone)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Tensor]]:
    return spawned(tmp_path_factory.mktemp("ranks"), 2, QUICK)


@pytest.mark.parametrize("case", QUICK)
def test_two_processes_compute_what_one_does(case, two):
    check(case, two)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_every_recipe_on_several_processes(count, tmp_path):
    cases = [case for case in many_ranks.CASES if count == 2 or case.startswith("lab/")]
    found = spawned(tmp_path, count, cases)
    for case in cases:
        check(case, found)
