"""Runs, kills, changed options, exports, samples and new beginnings in any order (Hypothesis): never a torn file, never another run in silence, never another
result than that of a run that nobody disturbed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.sandbox import tree
from file_deaths import Died, death
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from safetensors.torch import load_file
from test_dit import tiny_dit

from instep.bundled import load
from instep.cli.export import ExportArgs, export_command
from instep.core.json_lines import read_rows
from instep.diffusion.sampling import Sampling
from instep.methods.role_config import AdamWConfig
from instep.models.backbone import Backbone
from instep.models.role import Role
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.training import checkpoint, loop
from instep.training import log as log_module
from instep.training.loop import Interrupted
from instep.training.options import RunOptions
from instep.training.run import train
from instep.training.state_files import split

ITERATIONS, EVERY = 5, 2
PROMPTS = tuple(str(i) for i in range(6))
SHARED = Common(steps=2, batch=2, critic_updates=1, shift=1.0, guidance=1.5)
# what a run is told anew, and what the refusal names
CHANGES: Mapping[str, tuple[dict[str, Any], str]] = {
    "rate": ({"recipe": dmd2(Common(steps=2, batch=2, critic_updates=1, shift=1.0, guidance=1.5, student=AdamWConfig(1.0)), iterations=ITERATIONS)}, "lr"),
    "length": ({"recipe": dmd2(SHARED, iterations=ITERATIONS + 1)}, "steps"),
    "prompts": ({"prompts": PROMPTS[:3]}, "prompts"),
    "seed": ({"options": RunOptions(seed=1)}, "seed 0 there, 1 now"),
    "weights": ({"model": 1}, "weights"),
    "reward": ({"reward": lambda media, prompts: media.mean((1, 2, 3))}, "reward"),
}


@pytest.fixture(scope="module", autouse=True)
def plain_logs():
    """TensorBoard would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_module, "_tensorboard", lambda events, step: None)
        yield


@cache
def model(seed: int = 0) -> Path:
    """The folder of a tiny class-conditional model."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = Path(tempfile.mkdtemp()) / "dit"
    tiny_dit(seed).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    return folder


def go(out: Path, **changed: Any) -> None:
    """Trains, or goes on, with some of the inputs changed."""
    given = {"recipe": dmd2(SHARED, iterations=ITERATIONS), "prompts": PROMPTS, "options": RunOptions(save_every=EVERY, probe_every=3), "model": 0, **changed}
    recipe, family = given.pop("recipe"), load(model(given.pop("model")))
    train(recipe, family, out=out, **given)


@cache
def undisturbed() -> Path:
    """The folder of a run that nobody disturbs, which keeps all of its checkpoints."""
    out = Path(tempfile.mkdtemp()) / "whole"
    go(out, options=RunOptions(save_every=1, keep=99, probe_every=3))
    return out


@cache
def undisturbed_from(step: int) -> dict[str, str]:
    """The result of a run of one iteration that begins from the undisturbed one as it was after `step` steps."""
    source = Path(tempfile.mkdtemp()) / "source"
    shutil.copytree(undisturbed(), source)
    checkpoint.drop_after(source / "checkpoints", step)
    go(source.with_name("next"), recipe=dmd2(SHARED, iterations=1), start_from=source)
    return state_at(source.with_name("next"), 1)


@cache
def drawn(step: int) -> torch.Tensor:
    """Samples of the undisturbed run's average after `step` steps."""
    average = checkpoint.load(undisturbed() / "checkpoints" / f"step-{step:06d}")["ema"]["student"]
    family = load(model())
    backbone = Backbone(family, family.new_backbone())
    backbone.module.load_state_dict(average)
    return sampled(family, backbone)


@torch.no_grad()
def sampled(family: Any, backbone: Backbone) -> torch.Tensor:
    rng = torch.Generator().manual_seed(5)
    cond, null = family.encode(PROMPTS), family.unconditional(PROMPTS)
    noise = torch.randn(len(PROMPTS), *family.latent_shape, generator=rng)
    return Sampling(SHARED.levels)(Role("student", backbone), cond, null, noise, family.path, rng)


def state_at(out: Path, step: int) -> dict[str, str]:
    """Digests of all weights, moments and averages of a checkpoint."""
    return digests(out / "checkpoints" / f"step-{step:06d}")


