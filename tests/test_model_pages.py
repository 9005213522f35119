"""The how-tos of models, typed as they stand: a tiny random pipeline lies where the download would be, and numbers are small."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from followed import DOCS, follow
from safetensors.torch import load_file
from test_sit import HEADS, published
from tiny import tiny_image_vae, tiny_sd3_pipeline, tiny_wan22_pipeline, tiny_wan_pipeline
from tiny_families import tiny_sdxl_pipeline, tiny_z_image_pipeline

VIDEO, IMAGE = "48 48 9", "16 16 1"


def saved(make: Callable[[], Any]) -> Callable[[Path], None]:
    return lambda folder: make().save_pretrained(folder)


pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of one's own, from which modules are imported and then forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("my_family", None)


@pytest.mark.parametrize(
    ("page", "name", "make", "size", "student"),
    [
        ("wan21_lora.md", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", tiny_wan_pipeline, VIDEO, "wan-4-step"),
        ("wan22_lora.md", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", tiny_wan22_pipeline, VIDEO, "a14b-4-step"),
        ("sdxl.md", "stabilityai/stable-diffusion-xl-base-1.0", tiny_sdxl_pipeline, IMAGE, "sdxl-4-step"),
        ("sd35.md", "stabilityai/stable-diffusion-3.5-medium", partial(tiny_sd3_pipeline, dual=True), IMAGE, "sd35-4-step"),
        ("z_image.md", "Tongyi-MAI/Z-Image", tiny_z_image_pipeline, IMAGE, "z-image-4-step"),
    ],
)
def test_the_page_of_a_model(page, name, make, size, student, folder):
    seen = follow(page, {name: saved(make)}, size)
    assert seen[:2] == ["sh", "text file"] and "sh" in seen[2:]
    assert (folder / student / "lora.safetensors").is_file() and (folder / student / "model_index.json").is_file()
    assert (folder / student / "lora_2.safetensors").is_file() == (page == "wan22_lora.md")


def test_another_teacher(folder):
    from diffusers import WanPipeline

    small = tiny_wan_pipeline()
    other = WanPipeline(**{**small.components, "transformer": tiny_wan_pipeline(layers=3).transformer})
    models = {"Wan-AI/Wan2.1-T2V-1.3B-Diffusers": saved(tiny_wan_pipeline), "Wan-AI/Wan2.1-T2V-14B-Diffusers": saved(lambda: other)}
    assert follow("other_teacher.md", models, VIDEO) == ["sh", "text file", "sh"]
    assert "taught by `wan-14b`" in (folder / "runs/taught/student/README.md").read_text()


def ink(folder: Path) -> None:
    """A style as stock diffusers writes it."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    pipe = tiny_wan_pipeline()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"]), pipe.transformer)
    rng = torch.Generator().manual_seed(0)
    for key, p in pipe.transformer.named_parameters():
        if "lora_" in key:
            p.data = 0.3 * torch.randn(p.shape, generator=rng)
    pipe.save_lora_weights(folder, weight_name="ink.safetensors", transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))


def test_style_loras(folder):
    models = {"Wan-AI/Wan2.1-T2V-1.3B-Diffusers": saved(tiny_wan_pipeline), "me/ink-style": ink}
    written = {"(480, 832, 33)": "(48, 48, 9)", "iterations=1000": "iterations=1", "height=480, width=832, num_frames=33": "height=48, width=48, num_frames=9"}
    assert follow("style_lora.md", models, VIDEO, written) == ["sh", "python", "python"]


def test_sit(folder):
    """A pickle as the authors publish it, of a width that is no published size."""
    torch.save(published(), "SiT-XL-2-256x256.pt")
    vae = {"stabilityai/sd-vae-ft-ema": saved(partial(tiny_image_vae, scaling_factor=0.18215))}
    smaller = {"--to models/sit-xl": f"--to models/sit-xl --heads {HEADS}", "207\n88\n": "7\n8\n"}  # of ten classes
    assert follow("sit.md", vae, IMAGE, smaller=smaller) == ["text file", "sh"]
    assert {path.name for path in (folder / "runs/sit/student").iterdir()} >= {"transformer", "scheduler", "vae", "README.md"}


def test_a_family_of_one_s_own(folder):
    """The diff that the page shows is that of a family which is there; the rest of the page is run."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (DOCS / "own_family.md").read_text(encoding="utf-8"), re.DOTALL)
    added = re.findall(r"^\+\+\+ b/(\S+)\n\+( .*)$", diff, re.MULTILINE)
    assert [file for file, _ in added] == ["src/instep/models/families.py", "tests/family_cases.py"]
    for file, line in added:
        assert line in (DOCS.parents[1] / file).read_text(encoding="utf-8").splitlines()
    tiny_sd3_pipeline().save_pretrained("my-model")
    assert follow("own_family.md", written={"Size(512, 512, 1)": "Size(16, 16, 1)", "iterations=1000": "iterations=1"}) == ["diff", "python file", "python"]
    record = json.loads((folder / "runs/sprites/recipe.json").read_text())
    assert record["model"] == "sprites" and record["size"] == {"height": 16, "width": 16, "frames": 1}
    assert not any("add_q_proj" in key for key in load_file(folder / "runs/sprites/student/lora.safetensors"))
