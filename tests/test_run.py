"""Runs on a tiny random Wan: files, resuming, interruption, and errors that come before the work."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fast import slow_but
from tiny import FRAMES, HEIGHT, WIDTH, tiny_wan_pipeline

from instep.core.size import Size
from instep.data.samples import RealSamples
from instep.models.wan import WanFamily
from instep.recipes.common import Common
from instep.recipes.dm_align import dm_align_group, dm_align_pair
from instep.recipes.dmd import dmd2
from instep.rewards.base import FunctionReward
from instep.training import checkpoint
from instep.training.batches import ShuffledIndices
from instep.training.loop import Interrupted
from instep.training.options import RunOptions
from instep.training.run import train

PROMPTS = ["a seven moving left fast", "a digit", "an eight", "a two standing still"]
SMALL = {"common": Common(batch=4, critic_updates=2, steps=2), "distil": 2, "iterations": 3, "group": 2, "top_n": 1}
EVERY = RunOptions(save_every=1, probe_every=2)


def family() -> WanFamily:
    return WanFamily(tiny_wan_pipeline(), Size(HEIGHT, WIDTH, FRAMES), name="tiny")


def brightness(media, prompts):
    return media.mean((1, 2, 3, 4))


def weights(out: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.load(checkpoint.latest(out / "checkpoints"))
    return {f"{part}/{role}/{k}": v for part in ("roles", "ema") for role, state in saved[part].items() for k, v in state.items()}


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same(a: Path, b: Path) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one), "weights differ"
    timing = {"cpu_s", "wall_s"}
    assert [{k: v for k, v in r.items() if k not in timing} for r in rows(a)] == [{k: v for k, v in r.items() if k not in timing} for r in rows(b)]


@contextmanager
def interrupted_before(step: int):
    """A run inside is interrupted before its iteration `step`, and has to be."""
    from instep.training import loop as module

    real = module.iteration

    def stops(state, *args):
        if state.step == step:
            raise KeyboardInterrupt
        return real(state, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "iteration", stops)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(dm_align_group(**SMALL), family(), out=out, prompts=PROMPTS, reward=brightness, options=EVERY)
    return out


def test_a_run_leaves_what_it_promises(whole):
    seen = rows(whole)
    assert [row["step"] for row in seen] == [0, 1, 2, 3, 4, 5]
    assert [row["stage"] for row in seen] == ["start", "distil", "distil", "align", "align", "align"]
    assert {"force/dm/norm", "critic/fake", "grad/student", "lr/student", "cpu_s"} <= seen[1].keys()
    assert {"reward/train", "force/group/norm"} <= seen[3].keys()
    assert {"probe/mean_brightness", "probe/mean_brightness_teacher", "probe/motion", "probe/diversity", "probe/train_score"} <= seen[4].keys()
    kept = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000004", "step-000005"], "the newest two, and the end of each stage"
    assert (whole / "student" / "model_index.json").is_file() and (whole / "student" / "README.md").is_file()
    assert sorted(path.name for path in (whole / "views").glob("align-*.safetensors")) == ["align-000002.safetensors", "align-000005.safetensors"]
    assert list((whole / "views").glob("step-*.safetensors")) and list((whole / "tensorboard").iterdir())


def test_the_exported_student_is_the_average_in_stock_diffusers(whole):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(whole / "student")
    ema = checkpoint.load(checkpoint.latest(whole / "checkpoints"))["ema"]["student"]
    for key, value in pipe.transformer.state_dict().items():
        if key in ema:
            torch.testing.assert_close(value, ema[key])
    record = json.loads((whole / "student" / "instep_export.json").read_text())
    assert record["levels"] == [1.0, 0.75]


def test_interrupted_anywhere_it_ends_the_same(whole, tmp_path, monkeypatch):
    """Stopped by a signal in the middle, and killed in the middle of a checkpoint's write: the same final weights and log."""
    out, calls = tmp_path / "stopped", []
    from instep.training import loop as module

    real = module.iteration

    def signalled(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(module, "iteration", signalled)
    go = lambda: train(dm_align_group(**SMALL), family(), out=out, prompts=PROMPTS, reward=brightness, options=EVERY)  # noqa: E731
    with pytest.raises(Interrupted, match="SIGTERM: saved at step 3 of 5"):
        go()
    monkeypatch.setattr(module, "iteration", real)
    replace, writes = os.replace, []

    def dies(source, target):
        if "step-000004" in str(target):
            writes.append(1)
            raise RuntimeError("killed")
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", dies)
    with pytest.raises(RuntimeError, match="killed"):
        go()
    monkeypatch.setattr(checkpoint.os, "replace", replace)
    assert writes and checkpoint.latest(out / "checkpoints").name == "step-000003"
    go()
    same(whole, out)


CHILD = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from little_drawn import shorten
shorten()
import test_run as t
t.train(t.dm_align_group(**t.SMALL), t.family(), out={out!r}, prompts=t.PROMPTS, reward=t.brightness, options=t.EVERY)
"""


@pytest.mark.slow
def test_kill_9_at_random_moments(whole, tmp_path):
    """SIGKILL after random delays, the same command again until it is done: identical to the run that was left alone."""
    out = tmp_path / "killed"
    code = CHILD.format(tests=str(Path(__file__).parent), out=str(out))
    delays = torch.rand(12, generator=torch.Generator().manual_seed(0)) * 1.5
    kills = 0
    for delay in [*delays.tolist(), None]:
        child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        if delay is None:
            assert child.wait(timeout=300) == 0
            break
        while not (out / "log.jsonl").exists() and child.poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        if child.poll() is None:
            kills += 1
            child.send_signal(signal.SIGKILL)
        child.wait()
    assert kills >= 3
    same(whole, out)


def test_errors_come_first_and_lose_nothing(whole, tmp_path):
    fam = family()

    def run(recipe, message, **changed):
        given = {"out": tmp_path / "new", "prompts": PROMPTS, "reward": brightness, **changed}
        with pytest.raises(ValueError, match=message):
            train(recipe, fam, **given)
        assert not (tmp_path / "new").exists(), "nothing was begun"

    group = dm_align_group(**SMALL)
    run(group, "prompts: the list is empty", prompts=[])
    run(group, "reward: stage 'align' of dm-align-group needs one", reward=None)
    run(group, "reward 'broken' raised ZeroDivisionError", reward=lambda_named("broken", lambda m, p: 1 / 0))
    run(group, "returned nan for 2 of 2 samples", reward=lambda m, p: torch.full((len(m),), torch.nan))
    run(group, r"returned \(2, 3\) for 2 samples", reward=lambda m, p: torch.zeros(len(m), 3))
    run(dm_align_pair(distil=1, iterations=1), "real: stage 'align' of dm-align-pair needs preferred samples")
    run(dm_align_pair(distil=1, iterations=1), "real: latents of shape", real=RealSamples(("a digit",), torch.zeros(1, 3, 2, 2, 2)))
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds another run .its config differ"):
        train(dm_align_group(**{**SMALL, "weight": 0.4}), fam, out=whole, prompts=PROMPTS, reward=brightness, options=EVERY)
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        train(group, fam, out=full, prompts=PROMPTS, reward=brightness)
    with pytest.raises(ValueError, match="batch 5 is not a multiple of group 2"):
        dm_align_group(**{**SMALL, "common": Common(batch=5, steps=2)})


def test_a_run_goes_on_with_a_version_that_has_more_options(whole, tmp_path):
    """Its record lacks them. With their defaults it is the same run; with another value it is not."""
    out = shutil.copytree(whole, tmp_path / "older")
    record = json.loads((out / "recipe.json").read_text())
    for stage in record["config"]["stages"]:
        del stage["rollout"]["shared_noise"], stage["reward_on"], stage["terms"][0]["ca_levels"]
    del record["config"]["roles"]["student"]["optim"]["warmup"]
    (out / "recipe.json").write_text(json.dumps(record))
    again = train(dm_align_group(**SMALL), family(), out=out, prompts=PROMPTS, reward=brightness, options=EVERY)
    assert again.state.step == dm_align_group(**SMALL).steps
    with pytest.raises(ValueError, match=r"config.stages\[1\].rollout.shared_noise null there, 0.5 now"):
        train(dm_align_group(**SMALL, shared_noise=0.5), family(), out=out, prompts=PROMPTS, reward=brightness, options=EVERY)


def lambda_named(name, function):
    function.__name__ = name
    return function


def test_a_folder_that_another_process_holds(tmp_path):
    """Refused before anything is written; after kill -9 of the holder the same call trains, and leaves no lock behind."""
    from test_lock import holder

    out = tmp_path / "run"
    go = lambda: train(dmd2(Common(steps=1, batch=2), iterations=1), family(), out=out, prompts=PROMPTS, options=EVERY)  # noqa: E731
    with holder(out) as other:
        with pytest.raises(ValueError, match=f"in use by another run .process {other.pid} "):
            go()
        assert [path.name for path in out.iterdir()] == [".lock"]
        other.kill()
        other.wait()
        go()
    assert (out / "student" / "model_index.json").is_file() and not (out / ".lock").exists()


def test_a_reward_that_breaks_later_stops_the_run_and_keeps_it(tmp_path):
    calls, repaired = [], []

    def fails_late(media, prompts):
        calls.append(1)
        if repaired:
            return torch.zeros(len(media))
        return torch.full((len(media),), torch.nan) if len(calls) > 4 else media.mean((1, 2, 3, 4))

    out = tmp_path / "run"
    with pytest.raises(ValueError, match="reward 'fails_late' returned nan.*saved at step .*the same command goes on from there"):
        train(dm_align_group(**SMALL), family(), out=out, prompts=PROMPTS, reward=fails_late, options=EVERY)
    assert checkpoint.latest(out / "checkpoints") is not None
    with pytest.raises(ValueError, match="its reward_source differ"):
        train(
            dm_align_group(**SMALL),
            family(),
            out=out,
            prompts=PROMPTS,
            options=EVERY,
            reward=FunctionReward(lambda media, _: media.mean((1, 2, 3, 4)), "fails_late"),
        )
    repaired.append(1)
    train(dm_align_group(**SMALL), family(), out=out, prompts=PROMPTS, reward=fails_late, options=EVERY)
    assert rows(out)[-1]["reward/constant_groups"] == 1.0 and rows(out)[-1]["force/group/norm"] == 0.0


def group_run(out: Path):
    return train(dm_align_group(**SMALL), family(), out=out, prompts=PROMPTS, reward=brightness, options=EVERY)


@pytest.mark.parametrize(("name", "after"), [("teacher_probe.json", None), ("step-000002.safetensors", "step-000001"), ("log.jsonl", "step-000003")])
def test_a_full_disk_in_the_middle_of_a_run(whole, tmp_path, monkeypatch, name, after):
    """The probe's metrics, its views, a row: one clear line, the last checkpoint intact, and the same run in the end."""
    out, real, writes = tmp_path / "run", open, []

    def full(file, mode="r", *args, **kwargs):
        if name in str(file) and mode.startswith(("w", "a")):
            writes.append(1)
            if name != "log.jsonl" or len(writes) == 5:  # rows 0, 1, 2 and 3 were written
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, mode, *args, **kwargs)

    monkeypatch.setattr("instep.core.files.open", full, raising=False)
    with pytest.raises(OSError, match=f"^.Errno 28. the disk is full: .*{name} was not written and .*; free some space and repeat the same command$"):
        group_run(out)
    monkeypatch.undo()
    newest = checkpoint.latest(out / "checkpoints")
    assert (newest.name if newest else None) == after
    assert not [path for path in out.rglob("*") if path.name == ".lock" or path.suffix == ".tmp"]
    group_run(out)
    same(whole, out)


