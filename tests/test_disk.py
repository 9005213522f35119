"""What a run needs on disk: counted before it begins, and refused where it is not there; and levels that are not the scheduler's."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_wan22_pipeline, tiny_wan_pipeline
from transformers import UMT5Config, UMT5EncoderModel

from instep.cli.main import main
from instep.core import disk
from instep.core.disk import check_disk, free_bytes, gb
from instep.core.outputs import check_output
from instep.core.size import Size
from instep.data.prompt import Prompt
from instep.export.room import pipeline_bytes
from instep.export.weights import Finite, write_encoder
from instep.models.wan import WanFamily
from instep.models.wan22 import Wan22Family
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.recipes.many_step import ManySteps, flow_grpo
from instep.training import checkpoint
from instep.training.checks import shift_note
from instep.training.disk import checkpoint_bytes, disk_bytes, export_bytes
from instep.training.finish import export_role
from instep.training.options import RunOptions
from instep.training.run import train
from instep.training.state_files import split

SIZE = Size(16, 16, 5)
SMALL = Common(steps=2, batch=2, critic_updates=1)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("rank", [None, 4])
def test_a_run_writes_what_was_counted(rank, tmp_path):
    family, recipe = WanFamily(tiny_wan_pipeline(layers=1), SIZE, name="tiny"), dmd2(replace(SMALL, lora_rank=rank), iterations=2)
    options = RunOptions(save_every=1, probe_every=50)
    found = disk_bytes(recipe, family, options)
    train(recipe, family, out=tmp_path / "run", prompts=["a cat"], options=options)
    kept = checkpoint.load(checkpoint.latest(tmp_path / "run/checkpoints"))
    # beside the weights there are names, which count in so small a model alone, and the states of the generators
    weights = sum(x.nbytes for x in split({part: kept[part] for part in ("roles", "optim", "ema")})[1].values())
    assert 0.95 * weights < checkpoint_bytes(recipe, family) < 1.05 * weights
    assert found["checkpoints"] == 4 * checkpoint_bytes(recipe, family) and len(checkpoint.every(tmp_path / "run/checkpoints")) <= 3
    # beside the networks there are tokenizers and a card
    networks = [path for path in (tmp_path / "run/student").rglob("*.safetensors") if path.name != "comfyui_diffusion_model.safetensors"]
    assert 0.9 * sum(path.stat().st_size for path in networks) < export_bytes(recipe, family) < 1.1 * sum(path.stat().st_size for path in networks)
    assert bytes_of(tmp_path / "run/tensorboard") + (tmp_path / "run/log.jsonl").stat().st_size < 3 * found["log"]


def test_both_experts_and_samples_count(tmp_path):
    one, two = WanFamily(tiny_wan_pipeline(), SIZE, name="tiny"), Wan22Family(tiny_wan22_pipeline(), SIZE, name="tiny")
    recipe, options = dmd2(SMALL, iterations=2), RunOptions(teacher_samples=10)
    assert checkpoint_bytes(recipe, two) == 2 * checkpoint_bytes(recipe, one)
    assert checkpoint_bytes(dmd2(replace(SMALL, experts="low"), iterations=2), two) == checkpoint_bytes(recipe, one)
    assert disk_bytes(recipe, one, options, sampled=True)["teacher samples"] == 10 * 16 * 16 * 2 * 2 * 2


def test_a_disk_that_is_too_small_is_refused_before_the_run(tmp_path, monkeypatch):
    family = WanFamily(tiny_wan_pipeline(layers=1), SIZE, name="tiny")
    monkeypatch.setattr("instep.core.disk.free_bytes", lambda path: 1_000_000)
    with pytest.raises(
        ValueError, match=r"out: 1 MB are free where .*run lies, and this run needs about 3.* MB \(checkpoints .* MB, export .* MB, log .* MB\)"
    ):
        train(dmd2(SMALL, iterations=2), family, out=tmp_path / "run", prompts=["a cat"])
    assert list(tmp_path.iterdir()) == []
    check_disk(tmp_path, {"checkpoints": 1_000_000}, "run")


@pytest.mark.parametrize(("rank", "dtype"), [(None, None), (None, torch.float32), (4, torch.float16)])
def test_an_export_takes_what_was_counted(rank, dtype, tmp_path, monkeypatch):
    """At the worst moment, while a text encoder is written anew, and with the files that stay of an earlier export."""
    family, recipe = WanFamily(tiny_wan_pipeline(layers=1), SIZE, name="tiny"), dmd2(replace(SMALL, lora_rank=rank), iterations=1)
    monkeypatch.setattr("instep.models.wan_comfyui.WanComfyUI.obstacle", staticmethod(lambda pipe: None))
    run = train(recipe, family, out=tmp_path / "run", prompts=["a cat"])
    to, counted, most, replace_file = tmp_path / "to", [], [0], os.replace
    monkeypatch.setattr("instep.export.room.check_disk", lambda out, needed, what: counted.append(needed))

    def measured(one: Path, other: Path) -> None:
        weights = [*tmp_path.glob(".to.writing-*/**/*.safetensors*"), *tmp_path.glob(".to.writing-*/notes")]
        most[0] = max(most[0], sum(path.stat().st_size for path in weights if path.suffix != ".json"))
        replace_file(one, other)

    monkeypatch.setattr(os, "replace", measured)
    about = {"recipe": "dmd2", "seed": 0, "prompts": 1, "example": Prompt("a cat"), "command": "", "dtype": dtype}
    student = run.state.roles["student"]
    export_role(student, family, recipe.sampling, to, **about)
    assert counted[0].keys() == {"networks", "ComfyUI's file" if rank is None else "LoRA file"}
    assert 0.9 * most[0] < sum(counted[0].values()) < 1.1 * most[0]
    # far more than the weights
    (to / "notes").write_bytes(bytes(20_000_000))
    most[0] = 0
    export_role(student, family, recipe.sampling, to, **about, overwrite=True)
    assert counted[1]["files that stay"] == 20_000_000 and 0.99 * most[0] < sum(counted[1].values()) < 1.01 * most[0]


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize(("memory", "dtype"), [(torch.float32, torch.float16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
def test_a_text_encoder_is_on_the_disk_in_two_dtypes_at_once(shards, memory, dtype, tmp_path, monkeypatch):
    small = UMT5Config(vocab_size=500, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4)
    encoder = UMT5EncoderModel(small).to(memory)
    size = sum(p.nbytes for p in encoder.parameters())
    family, most, replace_file = SimpleNamespace(pipe=SimpleNamespace(components={"text_encoder": encoder})), [0], os.replace

    def measured(one: Path, other: Path) -> None:
        most[0] = max(most[0], sum(path.stat().st_size for path in tmp_path.glob("*.safetensors*") if path.suffix != ".json"))
        replace_file(one, other)

    monkeypatch.setattr(os, "replace", measured)
    monkeypatch.setattr("instep.export.weights.SHARD_BYTES", size // shards + 1000)
    monkeypatch.setattr("instep.export.room.SHARD_BYTES", size // shards + 1000)
    write_encoder(tmp_path, encoder, dtype, Finite())
    assert most[0] > 1.2 * bytes_of(tmp_path) * min(1, memory.itemsize / dtype.itemsize)
    assert 0.9 * most[0] < pipeline_bytes(family, {}, dtype) < 1.1 * most[0]


def test_an_export_without_room_is_refused_before_a_network_is_computed(tmp_path, monkeypatch, capsys):
    tiny_wan_pipeline(layers=1).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat")
    given = ["--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.txt"), "--size", "16", "16", "5", "--batch", "2", "--steps", "2"]
    assert main(["train", "dmd2", *given, "--iterations", "1", "--lora-rank", "4", "--out", str(tmp_path / "run"), "--no-evaluate"]) == 0
    monkeypatch.setattr("instep.training.finish.fits_stock", lambda student: student.backbone.module.register_forward_hook(lambda *_: pytest.fail("computed")))
    monkeypatch.setattr("instep.core.disk.free_bytes", lambda path: 100_000)
    (tmp_path / ".to.writing-1").mkdir()  # of a killed one, whose room counts
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "to")]) == 2
    shown = capsys.readouterr().err
    pattern = r"error: out: 0\.1 MB are free where .*to lies, and this export needs about .* MB \(networks .* MB, LoRA file .* MB\); free some space.*\n"
    assert re.fullmatch(pattern, shown) and not list(tmp_path.glob("*to*"))


def test_bytes_in_words(tmp_path):
    assert [gb(n) for n in (2_000_000, 1.5e9, 3.14e10)] == ["2 MB", "1.5 GB", "31 GB"]
    assert free_bytes(tmp_path / "not" / "there") == disk.shutil.disk_usage(tmp_path).free


def test_levels_that_are_not_the_scheduler_s_are_named():
    family = WanFamily(tiny_wan_pipeline(layers=1), SIZE, name="tiny")  # shift 3; the published distillation of Wan 2.1 has 5
    note = shift_note(dmd2(replace(SMALL, steps=4, shift=1.0), iterations=2), family)
    assert note is not None and "the student's levels are 1.000, 0.750, 0.500, 0.250, while the scheduler of tiny (shift 3) visits 1.000, 0.900, 0.750" in note
    assert all(shift_note(dmd2(replace(SMALL, steps=4, shift=shift), iterations=2), family) is None for shift in (3.0, 5.0))
    many = shift_note(flow_grpo(ManySteps(steps=4, batch=4, shift=1.0), iterations=1, group=2), family)
    assert many is not None and "its exported pipeline samples at the scheduler's" in many


def test_an_output_is_looked_at_once_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "locked").mkdir(mode=0o500)
    check_output("out", tmp_path / "new" / "deep" / "x.png", suffixes=(".png",))
    check_output("out", tmp_path / "folder", fills=True)
    check_output("out", tmp_path / "new", fills=True)
    check_output("out", tmp_path / "folder", empty=True)
    check_output("out", tmp_path / "file", overwrite=True, ours=Path.is_file)
    for path, options, message in (
        ("x.gif", {"suffixes": (".png",)}, "has the ending '.gif', which is not allowed; allowed: .png"),
        ("file", {}, "exists; choose another name"),
        ("file", {"fills": True}, "exists; choose another name"),
        ("folder", {}, "exists; choose another name"),
        ("file", {"empty": True}, "exists; choose another name"),
        ("file", {"ours": Path.is_file}, "exists; give --overwrite"),
        ("folder", {"ours": Path.is_file}, "was not written by instep"),
        ("folder", {"ours": Path.is_file, "overwrite": True}, "was not written by instep"),
        ("file/x.png", {}, "file is not a folder; choose another path"),
        ("file/x/y", {"fills": True}, "file is not a folder; choose another path"),
    ):
        with pytest.raises(ValueError, match=f"^out: .*{message}"):
            check_output("out", tmp_path / path, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "locked"]


@pytest.mark.parametrize("fills", [False, True])
def test_a_folder_that_cannot_be_written_to_is_refused(fills, tmp_path, monkeypatch):
    monkeypatch.setattr("instep.core.outputs.os.access", lambda path, mode: Path(path) != tmp_path / "locked")  # root may write anywhere
    (tmp_path / "locked").mkdir()
    with pytest.raises(ValueError, match="out: .* cannot be written, because .*locked cannot be written to"):
        check_output("out", tmp_path / "locked" if fills else tmp_path / "locked" / "x", fills=fills)
