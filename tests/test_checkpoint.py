"""Checkpoints: bit-exact, and whole whatever happens while one is written."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from instep.training import checkpoint, state_files

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64]


def state_of(number: int) -> dict:
    x = torch.full((1000,), float(number))
    return {"a": x, "b": {"c": x + 1, "n": number}, "list": [number, "text", None]}


def is_state_of(state: dict, number: int) -> bool:
    want = state_of(number)
    same = torch.equal(state["a"], want["a"]) and torch.equal(state["b"]["c"], want["b"]["c"])
    return same and state["b"]["n"] == number and state["list"] == want["list"]


def bits(x: torch.Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_value_comes_back_bit_for_bit(tmp_path):
    tensors = {str(dtype): torch.randn(3, 5).to(dtype) for dtype in DTYPES}
    tensors |= {"nan": torch.tensor([torch.nan, -torch.inf, -0.0]), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "odd": torch.ones(7).byte()}
    tensors |= {"strided": torch.arange(12.0).reshape(3, 4).t(), "expanded": torch.ones(1, 3).expand(4, 3), "grad": torch.ones(2, requires_grad=True)}
    values = {"float": 0.1 + 0.2, "big": 2**70, "yes": True, "none": None, "tuple": (1, (2.0, "x")), "list": [], "dict": {}, "nan": float("nan")}
    path = checkpoint.save(tmp_path, 7, {"t.with/dots": tensors, "v": values, "mixed": ({"x": torch.ones(1)}, 3)}, keep=1)
    back = checkpoint.load(path)
    assert back["t.with/dots"].keys() == tensors.keys()
    for name, x in tensors.items():
        y = back["t.with/dots"][name]
        assert y.dtype == x.dtype and y.shape == x.shape and bits(y) == bits(x.detach()), name
    assert repr(back["v"]) == repr(values)
    assert isinstance(back["mixed"], tuple) and torch.equal(back["mixed"][0]["x"], torch.ones(1))
    assert not any(b"pickle" in file.read_bytes() for file in path.iterdir())
    assert len(load_file(path / "tensors.safetensors")) == len(tensors) + 1, "the safetensors package reads what we write"


def test_a_tensor_at_two_places_is_stored_once_and_overlaps_are_kept_apart(tmp_path):
    x = torch.arange(1000.0)
    path = checkpoint.save(tmp_path, 1, {"tied": x, "head": {"tied": x}, "slice": x[:10], "other": x.clone()}, keep=1)
    back = checkpoint.load(path)
    assert back["tied"] is back["head"]["tied"] and back["tied"] is not back["other"]
    assert torch.equal(back["slice"], x[:10]) and torch.equal(back["other"], x)
    assert (path / "tensors.safetensors").stat().st_size < 2.2 * 4000


def test_what_cannot_be_stored_is_named_and_leaves_nothing(tmp_path):
    for bad, message in [
        ({"a": {"b": {1, 2}}}, "state: 'a/b' is a set"),
        ({"a": [1, np.float64(2.0)]}, "state: 'a/1' is a float64"),
        ({"a": {3: 1}}, "state: key 3 at 'a' is not allowed"),
        ({"x": torch.ones(2, 2).to_sparse()}, "state: 'x' is a torch.sparse_coo tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            checkpoint.save(tmp_path, 1, bad, keep=1)
    with pytest.raises(ValueError, match="keep: 0 is not allowed"):
        checkpoint.save(tmp_path, 1, {}, keep=0)
    assert not list(tmp_path.iterdir())


def test_pruning_keeps_the_newest_and_the_protected(tmp_path):
    for step in (2, 4, 6, 999_999, 1_000_000):
        checkpoint.save(tmp_path, step, state_of(step), keep=2, protect=(4,))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-1000000", "step-999999"]
    assert checkpoint.latest(tmp_path).name == "step-1000000", "by number, not by name"
    assert is_state_of(checkpoint.load(checkpoint.at(tmp_path, 4)), 4) and checkpoint.at(tmp_path, 5) is None


class Killed(BaseException):
    """Stands for the process's end: no handler of errors may see it as one of its own."""