LIMITED = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from little_drawn import shorten
shorten()
import os, resource
import test_run as t
from instep.training import loop
real, calls = loop.iteration, []
def limited(*args):
    calls.append(1)
    if len(calls) == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize({log!r}) + 10, resource.RLIM_INFINITY))
    return real(*args)
loop.iteration = limited
try:
    t.group_run({out!r})
except OSError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_real_limit_on_sizes(whole, tmp_path):
    """The kernel takes ten bytes of the fourth row and no more: they are taken back, and the run goes on from the third step."""
    pytest.importorskip("resource")
    out = tmp_path / "run"
    code = LIMITED.format(tests=str(Path(__file__).parent), log=str(out / "log.jsonl"), out=str(out))
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.startswith(f"[Errno 27] File too large: a row of {out / 'log.jsonl'} was not written and the checkpoints are intact; raise")
    assert [row["step"] for row in rows(out)] == [0, 1, 2, 3] and (out / "log.jsonl").read_bytes().endswith(b"}\n")
    assert checkpoint.latest(out / "checkpoints").name == "step-000003"
    group_run(out)
    same(whole, out)


def test_a_full_disk_during_the_export(whole, tmp_path, monkeypatch):
    """Weights go through safetensors' own writer, which has the reason in words: the same line, the earlier export stays."""
    from safetensors import SafetensorError

    from instep.export import folder

    def full(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(folder, "_sync", full)
    with pytest.raises(OSError, match=f"the disk is full: the export {out}/student was not written and what was there before is unchanged"):
        group_run(out)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"x": torch.arange(3), "n": 1}, keep=2)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError, match="the disk is full"):
        checkpoint.save(tmp_path, 2, {"x": torch.arange(3), "n": 2}, keep=2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert torch.equal(checkpoint.load(checkpoint.latest(tmp_path))["x"], torch.arange(3))


def test_a_run_whose_checkpoints_are_all_damaged_is_left_alone(tmp_path):
    """It does not begin at step 0 over them; with the folder removed it does, and so does a run that never had one."""
    out = tmp_path / "run"
    go = lambda where, start=None: train(  # noqa: E731
        dmd2(Common(steps=1, batch=2), iterations=2), family(), out=where, prompts=PROMPTS, options=RunOptions(save_every=1), start_from=start
    )
    go(out)
    for file in (out / "checkpoints").rglob("tensors.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"{out}/checkpoints holds 2 and none is whole .*remove {out} or choose another --out"):
        go(out)
    with pytest.raises(ValueError, match="none is whole"):
        go(tmp_path / "other", start=out)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    shutil.rmtree(out)
    assert go(out).state.step == 2


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"x": torch.full((4,), float(step))}, keep=3)
    file = tmp_path / "step-000002" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.warns(RuntimeWarning, match="step-000002 is damaged .* step-000001 is used"):
        assert checkpoint.latest(tmp_path).name == "step-000001"