@cache
def expected(step: int) -> dict[str, str]:
    return state_at(undisturbed(), step)


def digests(folder: Path) -> dict[str, str]:
    kept = checkpoint.load(folder)
    _, tensors = split({part: kept[part] for part in ("roles", "optim", "ema")})
    return {key: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for key, value in tensors.items()}


def log_rows(out: Path) -> list[dict[str, Any]]:
    """What readers of the log see, without what depends on the clock: half a row at its end is passed over."""
    return [{key: value for key, value in row.items() if key not in ("cpu_s", "wall_s")} for row in read_rows(out / "log.jsonl")]


def check_whole(folder: Path) -> None:
    """Fails on a file that is torn: JSON that does not parse, weights whose bytes are not all there. A name with a dot is one that nobody reads."""
    for path in folder.rglob("*"):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".safetensors":
            data = path.read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            assert len(data) == 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), path


class Runs(RuleBasedStateMachine):
    """One folder in which a run is begun, disturbed and looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.out = self.folder / "run"
        self.damaged: Path | None = None
        self.count = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def new(self) -> Path:
        self.count += 1
        return self.folder / f"new-{self.count}"

    @property
    def steps(self) -> list[int]:
        """Steps of the intact checkpoints, the newest first."""
        return [checkpoint.step_of(path) for path in self.intact()]

    def intact(self) -> list[Path]:
        folder = self.out / "checkpoints"
        return [path for path in checkpoint.every(folder) if checkpoint.at(folder, checkpoint.step_of(path)) is not None]

    def has_checkpoint(self) -> bool:
        return bool(self.steps)

    @rule(iteration=st.integers(0, ITERATIONS - 1), number=st.sampled_from([signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]))
    def signalled(self, iteration: int, number: signal.Signals) -> None:
        """A signal in the given iteration, if the run comes to it."""
        real = loop.iteration

        def signals(state: Any, *args: Any) -> Any:
            if state.step == iteration:
                os.kill(os.getpid(), number)
            return real(state, *args)

        before = self.steps[0] if self.steps else 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "iteration", signals)
            try:
                go(self.out)
            except Interrupted:
                assert self.steps[0] == iteration + 1, "the iteration is finished and saved"
                return
        assert before > iteration, "the signal was lost"
        self.check_end()

    @rule(at=st.integers(0, 90))
    def killed(self, at: int) -> None:
        """Dies at one of its operations on files."""
        with death(at):
            try:
                go(self.out)
            except Died:
                return
        self.check_end()

    @rule()
    def finished(self) -> None:
        go(self.out)
        self.check_end()

    def check_end(self) -> None:
        """The end of the run is that of the undisturbed one: weights, log, export; and no temporary file is left."""
        assert self.steps[0] == ITERATIONS and state_at(self.out, ITERATIONS) == expected(ITERATIONS)
        assert log_rows(self.out) == log_rows(undisturbed())
        self.check_export(self.out / "student", ITERATIONS)
        left = [str(path) for path in self.out.rglob(".*") if path.name != ".lock"]
        assert left == [], left

    def check_export(self, folder: Path, step: int) -> None:
        one = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        average = checkpoint.load(undisturbed() / "checkpoints" / f"step-{step:06d}")["ema"]["student"]
        assert one.keys() == average.keys() and all(torch.equal(one[key], average[key]) for key in one)

    @precondition(has_checkpoint)
    @rule(what=st.sampled_from(sorted(CHANGES)))
    def changed(self, what: str) -> None:
        """Another value of an option is refused by its name, and no file changes."""
        given, name = CHANGES[what]
        before = tree(self.out)
        try:
            go(self.out, **given)
        except ValueError as refused:
            assert "holds another run" in str(refused) and name in str(refused) and tree(self.out) == before
            return
        raise AssertionError(f"another {what} was taken in silence")

    @precondition(has_checkpoint)
    @rule(at=st.none() | st.integers(0, 16))
    def exported(self, at: int | None) -> None:
        """An export is that of the newest checkpoint, whole; one that dies leaves no folder of that name."""
        to, step = self.new(), self.steps[0]
        if at is not None:
            with death(at):
                try:
                    export_command(ExportArgs(self.out, to))
                except Died:
                    assert not to.exists()
                    return
        else:
            export_command(ExportArgs(self.out, to))
        self.check_export(to, step)

    @precondition(lambda self: (self.out / "student").is_dir())
    @rule()
    def drawn_from(self) -> None:
        """Samples of what the run has exported."""
        family = load(self.out / "student")
        torch.testing.assert_close(sampled(family, Backbone(family, family.pretrained)), drawn(ITERATIONS), rtol=0, atol=0)

    @precondition(has_checkpoint)
    @rule()
    def begun_from(self) -> None:
        """Another run begins from this one, which stays as it is."""
        before, to, step = tree(self.out), self.new(), self.steps[0]
        go(to, recipe=dmd2(SHARED, iterations=1), start_from=self.out)
        assert tree(self.out) == before and state_at(to, 1) == undisturbed_from(step)

    @precondition(has_checkpoint)
    @rule(what=st.sampled_from(["log", "teacher_probe", "checkpoint", "temporary"]))
    def spoilt(self, what: str) -> None:
        """What a crash, a full disk or a user leaves: half a row, no cache, a flipped byte, a file of a process that is gone."""
        if what == "log":
            with open(self.out / "log.jsonl", "ab") as file:
                file.write(b'{"step": 9, "for')
        elif what == "teacher_probe":
            (self.out / "teacher_probe.json").unlink(missing_ok=True)
        elif what == "checkpoint" and len(self.steps) > 1 and self.damaged is None:
            self.damaged = self.out / "checkpoints" / f"step-{self.steps[0]:06d}"
            tensors = self.damaged / "tensors.safetensors"
            data = bytearray(tensors.read_bytes())
            data[-1] ^= 255
            tensors.write_bytes(data)
        elif what == "temporary":
            (self.out / "checkpoints" / ".step-000001.99999.tmp").mkdir(exist_ok=True)

    @invariant()
    def nothing_is_torn(self) -> None:
        """Whatever happened: files are whole, a checkpoint holds what the undisturbed run held, and the record is that of this run."""
        check_whole(self.folder)
        if self.damaged is not None and (not self.damaged.is_dir() or self.damaged in self.intact()):
            self.damaged = None  # written anew
        for path in checkpoint.every(self.out / "checkpoints"):
            if path != self.damaged:
                assert path in self.intact() and digests(path) == expected(checkpoint.step_of(path)), path
        if (self.out / "recipe.json").is_file():
            mine, other = (json.loads((folder / "recipe.json").read_text()) for folder in (self.out, undisturbed()))
            assert mine == other


def tried(examples: int, steps: int, **kw: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(
            Runs,
            settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False, **kw),
        )


def test_any_order_ends_as_undisturbed():
    tried(4, 6, derandomize=True)


@pytest.mark.slow
def test_any_order_ends_as_undisturbed_at_length():
    tried(20, 15, phases=[Phase.generate])


def in_place(path: Path, data: bytes) -> None:
    """`core.files.write_bytes` without its temporary file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


