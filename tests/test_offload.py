"""Networks that take turns on a device, with masters and moments in host memory."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from every_recipe import PROMPTS, REWARD, batches_of, family, run_stages, small, state_of
from fast import slow_but
from second_device import Poisoned
from short_runs import BF16
from test_run import rows
from torch import nn

from instep.methods.role_config import AdamWConfig
from instep.models.residency import Residency
from instep.training.execution import Execution
from instep.training.options import RunOptions
from instep.training.run import train
from instep.training.state import TrainedParams
from instep.training.step import snapshot_reference, sync_average


def test_offloaded_masters_step_alike():
    """On one device nothing moves; what is stepped is a copy, and the network follows it."""
    torch.manual_seed(0)
    one, two = (nn.Parameter(torch.ones(5).to(BF16)) for _ in range(2))
    here, there = TrainedParams({"p": one}, AdamWConfig(1e-3), 0.9), TrainedParams({"p": two}, AdamWConfig(1e-3), 0.9, host=True)
    for _ in range(3):
        g = torch.randn(5)
        for p, trained in ((one, here), (two, there)):
            (p * g.to(BF16)).sum().backward()
            trained.settle(bool(trained.step(1e-3)[1]))
    assert torch.equal(one, two) and torch.equal(here.masters["p"], there.masters["p"]) and there.masters["p"].device.type == "cpu"


NETWORKS = ("dmd2", "dm-align-group", "dollar", "flow-dpo", "magic")
ALTERNATING = [(name, (None, 4)[i % 2]) for i, name in enumerate(NETWORKS)]


@pytest.mark.parametrize(("name", "rank"), slow_but(ALTERNATING, product(NETWORKS, (None, 4))))
def test_offloaded_networks_compute_the_same(name, rank, monkeypatch):
    """Networks that take turns on a poisoned device, with every pass computed again for its gradient: the same weights after two iterations of every stage."""
    monkeypatch.setattr("instep.training.build.Residency", Poisoned)
    after = []
    for offload in (False, True):
        execution = Execution(offload=offload)
        placed = execution.place(family())
        recipe = small(name, lora_rank=rank)
        state = state_of(recipe, placed, execution)
        source = batches_of(placed)
        run_stages(recipe, state, source)
        run_stages(recipe, state, source)
        after.append({f"{role}.{key}": p for role, trained in state.trained.items() for key, p in trained.state().items()})
    assert after[0].keys() == after[1].keys() and all(torch.equal(p, after[1][key]) for key, p in after[0].items())


@pytest.mark.parametrize("role", ["reference", "average"])
def test_weights_that_are_not_trained_are_written_at_home(role, monkeypatch):
    """A frozen copy that is on the device while the student is copied into it: it has the student's weights there the next time."""
    monkeypatch.setattr("instep.training.build.Residency", Poisoned)
    import every_recipe

    name = {"reference": "flow-dpo", "average": "dollar"}[role]
    monkeypatch.setattr(every_recipe, "STAGES", {**every_recipe.STAGES, "dollar": {**every_recipe.STAGES["dollar"], "target": "average"}})
    execution = Execution(offload=True)
    placed = execution.place(family())
    recipe = small(name)
    stage = next(stage for stage in recipe.stages if role in stage.needs)
    state = state_of(recipe, placed, execution)
    network = state.roles[role].backbone
    network.residency.use(network.module)
    student = state.trained["student"]
    with torch.no_grad():
        for key, p in student.masters.items():
            p.add_(1)
            if student.ema is not None:
                student.ema[key].copy_(p)
    student.round()
    (snapshot_reference if role == "reference" else sync_average)(state, stage)
    network.residency.clear()
    network.residency.use(network.module)
    assert all(torch.equal(p, student.masters[key]) for key, p in network.module.named_parameters())


@pytest.mark.parametrize("rank", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_an_offloaded_run_is_the_run_without(rank, tmp_path, monkeypatch):
    """A whole run on the poisoned device: probes, checkpoints, an interruption and its continuation, and the export."""
    from safetensors.torch import load_file
    from test_run import interrupted_before

    recipe, done = small("dm-align-group", lora_rank=rank), {}
    for offload in (False, True):
        out = tmp_path / str(offload)
        options = RunOptions(save_every=1, probe_every=1, teacher_samples=4, execution=Execution(offload=offload))
        with monkeypatch.context() as patch:
            patch.setattr("instep.training.build.Residency", Poisoned)
            if offload:
                with interrupted_before(1):
                    train(recipe, family(), out=out, prompts=PROMPTS, reward=REWARD, options=options)
            done[offload] = train(recipe, family(), out=out, prompts=PROMPTS, reward=REWARD, options=options)
    here, there = done[False], done[True]
    timeless = [[{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows(each.out)] for each in (here, there)]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 3 and any(key.startswith("probe/") for key in timeless[0][-1])
    for file in sorted(here.student.rglob("*.safetensors")):
        mine, theirs = load_file(file), load_file(there.student / file.relative_to(here.student))
        assert mine.keys() == theirs.keys() and all(torch.equal(x, theirs[key]) for key, x in mine.items()), file.name
    for role, trained in here.state.trained.items():
        assert all(torch.equal(p, there.state.trained[role].state()[key]) for key, p in trained.state().items()), role


def test_one_network_is_on_the_device_at_a_time(monkeypatch):
    trained, frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    home = {id(net): net.weight.data for net in (trained, frozen)}
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: self.clone())
    residency = Residency(torch.device("cpu"))
    residency.use(trained)
    there = trained.weight.data
    assert there.data_ptr() != home[id(trained)].data_ptr()
    with torch.no_grad():
        trained.weight += 1
    residency.use(trained)
    assert trained.weight.data_ptr() == there.data_ptr(), "it stays while it is used"
    residency.use(frozen)
    assert trained.weight.data_ptr() == home[id(trained)].data_ptr() and torch.equal(trained.weight, there), "an update goes home too"
    assert frozen.weight.data_ptr() != home[id(frozen)].data_ptr()
    residency.clear()
    assert frozen.weight.data_ptr() == home[id(frozen)].data_ptr()