def test_optimiser_and_generators_round_trip(tmp_path):
    def one_step(p, optimizer):
        p.grad = torch.linspace(-1, 1, 5)
        optimizer.step()

    p = torch.nn.Parameter(torch.zeros(5))
    first = torch.optim.AdamW([p], lr=0.1, betas=(0.0, 0.999))
    rng = torch.Generator().manual_seed(3)
    one_step(p, first)
    checkpoint.save(tmp_path, 1, {"p": p, "optim": checkpoint.optimizer_state(first), "rng": checkpoint.rng_state(rng)}, keep=1)
    one_step(p, first)
    expected = (p.detach().clone(), torch.rand(3, generator=rng), torch.rand(2))
    saved = checkpoint.load(checkpoint.latest(tmp_path))
    q = torch.nn.Parameter(saved["p"])
    second = torch.optim.AdamW([q], lr=0.5)
    checkpoint.load_optimizer_state(second, saved["optim"])
    checkpoint.restore_rng(rng, saved["rng"])
    one_step(q, second)
    assert torch.equal(q, expected[0]) and torch.equal(torch.rand(3, generator=rng), expected[1]) and torch.equal(torch.rand(2), expected[2])


def test_order_is_a_function_of_seed_and_cursor():
    order = ShuffledIndices(5, seed=1)
    first = order.next(12)
    assert sorted(first[:5]) == sorted(first[5:10]) == list(range(5)) and first[:5] != first[5:10]
    again = ShuffledIndices(5, seed=1)
    again.position = 7
    assert again.next(5) == first[7:12]


