"""AdamW with moments in 8 bit: what is stored, exact resume, what is refused, what is planned. Without torchao only the refusal is tested."""

from __future__ import annotations

import importlib.util
import json
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from test_run import PROMPTS
from tiny import FRAMES, HEIGHT, WIDTH, tiny_wan_pipeline

from instep.core.size import Size
from instep.methods.role_config import AdamWConfig
from instep.models.wan import WanFamily
from instep.planning.plan import Machine, iterations
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.training import checkpoint, low_bit
from instep.training.execution import Execution
from instep.training.manifest import write_manifest
from instep.training.options import RunOptions
from instep.training.run import train
from instep.training.state import TrainedParams

torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is an extra")
CONFIG = AdamWConfig(1e-2, betas=(0.5, 0.9), weight_decay=0.1)


@pytest.fixture(autouse=True)
def eager():
    """torchao's step compiled would take seconds a shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("recorded", ["8bit", "float32", None])
def test_a_run_goes_on_with_its_own_moments(tmp_path, recorded):
    """A folder from before moments were recorded is taken; its checkpoint is compared."""
    recipe, model, options = dmd2(Common(steps=2, batch=2), iterations=1), family(), RunOptions(execution=Execution("cpu"))
    again = partial(write_manifest, tmp_path / "run", recipe, model, options, PROMPTS, None, "train")
    again()
    file = tmp_path / "run" / "recipe.json"
    record = json.loads(file.read_text())
    assert record.pop("moments") == "float32"
    file.write_text(json.dumps(record | ({"moments": recorded} if recorded else {})))
    (tmp_path / "run" / "log.jsonl").touch()
    other = "holds another run .its moments: 8bit there, float32 now.; to go on with it give moments 8bit .--moments 8bit., or choose another folder"
    with pytest.raises(ValueError, match=other) if recorded == "8bit" else nullcontext():
        again()


def params(seed: int = 0) -> TrainedParams:
    rng = torch.Generator().manual_seed(seed)
    return TrainedParams(
        {name: torch.nn.Parameter(torch.randn(shape, generator=rng)) for name, shape in {"a": (64, 64), "b": (16, 512), "c": (7,), "d": (4100,)}.items()},
        CONFIG,
        low_bit=True,
    )


def go_on(trained: TrainedParams, first: int, last: int, scale: float = 1.0) -> None:
    for step in range(first, last):
        rng = torch.Generator().manual_seed(step)
        for p in trained.parameters.values():
            p.grad = scale * torch.randn(p.shape, generator=rng)
        trained.settle(bool(trained.step(1e-2 / (1 + step))[1]))


def test_without_torchao_it_is_refused_before_anything(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"moments: 8bit needs torchao, .*pip install 'instep\[lowbit\]'"):
        Execution(moments="8bit")
    with pytest.raises(ValueError, match="moments: '4bit' is not allowed; allowed: float32, 8bit"):
        Execution(moments="4bit")  # type: ignore[arg-type]


@torchao
def test_moments_take_a_byte_a_number_and_follow_adamw():
    """Against AdamW written out in float64, whose moments are not rounded."""
    trained = params()
    plain = {name: p.detach().double() for name, p in trained.parameters.items()}
    m, v = ({name: torch.zeros_like(p) for name, p in plain.items()} for _ in range(2))
    for step in range(5):
        rng = torch.Generator().manual_seed(step)
        gradients = {name: torch.randn(p.shape, generator=rng).double() for name, p in trained.parameters.items()}
        factor = min(1.0, CONFIG.clip / torch.cat([g.flatten() for g in gradients.values()]).norm().item())
        lr = 1e-2 / (1 + step)
        for name, g in gradients.items():
            m[name] = 0.5 * m[name] + 0.5 * factor * g
            v[name] = 0.9 * v[name] + 0.1 * (factor * g) ** 2
            step_size = (m[name] / (1 - 0.5 ** (step + 1))) / ((v[name] / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
            plain[name] = plain[name] * (1 - 0.1 * lr) - lr * step_size
    go_on(trained, 0, 5)
    moved = 1e-2 * sum(1 / (1 + step) for step in range(5))
    for name, p in trained.parameters.items():
        error = float((p.detach().double() - plain[name]).abs().mean())
        assert error < (0.03 if name in "ab" else 1e-5) * moved, name
        parts = low_bit.parts_of(trained.optimizer.state[p]["exp_avg"])
        assert (parts is not None) == (name in "ab") == low_bit.in_8_bit(p)
        if parts is not None:
            assert parts["codes"].dtype == torch.uint8 and parts["codes"].shape == p.shape and parts["scale"].numel() == p.numel() // low_bit.BLOCK


@torchao
def test_a_checkpoint_holds_plain_tensors_and_resumes_exactly(tmp_path):
    whole, first, second = params(), params(), params(1)
    go_on(whole, 0, 6)
    go_on(first, 0, 3)
    path = checkpoint.save(tmp_path, 3, {"p": first.state(), "o": checkpoint.optimizer_state(first.optimizer)}, keep=1)
    saved = checkpoint.load(path)
    assert saved["o"]["state"]["0"]["exp_avg"]["codes"].dtype == torch.uint8 and set(saved["o"]["state"]["0"]["exp_avg_sq"]) == set(low_bit.PARTS)
    second.load_state(saved["p"])
    checkpoint.load_optimizer_state(second.optimizer, saved["o"])
    go_on(second, 3, 6)
    assert all(torch.equal(p, second.parameters[name]) for name, p in whole.parameters.items())
    state = checkpoint.optimizer_state(whole.optimizer)["state"], checkpoint.optimizer_state(second.optimizer)["state"]
    assert all(torch.equal(state[0][i]["exp_avg"]["codes"], state[1][i]["exp_avg"]["codes"]) for i in ("0", "1"))


@torchao
def test_other_moments_are_refused_and_a_step_that_is_not_finite_changes_nothing():
    low, other = params(), TrainedParams(dict(params().parameters), CONFIG)
    go_on(low, 0, 2)
    go_on(other, 0, 2)
    with pytest.raises(ValueError, match="the checkpoint's are in 8bit and this run's in float32; give --moments 8bit"):
        checkpoint.load_optimizer_state(other.optimizer, checkpoint.optimizer_state(low.optimizer))
    with pytest.raises(ValueError, match="the checkpoint's are in float32 and this run's in 8bit; give --moments float32"):
        checkpoint.load_optimizer_state(low.optimizer, checkpoint.optimizer_state(other.optimizer))
    before = {name: p.detach().clone() for name, p in low.parameters.items()}
    go_on(low, 2, 3, scale=float("inf"))
    assert low.steps == 2 and all(torch.equal(p, before[name]) for name, p in low.parameters.items())
    assert int(low.optimizer.state[low.parameters["a"]]["step"]) == 2


def family() -> WanFamily:
    pipe = tiny_wan_pipeline()
    config = {**pipe.transformer.config, "num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 256, "num_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer = type(pipe.transformer).from_config(config).eval()
    return WanFamily(pipe, Size(HEIGHT, WIDTH, FRAMES))


@torchao
def test_a_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    from instep.training import loop

    options = RunOptions(save_every=1, probe_every=9, execution=Execution("cpu", moments="8bit"))
    go = lambda out: train(dmd2(Common(steps=2, batch=2, critic_updates=1), iterations=3), family(), out=out, prompts=PROMPTS, options=options)  # noqa: E731
    whole, calls, real = go(tmp_path / "whole"), [], loop.iteration

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("killed")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "iteration", dies)
        with pytest.raises(RuntimeError, match="killed"):
            go(tmp_path / "again")
    again = go(tmp_path / "again")
    for name, trained in whole.state.trained.items():
        assert all(torch.equal(p, again.state.trained[name].parameters[key]) for key, p in trained.parameters.items())
        assert any(low_bit.parts_of(entry["exp_avg"]) for entry in trained.optimizer.state.values())


@torchao
def test_the_planner_counts_codes_and_scales():
    recipe = dmd2(Common(steps=2, batch=2, critic_updates=1), iterations=1)
    real = params().parameters
    taken = {name: sum(x.nbytes for m in low_bit.empty_moments(p).values() for x in (m.values() if isinstance(m, dict) else [m])) for name, p in real.items()}
    assert taken == {"a": 2 * (4096 + 4 * 16 + 1024), "b": 2 * (8192 + 4 * 32 + 1024), "c": 2 * 4 * 7, "d": 2 * 4 * 4100}
    found = {}
    for moments in ("float32", "8bit"):
        (stage,) = iterations(recipe, Execution("meta").place(family()), Execution("cpu", moments=moments), Machine(1e12, 1e12))
        found[moments] = stage.memory
    want = sum(
        sum(x.nbytes for m in low_bit.empty_moments(p).values() for x in (m.values() if isinstance(m, dict) else [m])) for p in family().pretrained.parameters()
    )
    assert found["8bit"]["moments of student"] == pytest.approx(want, rel=1e-6) and want < 0.4 * found["float32"]["moments of student"]
