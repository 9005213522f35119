"""The README's six lines, run as they are printed there (fewer iterations, a tiny pipeline)."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tiny import tiny_wan_pipeline

import instep

README = Path(__file__).parents[1] / "README.md"


def test_the_ten_lines_of_the_readme(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    model = tmp_path / "wan"
    tiny_wan_pipeline().save_pretrained(model)
    monkeypatch.chdir(tmp_path)
    code = code.replace('"path/to/wan"', repr(str(model)))
    assert code.count("instep.dm_align_group,") == 1
    code = code.replace("dm_align_group,", "dm_align_group(instep.Common(steps=4, batch=4, critic_updates=1), distil=1, iterations=1, group=2),")
    scope: dict = {}
    exec(compile(code, str(README), "exec"), scope)
    student = scope["few_step"]
    student.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    video = student("a seven", height=48, width=48, num_frames=9, num_inference_steps=4, guidance_scale=1.0, output_type="pt").frames
    assert video.shape == (1, 9, 3, 48, 48)
    assert scope["run"].recipe.name == "dm-align-group"


def test_public_names_are_importable():
    for name in instep.__all__:
        assert getattr(instep, name) is not None
