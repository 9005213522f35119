"""Quick start and the how-tos of a goal, typed as they stand on bundled models and a tiny pipeline."""

from __future__ import annotations

import json
import re
import sys

import pytest
from followed import DOCS, follow
from safetensors.torch import load_file
from tiny import tiny_wan_pipeline

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


def test_every_flag_is_explained():
    page = (DOCS / "report.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"`([a-z_]+)`", " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `")))) == sorted(FLAGS)