def test_lora_roles_share_a_backbone_and_export(tmp_path):
    out = tmp_path / "lora"
    fam = family()
    base = {k: v.clone() for k, v in fam.pretrained.state_dict().items()}
    run = train(dmd2(Common(steps=2, batch=4, lora_rank=4, critic_updates=1), iterations=2), fam, out=out, prompts=PROMPTS, options=EVERY)
    assert run.state.roles["student"].backbone is run.state.roles["teacher"].backbone
    now = {k.replace(".base_layer", ""): v for k, v in fam.pretrained.state_dict().items() if "lora_" not in k}
    assert all(torch.equal(now[k], v) for k, v in base.items()), "the shared weights are frozen"
    assert (out / "student" / "lora.safetensors").is_file()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("moved", "within_row"), slow_but([(False, False), (True, True)], [(False, False), (True, False), (True, True)]))
def test_a_folder_that_goes_ends_the_run_in_one_line(moved, within_row, tmp_path, monkeypatch, capfd):
    """Deleted or moved in an iteration, or between the row of the log and TensorBoard's: no other folder of its name is made, and no thread says more."""
    from instep.training import log as log_module
    from instep.training import loop as module

    out, real, append = tmp_path / "run", module.iteration, log_module.append_text

    def goes():
        out.rename(tmp_path / "elsewhere") if moved else shutil.rmtree(out)

    def removes(state, *args):
        if state.step == 2 and not within_row:
            goes()
        return real(state, *args)

    def appends(file, text):
        append(file, text)
        if within_row and text.startswith('{"step": 3,'):
            goes()

    monkeypatch.setattr(log_module, "append_text", appends)
    monkeypatch.setattr(module, "iteration", removes)
    with pytest.raises(ValueError, match=r"^out: .*run was removed or moved while the run was writing to it, and the run ends at step 3; [^\n]*$"):
        train(dmd2(SMALL["common"], iterations=5), family(), out=out, prompts=PROMPTS, options=EVERY)
    assert not out.exists() and "Traceback" not in capfd.readouterr().err
    if moved:
        monkeypatch.setattr(module, "iteration", real)
        monkeypatch.setattr(log_module, "append_text", append)
        train(dmd2(SMALL["common"], iterations=5), family(), out=tmp_path / "elsewhere", prompts=PROMPTS, options=EVERY)
        assert [row["step"] for row in rows(tmp_path / "elsewhere")] == [0, 1, 2, 3, 4, 5]