PLACES = {
    "while tensors are written": (state_files, "write_tensors"),
    "while the state is written": (checkpoint, "_write"),
    "at any flush": (os, "fsync"),
    "at the rename": (os, "replace"),
    "while old ones are removed": (checkpoint, "_prune"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("same_step", [False, True])
def test_an_end_anywhere_leaves_a_whole_checkpoint(tmp_path, monkeypatch, place, same_step):
    """The n-th call of every file operation fails, for every n: what is there afterwards is the old state or the new, never less."""
    module, name = PLACES[place]
    if module is state_files:
        module = checkpoint  # the name as checkpoint imported it
    step, n, failed = 5 if same_step else 6, 0, True
    while failed:
        folder = tmp_path / str(n)
        checkpoint.save(folder, 5, state_of(5), keep=1)
        real, calls, failed = getattr(module, name), [], False

        def dies(*args, real=real, calls=calls, n=n, **kwargs):
            calls.append(1)
            if len(calls) == n + 1:
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, dies)
            try:
                checkpoint.save(folder, step, state_of(60), keep=1)
            except Killed:
                failed = True
        state = checkpoint.load(checkpoint.latest(folder))
        assert is_state_of(state, 5) or is_state_of(state, 60), f"call {n}"
        assert failed or is_state_of(state, 60)
        checkpoint.save(folder, 7, state_of(7), keep=1)
        assert [p.name for p in folder.iterdir()] == ["step-000007"], "what was left over is gone"
        n += 1
    assert n > 1, "the failure was never reached"


def test_killed_between_the_two_renames_of_a_replacement(tmp_path):
    """No handler runs at SIGKILL: the folder as it is at that instant."""
    path = checkpoint.save(tmp_path, 5, state_of(5), keep=1)
    os.replace(path, tmp_path / ".step-000005.replaced")
    assert is_state_of(checkpoint.load(checkpoint.latest(tmp_path)), 5)


@pytest.mark.parametrize("place", ["tensors.safetensors", "state.json"])
def test_a_full_disk_says_so_and_loses_nothing(tmp_path, monkeypatch, place):
    checkpoint.save(tmp_path, 1, state_of(1), keep=2)
    real = open

    class Full:
        def __init__(self, path, mode):
            self.path, self.file = path, real(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

        def write(self, data):
            if self.path.name == place:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        patch.setattr(state_files, "open", Full, raising=False)
        with pytest.raises(OSError, match="the disk is full.*step-000002 was not written") as caught:
            checkpoint.save(tmp_path, 2, state_of(2), keep=2)
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"] and is_state_of(checkpoint.load(checkpoint.latest(tmp_path)), 1)


@pytest.mark.parametrize("damage", ["cut", "bit", "no tensors", "no state", "half a state"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, damage):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state_of(step), keep=2)
    tensors, state = tmp_path / "step-000002" / "tensors.safetensors", tmp_path / "step-000002" / "state.json"
    data = bytearray(tensors.read_bytes())
    if damage == "cut":
        tensors.write_bytes(data[:-3])
    elif damage == "bit":
        data[-100] ^= 1
        tensors.write_bytes(data)
    elif damage == "half a state":
        state.write_text(state.read_text()[:40])
    else:
        (tensors if damage == "no tensors" else state).unlink()
    with pytest.warns(RuntimeWarning, match="step-000002 is damaged .* passed over"):
        assert checkpoint.latest(tmp_path).name == "step-000001"
    checkpoint.save(tmp_path, 2, state_of(2), keep=2)
    assert checkpoint.latest(tmp_path).name == "step-000002", "and is replaced when its step comes again"


def test_only_damaged_checkpoints_are_not_a_fresh_start(tmp_path):
    """Neither used nor taken for nothing; the message names each, what is wrong with it, and what to do."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (1, 2):
        checkpoint.save(folder, step, state_of(step), keep=2)
    (folder / "step-000002" / "state.json").write_text("{")
    tensors = folder / "step-000001" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with warnings.catch_warnings(), pytest.raises(ValueError) as caught:
        warnings.simplefilter("error")
        checkpoint.latest(folder)
    said = str(caught.value)
    assert f"{folder} holds 2 and none is whole" in said and f"remove {folder.parent} or choose another --out" in said
    assert "step-000002: JSONDecodeError" in said and "step-000001: its tensors do not match their checksum" in said
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.warns(RuntimeWarning, match="step-000001 is damaged"):
        assert checkpoint.at(folder, 1) is None


def test_nothing_is_there_yet(tmp_path):
    assert checkpoint.latest(tmp_path / "never") is None


CHILD = """
import sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_checkpoint import checkpoint, state_of
folder = Path({folder!r})
while True:
    newest = checkpoint.latest(folder)
    step = checkpoint.step_of(newest) + 1 if newest else 1
    print(step, flush=True)
    for s in range(step, step + 10_000):
        checkpoint.save(folder, s, state_of(s), keep=2)
"""


def test_kill_9_while_saving(tmp_path):
    """SIGKILL at random moments of a process that does nothing but save: the newest checkpoint is always whole, and never goes back."""
    rng, code, before = random.Random(0), CHILD.format(tests=os.path.dirname(__file__), folder=str(tmp_path / "c")), 0
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert child.stdout.readline()
        for _ in range(3):
            time.sleep(rng.random() * 0.2)
            if child.poll() is None:
                child.send_signal(signal.SIGSTOP)  # the state of the disk at any instant, as a reader sees it
                newest = checkpoint.latest(tmp_path / "c")
                if newest is not None:
                    assert is_state_of(checkpoint.load(newest), checkpoint.step_of(newest))
                child.send_signal(signal.SIGCONT)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        newest = checkpoint.latest(tmp_path / "c")
        assert newest is not None and is_state_of(checkpoint.load(newest), checkpoint.step_of(newest))
        assert checkpoint.step_of(newest) >= before
        before = checkpoint.step_of(newest)
    assert before > 4


def optimizers(p: list[torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    groups = [{"params": p[:1], "lr": 0.1}, {"params": p[1:], "lr": 0.02, "weight_decay": 0.1}]
    made = [torch.optim.AdamW(groups, betas=(0.5, 0.9), fused=True), torch.optim.AdamW(groups, amsgrad=True), torch.optim.SGD(groups, momentum=0.9)]
    return [*made, torch.optim.Muon(groups, ns_coefficients=(3.0, -4.0, 2.0))] if hasattr(torch.optim, "Muon") else made


@pytest.mark.parametrize("kind", range(4))
def test_an_optimiser_goes_on_exactly(tmp_path, kind):
    def parameters():
        rng = torch.Generator().manual_seed(1)
        return [torch.nn.Parameter(torch.randn(4, 6, generator=rng)) for _ in range(3)]

    def run(p, optimizer, steps):
        for step in steps:
            for i, x in enumerate(p[:2]):  # the third never gets a gradient, and hence has no state
                x.grad = torch.sin(torch.arange(24.0).reshape(4, 6) * (i + step))
            optimizer.param_groups[0]["lr"] *= 0.7
            optimizer.step()

    p = parameters()
    first = optimizers(p)[kind]
    run(p, first, range(3))
    path = checkpoint.save(tmp_path, 3, {"p": [x.detach() for x in p], "optim": checkpoint.optimizer_state(first)}, keep=1)
    saved = checkpoint.load(path)
    q = [torch.nn.Parameter(x) for x in saved["p"]]
    second = optimizers(q)[kind]
    checkpoint.load_optimizer_state(second, saved["optim"])
    assert repr(second.state_dict()["param_groups"]) == repr(first.state_dict()["param_groups"]), "numbers, tuples and all"
    run(p, first, range(3, 6))
    run(q, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(p, q, strict=True))


def test_an_optimiser_of_another_recipe_is_refused():
    saved = checkpoint.optimizer_state(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]))
    two = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(2))]}, {"params": [torch.nn.Parameter(torch.ones(2))]}])
    with pytest.raises(ValueError, match="holds 1 parameter groups and this optimiser has 2"):
        checkpoint.load_optimizer_state(two, saved)
    x = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([x])
    x.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(ValueError, match="state of parameter 0 does not fit"):
        checkpoint.load_optimizer_state(torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]), checkpoint.optimizer_state(optimizer))


def test_every_source_of_randomness_goes_on(tmp_path):
    run = torch.Generator().manual_seed(5)

    def draw():
        return [torch.randn(3, generator=run).tolist(), torch.randn(3).tolist(), np.random.randn(3).tolist(), [random.gauss(0, 1) for _ in range(3)]]

    random.gauss(0, 1)  # leaves half of a pair behind, which belongs to the state
    np.random.randn()
    path = checkpoint.save(tmp_path, 1, {"rng": checkpoint.rng_state(run)}, keep=1)
    want = draw()
    assert draw() != want
    checkpoint.restore_rng(run, checkpoint.load(path)["rng"])
    assert draw() == want


def test_state_json_is_json(tmp_path):
    path = checkpoint.save(tmp_path, 3, state_of(3), keep=1)
    record = json.loads((path / "state.json").read_text())
    assert record["step"] == 3 and len(record["sha256"]) == 64
