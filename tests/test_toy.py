"""`examples/toy.py`: short, run as it stands, and its two forces do what the text says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

FILE = Path(__file__).parents[1] / "examples" / "toy.py"


@pytest.fixture(scope="module")
def toy():
    spec = importlib.util.spec_from_file_location("toy", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["toy"]


def test_it_is_short_and_draws_a_picture(tmp_path):
    assert len(FILE.read_text().splitlines()) <= 150
    subprocess.run([sys.executable, FILE, "--iterations", "4", "--out", tmp_path / "toy.png"], check=True, capture_output=True, timeout=120)
    assert Image.open(tmp_path / "toy.png").size == (960, 272)


def test_few_iterations_go_where_the_forces_point(toy):
    """Matching brings samples nearer to the modes; the reward then rises."""
    samples = toy.train(iterations=150)
    away = {name: float(torch.cdist(x, toy.MIXTURE.means).amin(1).mean()) for name, x in samples.items()}
    reward = {name: float(toy.reward(x).mean()) for name, x in samples.items()}
    assert away["teacher, 40 steps"] < 0.3 and away["1 step, distilled"] < 0.75 * away["1 step, before"], away
    assert reward["1 step, and aligned"] > reward["1 step, distilled"] + 0.03, reward


def test_the_climb_is_the_gradient_of_the_mean_reward(toy):
    from instep.diffusion.rollout import Point, Rollout

    x = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    point = Point(x, x, torch.ones(2), torch.zeros(2, dtype=torch.long))
    batch = toy.prompts(2, torch.Generator().manual_seed(0))
    view = toy.View({}, toy.PATH, batch, 0.0, torch.Generator(), Rollout(batch.cond, 1, point))
    slope = 2 * toy.reward(x) * (1 - toy.reward(x)) / 2
    assert torch.allclose(toy.Climb()(view), torch.stack([-slope, torch.zeros(2)], 1))
