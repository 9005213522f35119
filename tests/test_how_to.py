"""The how-tos, run as they stand: files are written under the names that the text gives them, commands and Python run in the order of the page."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import test_qwen_rewards
import torch
from followed import SERVERS, follow
from test_named_rewards import OpenClip, tiny_dinov2
from test_preferences import tiny_clip
from tiny import tiny_sd3_pipeline, tiny_wan_pipeline

from instep.data.animation import save_animation
from instep.lab.run import common
from instep.lab.spec import build

SMALL = {
    "480 832 81": "16 16 5",
    "--batch 8": "--batch 4 --steps 1 --critic-updates 1 --no-evaluate",
    "--group 8": "--group 2",
    "--iterations 200": "--iterations 1",
    "--iterations 300": "--iterations 1",
    "--distil 600": "--distil 0",
    "--copies 4": "--copies 4 --guidance 1 --steps 1",
    "pairs slow": "pairs slow --frames 5",
}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of one's own, from which modules are imported and then forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    while SERVERS:
        server = SERVERS.pop()
        server.kill()
        server.wait()
    for name in [name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(str(tmp_path))]:
        del sys.modules[name]


def test_own_force(folder):
    import torch

    assert follow("own_force.md") == ["python file", "sh", "python"]
    rows = [json.loads(line) for line in (folder / "runs/smooth/log.jsonl").read_text().splitlines()]
    assert rows[-1]["force/smooth/norm"] > 0 and "force/cosine/dm~smooth" in rows[-1]
    # what the text says of it: the gradient of that loss
    from my_force import Smooth

    x = torch.randn(3, 2, 4, requires_grad=True)
    loss = 0.5 * (x - x.detach().mean((1, 2), keepdim=True)).square().mean()
    (gradient,) = torch.autograd.grad(loss, x)
    point = type("Point", (), {"x": x})
    view = type("View", (), {"samples": type("Samples", (), {"point": lambda self, on: point})()})()
    assert torch.allclose(Smooth()(view), gradient)


def test_own_reward(folder):
    tiny_dinov2(folder / "models" / "my-classifier")
    want = ["python file", "sh", "python", "python file", "sh", "python file", "sh", "python file", "sh"]
    assert follow("own_reward.md", smaller={"8000": str(free_port())}) == want
    for run, name in (("sure", "sure, my-classifier 1"), ("program", "command"), ("server", "http")):
        assert name in json.loads((folder / "runs" / run / "recipe.json").read_text())["reward"]
    assert json.loads((folder / "runs/bright/recipe.json").read_text())["reward"] == "bright"
    assert json.loads((folder / "runs/contrast/recipe.json").read_text())["reward"] == "contrast"


def test_own_recipe(folder, capsys):
    assert follow("own_recipe.md") == ["python file", "sh", "python"]
    out = capsys.readouterr().out
    assert "weight of the alignment force" in out and "gentle, stage align" in out
    assert json.loads((folder / "runs/gentle/recipe.json").read_text())["recipe_source"].startswith("my_recipe:gentle ")
    assert build("my_recipe:gentle:weight=0.5", common(), 30).stages[-1].terms[1].weight == 0.5, "as in the laboratory"


base = test_qwen_rewards.base


def wan(folder: Path) -> None:
    """A tiny model under the name that the pages give it, and prompts."""
    tiny_wan_pipeline().save_pretrained(folder / "Wan2.1-T2V-1.3B-Diffusers")
    (folder / "prompts.txt").write_text("a hen\na cat\n")


@pytest.mark.slow
def test_hpsv2_with_refl(folder):
    network, processor = tiny_clip(folder / "models" / "pickscore")
    weights = OpenClip(len(processor.tokenizer)).state_dict()

    def base_of(to: Path) -> None:
        network.config.save_pretrained(to)
        processor.save_pretrained(to)

    wan(folder)
    tiny_sd3_pipeline().save_pretrained(folder / "sd3")
    sizes = {"SD3-FOLDER": "sd3 --size 16 16 1", "WAN-FOLDER": "Wan2.1-T2V-1.3B-Diffusers --size 16 16 5", "--probe-every 5": "--probe-every 5 --distil 0"}
    models = {
        "xswu/HPSv2": lambda to: torch.save({"state_dict": weights}, to / "HPS_v2.1_compressed.pt"),
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": base_of,
    }
    assert follow("hpsv2_with_refl.md", models, smaller={**sizes, "--micro-batch 1": "--micro-batch 1 --distil 0"}) == ["sh", "sh"]
    for run, rewards in (("image", ("hpsv2",)), ("video", ("hpsv2", "pickscore"))):
        row = json.loads((folder / "runs" / run / "log.jsonl").read_text().splitlines()[-1])
        named = json.loads((folder / "runs" / run / "recipe.json").read_text())["reward"]
        assert "force/reward/norm" in row and all(name in named for name in rewards)


@pytest.mark.slow
def test_videoalign_with_amd(folder, base, capsys):
    qwen, network, _ = base
    wan(folder)
    checkpoint = folder / "videoreward" / "checkpoint-11352"
    checkpoint.mkdir(parents=True)
    weights = {f"base_model.model.{name}": value for name, value in test_qwen_rewards.published(network).items()}
    torch.save(weights | {"base_model.model.rm_head.weight": torch.randn(1, test_qwen_rewards.WIDTH)}, checkpoint / "model.pth")
    (folder / "videoreward" / "model_config.json").write_text(json.dumps({"data_config": {"fps": 4, "max_frame_pixels": 24 * 40}}))
    (folder / "models").mkdir()
    (folder / "models" / "qwen2-vl-2b").symlink_to(qwen)
    (folder / "prompt_template.py").symlink_to(qwen / "authors.py")
    assert follow("videoalign_with_amd.md", smaller=SMALL) == ["sh", "sh", "sh"]
    found = json.loads((folder / "amd.json").read_text())
    assert [row["kind"] for row in found["rows"]] == ["teacher", "student"] and len(found["wins"]) == 3
    assert "videoalign" in json.loads((folder / "runs/amd/recipe.json").read_text())["reward"]


@pytest.mark.slow
def test_own_videos_with_dm_align_pair(folder):
    wan(folder)
    (folder / "my-videos").mkdir()
    (folder / "models").mkdir()
    network, _ = tiny_dinov2(folder / "models" / "dinov2-base")
    network.dinov2.save_pretrained(folder / "models" / "dinov2-base")
    rng = torch.Generator().manual_seed(0)
    for i in range(4):
        save_animation(folder / "my-videos" / f"{i}.webp", torch.randint(256, (5, 16, 16, 3), generator=rng).to(torch.uint8), 16)
        (folder / "my-videos" / f"{i}.txt").write_text("a hen" if i % 2 else "a cat")
    (folder / "liked.jsonl").write_text(json.dumps({"prompt": "a hen", "chosen": "my-videos/1.webp"}) + "\n")
    assert follow("own_videos_with_dm_align_pair.md", smaller=SMALL) == ["sh", "sh", "sh", "sh"]
    assert "force/pair/norm" in (folder / "runs/mine/log.jsonl").read_text() and "force/pair/norm" in (folder / "runs/liked/log.jsonl").read_text()
    assert {"fd", "precision", "vendi_frames"} <= set(json.loads((folder / "mine.json").read_text())["rows"][1]["values"])
    assert len((folder / "slow.jsonl").read_text().splitlines()) == 4
