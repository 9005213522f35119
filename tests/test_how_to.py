"""The how-tos, run as they stand: files are written under the names that the text gives them, commands and Python run in the order of the page."""

from __future__ import annotations

import json
import sys

import pytest
from followed import follow

from instep.lab.run import common
from instep.lab.spec import build


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of one's own, from which modules are imported and then forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
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
    assert follow("own_reward.md") == ["python file", "sh", "python"]
    assert json.loads((folder / "runs/bright/recipe.json").read_text())["reward"] == "bright"
    assert json.loads((folder / "runs/contrast/recipe.json").read_text())["reward"] == "contrast"


def test_own_recipe(folder, capsys):
    assert follow("own_recipe.md") == ["python file", "sh", "python"]
    out = capsys.readouterr().out
    assert "weight of the alignment force" in out and "gentle, stage align" in out
    assert json.loads((folder / "runs/gentle/recipe.json").read_text())["recipe_source"].startswith("my_recipe:gentle ")
    assert build("my_recipe:gentle:weight=0.5", common(), 30).stages[-1].terms[1].weight == 0.5, "as in the laboratory"
