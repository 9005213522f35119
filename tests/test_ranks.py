"""Several processes compute what one does: samples, gradients, statistics and weights are those of the same global batch in one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import every_recipe
import many_ranks
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from instep.core.ranks import ALONE, Ranks, joined
from instep.models.context import check_context
from instep.planning.plan import Machine, plan
from instep.training import checkpoint
from instep.training.checks import check_ranks
from instep.training.execution import Execution

# what CI has time for: each statistic of a batch; of sharded networks full copies and adapters, with and without computing blocks and rows again, one and two
# experts
LABORATORY = ("lab/dmd2", "lab/dm-align-group/two", "lab/amd", "lab/dmdr", "lab/dollar", "lab/flow-grpo", "lab/apo", "lab/refl/two/nan")
SHARDED = ("wan/dm-align-group/shard/rows", "wan/dmd2/shard/lora/rows", "wan22/dm-align-group/shard")
QUICK = (*LABORATORY, "wan/dm-align-group", *SHARDED)


def spawned(folder: Path, count: int, cases: Sequence[str], script: str = many_ranks.__file__) -> list[dict[str, Tensor]]:
    """The results of `count` processes, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = folder / f"of-{count}"
    started = []
    for rank in range(count):
        there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{key: str(value) for key, value in there.items()}, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment["TORCH_DISTRIBUTED_DEBUG"] = "INFO"  # calls of sharded networks are guarded
        started.append(subprocess.Popen([sys.executable, script, str(file), *cases], env=environment))
    try:
        assert [process.wait(timeout=3600) for process in started] == [0] * count
    finally:
        for process in started:
            process.kill()
    return [load_file(f"{file}-{rank}.safetensors") for rank in range(count)]


def check(case: str, found: Sequence[Mapping[str, Tensor]]) -> None:
    alone = many_ranks.results(case, ALONE)
    assert any(key.startswith("student/") for key in alone)
    for rank, results in enumerate(found):
        mine = results_of(case, results)
        sent = mine.pop(many_ranks.COLLECTIVES)
        assert len(sent) and torch.equal(sent, found[0][f"{case}|{many_ranks.COLLECTIVES}"]), "all ranks send the same"
        check_equal(mine, alone, case, f"of rank {rank}")


def results_of(case: str, results: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.partition("|")[2]: x for key, x in results.items() if key.startswith(f"{case}|")}


def check_equal(mine: Mapping[str, Tensor], alone: Mapping[str, Tensor], case: str, whose: str) -> None:
    # networks in double precision have more sums
    rtol, atol = (1e-10, 1e-12) if case.startswith("lab/") else (1e-9, 1e-11)
    assert mine.keys() == alone.keys()
    for key, x in alone.items():
        torch.testing.assert_close(mine[key], x, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text, key=key: f"{case}: {key} {whose}: {text}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder) -> list[dict[str, Tensor]]:
    return spawned(folder, 2, (*QUICK, many_ranks.GUARD, many_ranks.SHARDED_RUN, many_ranks.RUN))


@pytest.mark.parametrize("case", QUICK)
def test_two_processes_compute_what_one_does(case, two):
    check(case, two)


def test_a_signal_to_one_process_saves_the_run_which_goes_on_in_one(folder, two, tmp_path):
    """One log, one checkpoint and one message; and the weights that one process reaches alone."""
    out, newest = folder / "of-2-run", many_ranks.STOPS_AT
    assert f"SIGTERM: saved at step {newest} of" in (folder / "of-2-1.stopped").read_text(encoding="utf-8")
    assert (folder / "of-2-0.stopped").is_file() and not (out / ".lock").exists()
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()] == [*range(newest + 1)]
    together, alone = many_ranks.run(out), many_ranks.run(tmp_path / "alone")
    assert together.state.hold.multiplier == pytest.approx(alone.state.hold.multiplier, rel=1e-4), "as close as the weights below"
    assert "diversity" in together.state.hold.start
    assert together.state.step == alone.state.step == many_ranks.STEPS and together.student is not None and together.student.is_dir()
    for name, trained in alone.state.trained.items():
        for key, x in trained.state().items():
            torch.testing.assert_close(together.state.trained[name].state()[key], x, rtol=2e-4, atol=2e-6)
    source = checkpoint.load(checkpoint.latest(out / "checkpoints"))["source"]
    assert source == checkpoint.load(checkpoint.latest(tmp_path / "alone" / "checkpoints"))["source"]