# what is broken, and what stands in its place
PLANTED: Mapping[str, tuple[str, Any]] = {
    "files are written in place": ("instep.core.files.write_bytes", in_place),
    "the generator is not restored": ("instep.training.checkpoint.restore_rng", lambda generator, kept: None),
    "the moments are not restored": ("instep.training.checkpoint.load_optimizer_state", lambda optimizer, kept: None),
    "the record has no weights": ("instep.training.manifest.weights_fingerprint", lambda network: "same"),
    "a signal is not heard": ("instep.training.loop.Loop._ask_to_stop", lambda self, number, frame: None),
    "a checksum is not compared": ("instep.training.checkpoint._damage", lambda path: None),
    "the log keeps rows that are repeated": ("instep.training.log.trim", lambda file, step: None),
    "an export is written in place": ("instep.export.parts.atomic_dir", lambda out, what: nullcontext(out)),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault, monkeypatch):
    monkeypatch.setattr(*PLANTED[fault])
    kept = (undisturbed, undisturbed_from, drawn, expected)
    for each in kept:
        each.cache_clear()
    try:
        with pytest.raises((AssertionError, ValueError)) as found:
            tried(60, 15, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False)
        print(f"{fault}: {type(found.value).__name__}: {' '.join(str(found.value).split())[:200]}")
    finally:
        for each in kept:
            each.cache_clear()
