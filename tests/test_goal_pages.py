"""Quick start and the how-tos of a goal, typed as they stand on bundled models and a tiny pipeline."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from followed import DOCS, follow
from PIL import Image
from safetensors.torch import load_file
from test_named_rewards import tiny_dinov2
from tiny import tiny_sd3_pipeline, tiny_wan_i2v_pipeline, tiny_wan_pipeline

from instep.cli import sample_layout
from instep.core.files import write_bytes
from instep.data.animation import save_animation
from instep.training.findings import FLAGS


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


@pytest.mark.slow
def test_quick_start(folder):
    assert follow("../quick_start.md") == ["sh"]
    assert {path.name for path in (folder / "runs/first").iterdir()} >= {"student", "recipe.json", "log.jsonl", "tensorboard", "checkpoints"}
    assert (folder / "first.webp").is_file()


def test_resume(folder):
    assert follow("resume.md") == ["sh", "sh"]
    rows = [json.loads(line) for line in (folder / "runs/kept/log.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "force/dm/norm" in row]) == 2, "the second command trained nothing"
    assert (folder / "runs/longer/student/transformer").is_dir()


@pytest.mark.slow
def test_report(folder):
    assert follow("report.md") == ["sh"]
    page = (folder / "compare.html").read_text(encoding="utf-8")
    assert "Did it help?" in page and "How it was made" in page and "What the matching force sees" in page


@pytest.mark.slow
def test_judging(folder):
    assert follow("judging.md")[0] == "sh"
    first, second = (json.loads((folder / name / "samples.json").read_text()) for name in ("first", "second"))
    assert [(row["prompt"], row["seed"]) for row in first] == [(row["prompt"], row["seed"]) for row in second], "as the page matches them"


@pytest.mark.slow
def test_lora_and_comfyui(folder, monkeypatch):
    tiny_wan_pipeline().save_pretrained("WAN-FOLDER")
    (folder / "prompts.txt").write_text("a seven\nan eight\n")
    monkeypatch.setattr("followed.SMALL", {"train": "--batch 2 --accumulate 1 --critic-updates 1 --iterations 1 --no-evaluate"})
    assert follow("lora_and_comfyui.md", {"none": lambda at: None}, "48 48 9") == ["sh", "python", "sh"]
    held = {path.name for path in (folder / "runs/wan-lora/student").iterdir()}
    assert held >= {"lora.safetensors", "comfyui_workflow.json", "README.md", "model_index.json"}
    assert (folder / "wan-4-step/model_index.json").is_file()
    keys = set(load_file(folder / "runs/wan-lora/student/lora.safetensors"))
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in keys, "as the page has it"


QUICK = "--size 16 16 5 --steps 1 --guidance 1"
MEASURED = {
    '"hpsv2, clipscore, frames=8 aesthetic" --features dinov2': f"compressible --features dino {QUICK}",
    "--fps 16": f"--fps 16 --copies 1 {QUICK}",
    "--each samples/i2v": f"--each samples/i2v --copies 1 {QUICK}",
    "--each samples/geneval": f"--each samples/geneval {QUICK.replace('16 5', '16 1')}",
    "--each samples/dpg": f"--each samples/dpg --copies 1 {QUICK.replace('16 5', '16 1')}",
}


@pytest.mark.slow
def test_measure(folder, monkeypatch):
    monkeypatch.setattr(sample_layout, "check_codec", lambda: None)
    monkeypatch.setattr(sample_layout, "save_video", lambda path, frames, fps: write_bytes(path, b"video"))
    for name, pipe in (("first", tiny_wan_pipeline(1)), ("i2v", tiny_wan_i2v_pipeline()), ("images", tiny_sd3_pipeline())):
        pipe.save_pretrained(f"runs/{name}")
    tiny_wan_pipeline().save_pretrained("WAN-FOLDER")
    classifier, _ = tiny_dinov2(folder / "dino")
    classifier.dinov2.save_pretrained("dino")
    rng = torch.Generator().manual_seed(0)
    for name in ("my-videos", "dpg_bench/prompts", "crop/16-9"):
        (folder / name).mkdir(parents=True)
    for i in range(8):
        save_animation(folder / f"my-videos/{i}.webp", torch.randint(256, (5, 16, 16, 3), generator=rng).to(torch.uint8), 16)
        (folder / f"my-videos/{i}.txt").write_text("a hen")
    Image.new("RGB", (16, 16)).save("crop/16-9/a cat.jpg")
    for name, text in (
        ("prompts.txt", "a hen\na cat\n"),
        ("all_dimension.txt", "a bus\n"),
        ("vbench2_i2v_full_info.json", json.dumps([{"prompt_en": "a cat runs", "image_name": "a cat.jpg"}])),
        ("evaluation_metadata.jsonl", json.dumps({"tag": "single_object", "prompt": "a photo of a bench"})),
        ("dpg_bench/prompts/7.txt", "a long prompt"),
    ):
        (folder / name).write_text(text)
    assert follow("measure.md", smaller=MEASURED) == ["sh", "sh"]
    found = json.loads((folder / "evaluation.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["first", "WAN-FOLDER"] and {"fd", "vendi", "consistency"} <= set(found["rows"][0]["values"])
    drawn = {path.relative_to(folder / "samples").as_posix() for path in (folder / "samples").rglob("*.*") if path.suffix not in (".json", ".jsonl")}
    images = {f"geneval/00000/samples/0000{i}.png" for i in range(4)}
    assert drawn == {"first/a bus-0.mp4", "i2v/a cat runs-0.mp4", "dpg/7.png", *images}


@pytest.mark.slow
def test_many_gpus(folder):
    """Two processes on the CPU."""
    tiny_wan_pipeline().save_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    (folder / "prompts.txt").write_text("a hen\na cat\n")
    small = "--batch 4 --group 2 --critic-updates 1 --distil 1 --iterations 1 --accumulate 1 --no-evaluate --size 48 48 9 --device cpu --threads 1"
    smaller = {"--nproc-per-node 8": "--nproc-per-node 2", "hpsv2": "compressible", "--lora-rank 32 --batch 32 --group 4": f"--lora-rank 4 {small}"}
    assert follow("many_gpus.md", smaller=smaller) == ["sh"]
    assert json.loads((folder / "runs/eight/log.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert (folder / "runs/eight/student/lora.safetensors").is_file()


def test_every_flag_is_explained():
    page = (DOCS / "report.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"`([a-z_]+)`", " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `")))) == sorted(FLAGS)
