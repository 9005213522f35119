"""Samples for benchmarks: names and folders as their tools read them, settings that may not change on the way, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_sd3_pipeline, tiny_wan_pipeline

from instep.cli import sample_layout
from instep.cli.main import main
from instep.cli.sample_layout import two_by_two
from instep.core.files import write_bytes
from instep.data.benchmarks import BENCHMARKS
from instep.data.video_file import save_video

QUICK = ["--steps", "1", "--guidance", "1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_sd3_pipeline().save_pretrained(folder / "sd3")
    tiny_wan_pipeline().save_pretrained(folder / "wan")
    return folder


def test_geneval(models, tmp_path, capsys):
    """evaluate_images.py reads N/metadata.jsonl and N/samples/\\d+.png, N all digits."""
    rows = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}, {"tag": "counting", "prompt": "two cats"}]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = [
        "sample",
        str(models / "sd3"),
        "--layout",
        "geneval",
        "--source",
        str(tmp_path / "evaluation_metadata.jsonl"),
        "--each",
        str(tmp_path / "out"),
        *QUICK,
    ]
    size = ["--size", "16", "16", "1"]
    assert main([*line, *size, "--copies", "2"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000", "00001"]
    for i, row in enumerate(rows):
        assert json.loads((tmp_path / "out" / f"{i:05}" / "metadata.jsonl").read_text()) == row
        images = sorted((tmp_path / "out" / f"{i:05}" / "samples").iterdir())
        assert [path.name for path in images] == ["00000.png", "00001.png"] and all(re.fullmatch(r"\d+\.png", path.name) for path in images)
    pixels = {path: np.array(Image.open(path)) for path in (tmp_path / "out").rglob("*.png")}
    assert len({image.tobytes() for image in pixels.values()}) == 4, "each sample has a seed of its own"
    # what is missing is drawn again, the same; other settings are refused
    gone, *kept = sorted(pixels)
    gone.unlink()
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert main([*line, *size, "--copies", "2"]) == 0
    assert np.array_equal(np.array(Image.open(gone)), pixels[gone]) and before == {path: path.stat().st_mtime_ns for path in kept}
    capsys.readouterr()
    assert main([*line, *size, "--copies", "2", "--seed", "1"]) == 2
    assert "holds samples of another command (their seed differ)" in capsys.readouterr().err


def test_dpg_bench(models, tmp_path, capsys):
    """compute_dpg_bench.py takes every file of the folder, whose name up to the dot is the prompt's, and cuts four squares out of it."""
    (tmp_path / "prompts").mkdir()
    for name in ("partiprompts12", "7"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"a long prompt\n of {name}")
    line = ["sample", str(models / "sd3"), "--layout", "dpg-bench", "--source", str(tmp_path / "prompts"), "--each", str(tmp_path / "out"), *QUICK]
    assert main([*line, "--size", "16", "16", "1"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["7.png", "partiprompts12.png"]
    image = np.array(Image.open(tmp_path / "out" / "7.png"))
    assert image.shape == (32, 32, 3) and len({image[y : y + 16, x : x + 16].tobytes() for y in (0, 16) for x in (0, 16)}) == 4
    assert json.loads((tmp_path / "out.json").read_text())["prompts"] == ["a long prompt of 7", "a long prompt of partiprompts12"]
    capsys.readouterr()
    for more, message in (
        (["--size", "16", "32", "1"], "size: 16 x 32 is not allowed; DPG-Bench's tool cuts squares"),
        (["--size", "16", "16", "1", "--copies", "3"], "copies: 3 is not allowed; DPG-Bench takes 1 image a prompt, or 4"),
    ):
        assert main([*line[:7], str(tmp_path / "other"), *QUICK, *more]) == 2 and message in capsys.readouterr().err


def test_grids_are_row_by_row():
    four = [torch.full((1, 1, 1, 3), value, dtype=torch.uint8) for value in range(4)]
    assert two_by_two(four)[0, :, :, 0].tolist() == [[0, 1], [2, 3]]


def test_vbench(models, tmp_path, monkeypatch, capsys):
    written: list[tuple[Path, torch.Tensor, float]] = []

    def keep(path, frames, fps):
        written.append((path, frames, fps))
        write_bytes(path, b"video")

    monkeypatch.setattr(sample_layout, "check_codec", lambda: None)
    monkeypatch.setattr(sample_layout, "save_video", keep)
    (tmp_path / "all_dimension.txt").write_text("a bus\nA 3D model of a house.\na bus\n")
    line = ["sample", str(models / "wan"), "--layout", "vbench", "--source", str(tmp_path / "all_dimension.txt"), "--each", str(tmp_path / "out"), *QUICK]
    (tmp_path / "out").mkdir()
    assert main([*line, "--size", "16", "16", "5"]) == 2 and "does not say how its samples were drawn" in capsys.readouterr().err
    (tmp_path / "out").rmdir()
    assert main([*line, "--size", "16", "16", "5", "--fps", "16"]) == 0
    assert [path.name for path, _, _ in written] == [f"{name}-{i}.mp4" for name in ("a bus", "A 3D model of a house.") for i in range(5)]
    assert all(path.parent == tmp_path / "out" and frames.shape == (5, 16, 16, 3) and fps == 16 for path, frames, fps in written)
    assert not list((tmp_path / "out").glob("*.json")), "the tool takes the ending of any file"
    for more, message in (
        (["--size", "16", "16", "1"], "layout: vbench measures videos, and"),
        (["--prompts", "a"], "prompts: a layout has the prompts of its benchmark"),
    ):
        assert main([*line[:7], str(tmp_path / "other"), *more]) == 2 and message in capsys.readouterr().err
    assert main(line[:4]) == 2 and "each: a layout needs the folder of its samples" in capsys.readouterr().err
    (tmp_path / "all_dimension.txt").write_text("a/b\n")
    assert main([*line[:7], str(tmp_path / "other")]) == 2 and "'a/b' cannot be the name of a file" in capsys.readouterr().err


def test_vbench_i2v_takes_prompts_and_first_frames_of_its_own_file(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a cat.jpg")
    rows = [{"prompt_en": "a cat, camera pans left", "dimension": ["camera_motion"], "image_type": "animal", "image_name": "a cat.jpg"}]
    (tmp_path / "info.json").write_text(json.dumps(rows * 2))
    (item,) = BENCHMARKS["vbench-i2v"].items(tmp_path / "info.json", 2, tmp_path)
    assert item.files == ("a cat, camera pans left-0.mp4", "a cat, camera pans left-1.mp4")
    assert (item.prompt.text, item.prompt.image) == ("a cat, camera pans left", str(tmp_path / "a cat.jpg"))
    for given, images, message in (
        (rows, None, "images: VBench-I2V samples begin with first frames"),
        ([{**rows[0], "image_name": "no.jpg"}], tmp_path, "images: .*no.jpg does not exist"),
        ([rows[0], {**rows[0], "image_name": "b.jpg"}], tmp_path, "has two first frames"),
        ([{"prompt_en": "a"}], tmp_path, "image_name is None"),
        ({}, tmp_path, "holds no list of objects"),
    ):
        (tmp_path / "info.json").write_text(json.dumps(given))
        with pytest.raises(ValueError, match=message):
            BENCHMARKS["vbench-i2v"].items(tmp_path / "info.json", 2, images)


def test_a_video_file_holds_its_frames(tmp_path):
    frames = torch.arange(0, 250, 25, dtype=torch.uint8)[:, None, None, None].expand(10, 16, 24, 3)
    save_video(tmp_path / "a.mp4", frames, 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 8
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert read.shape == (10, 16, 24, 3) and np.abs(read.astype(int) - frames.numpy()).max() <= 4
