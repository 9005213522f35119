"""Fresh rollouts for a critic's updates: made together, and the same as one at a time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from instep.core.allocator import keep_freed_memory
from instep.diffusion.noise import branch, several
from instep.diffusion.path import RectifiedFlow
from instep.diffusion.prediction import Condition, Prediction
from instep.diffusion.streams import SampleStreams
from instep.lab.mixture import ExactTeacher, Mixture, labels
from instep.lab.networks import VelocityMLP
from instep.methods.critics import FakeScoreLoss
from instep.methods.matching import DistributionMatching
from instep.methods.recipe import RolloutConfig, Stage
from instep.methods.role_config import AdamWConfig
from instep.methods.term import Batch
from instep.training import rollouts
from instep.training.state import TrainedParams, TrainState
from instep.training.step import iteration

PATH = RectifiedFlow()
LEVELS = (1.0, 0.75, 0.5, 0.25)
F64 = torch.float64


class Counted(VelocityMLP):
    """Notes the rows of each call without a graph."""

    def __init__(self, path: RectifiedFlow) -> None:
        super().__init__(path)
        self.rows: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        if not torch.is_grad_enabled():
            self.rows.append(len(x_t))
        return super().__call__(x_t, t, cond)


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(before)


def trained(critic: FakeScoreLoss, *, group: int = 2, micro_batch: int | None = None, accumulate: int = 1) -> tuple[dict, TrainState, list[int]]:
    """Two iterations of matching with one critic: the last log, the state, and the rows of the calls without a graph in the last one."""
    torch.manual_seed(0)
    student, fake = Counted(PATH), VelocityMLP(PATH)
    optimised = {name: TrainedParams(dict(net.named_parameters()), AdamWConfig(1e-3)) for name, net in (("student", student), ("fake", fake))}
    roles = {"student": student, "fake": fake, "teacher": ExactTeacher(Mixture.ring(), PATH)}
    rng = torch.Generator().manual_seed(1)
    state = TrainState(roles, optimised, PATH, (2,), rng, lambda x, prompts: -x.square().sum(1), micro_batch=micro_batch)
    stage = Stage("s", 2, 4, (DistributionMatching(),), (critic,), RolloutConfig(LEVELS), group=group)
    names = ("0", "1", "0", "1")
    for _ in range(2):
        student.rows.clear()
        log = iteration(state, stage, [Batch(names, labels(names), labels([""] * 4))] * accumulate, 0.0)
    return log, state, student.rows


@pytest.mark.parametrize("tilt", [0.0, 1.0], ids=["unscored", "scored"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_rollouts_made_together_are_those_made_one_at_a_time(monkeypatch, tilt, accumulate):
    """Losses, gradients and weights of both roles; the calls are fewer and have as many rows in all."""
    critic = FakeScoreLoss(updates=5, reuse=False, tilt=tilt)
    log, together, rows = trained(critic, accumulate=accumulate)
    for most in (1, 2):
        monkeypatch.setattr(rollouts, "TOGETHER", most)
        other_log, apart, other_rows = trained(critic, accumulate=accumulate)
        assert log == pytest.approx(other_log, rel=1e-9)
        for name in together.trained:
            for key, value in together.trained[name].state().items():
                torch.testing.assert_close(apart.trained[name].state()[key], value, rtol=0, atol=1e-12)
        assert sum(rows) == sum(other_rows) and len(rows) < len(other_rows)


def test_each_update_has_samples_of_its_own():
    seen: list[Tensor] = []

    class Spy(FakeScoreLoss):
        def losses(self, view):
            seen.append(view.samples.point("exit").x)
            assert view.samples.group == 2 and len(view.samples.cond) == len(seen[-1]) == 8
            exits = view.samples.point("exit").exit_id
            assert sorted(exits.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3], "each update's exits are spread over all levels"
            yield from super().losses(view)

    trained(Spy(updates=5, reuse=False))
    assert len(seen) == 10 and all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize(("micro_batch", "most"), [(None, 40), (16, 16), (8, 8), (4, 8)])
def test_no_call_has_more_rows_than_the_micro_batch_lets_updates_share(micro_batch, most):
    """Eight samples an update; a role divides what has more rows than a micro-batch, as it does for one update alone."""
    _, _, rows = trained(FakeScoreLoss(updates=5, reuse=False), micro_batch=micro_batch)
    assert max(rows) == most


def test_streams_of_several_updates_are_those_of_each():
    parts = [SampleStreams(5, 3, torch.Generator()) for _ in range(2)]
    each = [branch(one) for one in parts for _ in range(2)]
    alone = [one.copy() for one in each]
    joined = several(each)
    for draw in (lambda rng, n: rng.normal((n, 3), F64), lambda rng, n: rng.uniform((n, 2), F64), lambda rng, n: rng.integers(9, n)):
        assert torch.equal(draw(joined, 8), torch.cat([draw(one, 2) for one in alone]))


FAULTS = """
import resource, torch
from instep.core.allocator import keep_freed_memory
keep_freed_memory()
def work():
    blocks = [torch.ones(5 * 2**20) for _ in range(4)]
for _ in range(5): work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not keep_freed_memory(), reason="another C library, or settings of the user's own")
def test_memory_that_was_freed_is_used_again_without_new_pages():
    """Beside a process whose user asks for new pages, since glibc's own thresholds move and may keep memory too."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    faults = [
        int(subprocess.run([sys.executable, "-c", FAULTS], env=environment | asked, capture_output=True, text=True, check=True).stdout)
        for asked in ({}, {"MALLOC_MMAP_THRESHOLD_": "131072"})
    ]
    assert faults[0] < 1000 < faults[1]


def test_settings_of_the_users_own_are_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