def test_a_call_of_another_network_is_an_error(folder, two):
    """Two networks of equal shape, each called by one process: without the guard the numbers are wrong and nothing is raised."""
    for rank in range(2):
        found = (folder / f"of-2-{rank}.guard").read_text(encoding="utf-8")
        for other, name in enumerate(("teacher (network pretrained)", "fake (network fake)")):
            assert f"rank {other}: {name}, 2 rows, without a graph" in found


def test_a_sharded_run_leaves_what_one_process_leaves(folder, two, tmp_path):
    """Rank 0 leads in probes, checkpoints and the export; one process goes on from its checkpoint."""
    out, alone = folder / "of-2-shard", tmp_path / "alone"
    many_ranks.run(alone)
    theirs, ours = (checkpoint.load(checkpoint.latest(one / "checkpoints")) for one in (out, alone))
    assert theirs["step"] == ours["step"] == many_ranks.STEPS
    for part in ("roles", "ema"):
        for name, tensors in ours[part].items():
            for key, x in tensors.items():
                torch.testing.assert_close(theirs[part][name][key], x, rtol=2e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
    for name, optim in ours["optim"].items():
        assert {n: {k: x.shape for k, x in each.items()} for n, each in theirs["optim"][name]["state"].items()} == {
            n: {k: x.shape for k, x in each.items()} for n, each in optim["state"].items()
        }
    rows = [[json.loads(line) for line in (one / "log.jsonl").read_text(encoding="utf-8").splitlines()] for one in (out, alone)]
    for mine, other in zip(*rows, strict=True):
        probed = [key for key in other if key.startswith("probe/")]
        assert mine.keys() == other.keys() and [mine[key] for key in probed] == pytest.approx([other[key] for key in probed], abs=1e-4)
    first, second = (load_file(one / "student" / "transformer" / "diffusion_pytorch_model.safetensors") for one in (out, alone))
    assert first.keys() == second.keys() and all(x.dtype == second[key].dtype and x.shape == second[key].shape for key, x in first.items())
    # the export has the averages, and the run goes on with the weights
    average = ours["ema"]["student"]["proj_out.weight"]
    assert (first["proj_out.weight"] - average).abs().max() < 1e-5 < (average - ours["roles"]["student"]["proj_out.weight"]).abs().max()


def test_full_copies_of_large_networks_are_sharded_by_default(monkeypatch):
    family, two = every_recipe.family(), Ranks(0, 2, 2)
    copies, adapters = every_recipe.small("dmd2"), every_recipe.small("dmd2", lora_rank=2)
    assert not Execution().shards(copies, family, two) and Execution(shard="on").shards(adapters, family, two)
    monkeypatch.setattr("instep.training.execution.LARGE", 0)
    assert Execution().shards(copies, family, two) and not Execution().shards(adapters, family, two)
    assert not Execution().shards(copies, family, ALONE) and not Execution(shard="off").shards(copies, family, two)
    assert not Execution(offload=True).shards(copies, family, two)
    with pytest.raises(ValueError, match="shard: on is not allowed together with offload"):
        Execution(shard="on", offload=True)
    with pytest.raises(ValueError, match="shard: 'yes' is not allowed; allowed: auto, on, off"):
        Execution(shard="yes")


def test_samples_that_processes_cannot_divide_are_refused():
    check_context(many_ranks.MODELS["even"](), 2)
    with pytest.raises(ValueError, match="context_parallel: 2 is not allowed; the transformer of tiny has 27 tokens of a sample; give a number"):
        check_context(every_recipe.family(), 2)
    with pytest.raises(ValueError, match="context_parallel: 3 is not allowed; the transformer of tiny has 2 heads"):
        check_context(every_recipe.family(), 3)
    with pytest.raises(ValueError, match="context_parallel: 2 is not allowed; the samples of tiny are not divided"):
        check_context(many_ranks.MODELS["sd3"](), 2)
    with pytest.raises(ValueError, match="context_parallel: 2 is not allowed for 1 process; give a divisor"), joined(context=2):
        pass
    with pytest.raises(ValueError, match="context_parallel: 2 is not allowed together with offload"):
        Execution(offload=True, context_parallel=2)
    with pytest.raises(ValueError, match="context_parallel: 2 is not planned for"):
        plan(every_recipe.small("dmd2"), every_recipe.family(), Execution(context_parallel=2), Machine(1.0, 1.0))
    four = Ranks(3, 4, 4, context=2)
    assert (four.part, four.parts, four.share(8)) == (1, 2, slice(4, 8))


def test_a_batch_that_processes_cannot_share_is_refused():
    recipe = every_recipe.small("dm-align-group")
    check_ranks(recipe, 2)
    with pytest.raises(ValueError, match="4 samples in groups of 2 are 2 groups .* 4 processes .* a multiple of 8 samples"):
        check_ranks(recipe, 4)
    one_group = every_recipe.small("flow-grpo", batch=2)
    check_ranks(one_group, 1)
    with pytest.raises(ValueError, match="2 samples in groups of 2 are 1 groups .* 2 processes .* a multiple of 4 samples"):
        check_ranks(one_group, 2)


@pytest.mark.slow
def test_every_recipe_on_several_processes(tmp_path):
    """The number and the sizes of collectives do not depend on the number of processes."""
    both = [case for case in many_ranks.FOUR if case not in many_ranks.CASES]
    two, four = spawned(tmp_path, 2, (*many_ranks.CASES, *both)), spawned(tmp_path, 4, many_ranks.FOUR)
    wrong = [text for cases, found in ((many_ranks.CASES, two), (many_ranks.FOUR, four)) for case in cases if (text := fault(case, found))]
    assert not wrong, "\n".join(wrong)
    # rows a few at a time are as many calls as a process has rows
    for case in (case for case in many_ranks.FOUR if not {"rows", "context"} & set(case.split("/"))):
        sent, wanted = (found[0][f"{case}|{many_ranks.COLLECTIVES}"] for found in (four, two))
        assert torch.equal(sent, wanted) if case.startswith("lab/") else len(sent) == len(wanted), f"{case}: sizes of shards have padding"


def fault(case: str, found: Sequence[Mapping[str, Tensor]]) -> str:
    """What is wrong with the results of several processes; empty: nothing."""
    try:
        check(case, found)
    except AssertionError as error:
        return f"{case}: {error}"
    return ""


@pytest.mark.slow
def test_each_statistic_is_that_of_all_processes(tmp_path):
    """Each process's own, in its place, gives other results: the cases that CI compares with one process would show it."""
    (found, _) = spawned(tmp_path, 2, tuple(many_ranks.STATISTICS))
    for statistic, (case, *_) in many_ranks.STATISTICS.items():
        with pytest.raises(AssertionError):
            check_equal(results_of(statistic, found), many_ranks.results(case, ALONE), case, statistic)


@pytest.mark.slow
def test_a_sharded_network_has_the_precision_of_one_device(tmp_path):
    """In bfloat16: gradients near zero are rounding, so steps of AdamW are compared by their distance."""
    (found, _), case = spawned(tmp_path, 2, [many_ranks.SHARDED_BFLOAT16]), many_ranks.SHARDED_BFLOAT16
    alone = many_ranks.results(case, ALONE)
    start = every_recipe.state_of(every_recipe.small("dm-align-group"), every_recipe.family(), Execution(device="cpu"))
    apart, moved = 0.0, 0.0
    for key, x in alone.items():
        if key.startswith("student/") and key.removeprefix("student/") in (before := start.trained["student"].state()):
            assert found[f"{case}|{key}"].dtype == torch.float64
            apart += float((found[f"{case}|{key}"] - x).square().sum())
            moved += float((before[key.removeprefix("student/")].double() - x).square().sum())
    assert 0 < apart**0.5 < 0.2 * moved**0.5


@pytest.mark.slow
def test_a_run_whose_samples_are_divided_leaves_what_one_process_leaves(tmp_path):
    """Rank 0 probes and exports with whole samples."""
    spawned(tmp_path, 2, [many_ranks.CONTEXT_RUN])
    out, alone = tmp_path / "of-2-context", tmp_path / "alone"
    many_ranks.run(alone, model="even")
    theirs, ours, before = (checkpoint.load(checkpoint.at(one / "checkpoints", step)) for one, step in ((out, 4), (alone, 4), (alone, 3)))
    for name in ours["roles"]:
        assert _apart(theirs, ours, name) < 0.02 * _apart(before, ours, name)
    assert (out / "student" / "instep_export.json").is_file()


@pytest.mark.slow
def test_a_sharded_run_begins_from_another_one(tmp_path):
    """With its weights, moments and averages, as one process does."""
    spawned(tmp_path, 2, [many_ranks.STARTED_RUN])
    first, out, alone = tmp_path / "of-2-first", tmp_path / "of-2-started", tmp_path / "alone"
    many_ranks.run(alone, start_from=first)
    before, theirs, ours = (checkpoint.load(checkpoint.latest(one / "checkpoints")) for one in (first, out, alone))
    assert theirs["step"] == ours["step"] == many_ranks.STEPS and theirs["steps"]["student"] == 2 * many_ranks.STEPS
    for name in ours["roles"]:
        assert _apart(theirs, ours, name) < 0.02 * _apart(before, ours, name)


REWARD = """
import os, signal

scored = []


def brightness(media, prompts):
    scored.append(len(media))
    if len(scored) == 4 and os.environ.get("DIES") and os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return media.flatten(1).mean(1)
"""


def launched(folder: Path, out: Path, count: int, **environment: str) -> subprocess.CompletedProcess:
    """`instep train` by torchrun in `count` processes; in one without torchrun."""
    options = "--model digits --steps 2 --batch 4 --group 2 --top-n 1 --distil 0 --iterations 4 --critic-updates 1 --save-every 1 --probe-every 9"
    run = ["-m", "instep", "train", "dm-align-group", *options.split(), "--no-evaluate", "--reward", "brightness_of:brightness", "--out", str(out)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    there = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *launcher, *run], cwd=folder, env=there, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_process_ends_all_and_the_same_command_goes_on_in_any_number(count, tmp_path):
    (tmp_path / "brightness_of.py").write_text(REWARD, encoding="utf-8")
    out = tmp_path / "run"
    killed = launched(tmp_path, out, 2, DIES="1")
    assert killed.returncode != 0 and killed.stderr.count("error: ") <= 1, killed.stderr
    left = checkpoint.latest(out / "checkpoints")
    assert left is not None and checkpoint.step_of(left) < 4 and not (out / "student").exists()
    resumed, alone = launched(tmp_path, out, count), launched(tmp_path, tmp_path / "alone", 1)
    assert resumed.returncode == alone.returncode == 0, resumed.stderr + alone.stderr
    one, other = (checkpoint.load(checkpoint.latest(folder / "checkpoints")) for folder in (out, tmp_path / "alone"))
    before = checkpoint.load(checkpoint.at(tmp_path / "alone" / "checkpoints", 3))
    assert one["step"] == other["step"] == 4 and (out / "student" / "instep_export.json").is_file()
    for name in other["roles"]:
        # AdamW turns the rounding of gradients near zero into steps
        assert _apart(one, other, name) < 0.02 * _apart(before, other, name)


def _apart(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> float:
    """The distance between a role's weights in two checkpoints."""
    return sum(float((x.double() - one["roles"][name][key].double()).square().sum()) for key, x in other["roles"][name].items()) ** 0.5
