"""`instep eval --prompts`: measures against closed forms, features against the networks themselves, and two tiny families through the command line."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from test_named_rewards import by_hand, resized, tiny_dinov2
from test_preferences import tiny_clip
from tiny import tiny_sd3_pipeline, tiny_wan_pipeline

from instep.cli import evaluate_prompts
from instep.cli.main import main
from instep.data.prompt import as_prompts
from instep.metrics.any_model import Seen, gathered, measures, observe, temporal_consistency
from instep.metrics.figures import frechet_distance
from instep.metrics.image_features import frame_features
from instep.rewards.base import FunctionReward


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, tiny_clip(folder)[0]


def test_consistency_is_the_mean_of_two_cosines():
    """Three frames at 0, 60 and 90 degrees: ((cos 60 + cos 60) + (cos 90 + cos 30)) / 4; lengths do not count."""
    angles = torch.tensor([0.0, 60.0, 90.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], 1)[None] * torch.tensor([1.0, 5.0, 0.2])[None, :, None]
    assert float(temporal_consistency(features)) == pytest.approx((1 + math.cos(math.radians(30))) / 4, abs=1e-6)
    assert float(temporal_consistency(torch.ones(1, 4, 3))) == pytest.approx(1)


def test_measures_of_known_samples(clip):
    network = frame_features(str(clip[0]))
    bright = FunctionReward(lambda media, prompts: media.flatten(1).mean(1), name="bright")
    grey = torch.linspace(0, 0.8, 8).reshape(8, 1, 1, 1, 1).expand(8, 3, 4, 32, 32).clone()
    grey[:, :, 1::2] += 0.1  # flickers by 0.1 at each of three changes
    prompts = as_prompts(["a"] * 4 + ["b"] * 4)
    seen = gathered([observe(grey[rows], prompts[rows], bright, network) for rows in (slice(0, 4), slice(4, 8))])
    found = measures(seen, 4)
    assert found["reward_0"].value == pytest.approx(0.45, abs=1e-6) == found["mean_brightness"].value
    assert found["flicker"].value == pytest.approx(0.9, abs=1e-6) and 1 <= found["vendi"].value <= 4
    want = network(grey)
    torch.testing.assert_close(seen.features, want.mean(1))
    assert found["consistency"].value == pytest.approx(float(temporal_consistency(want).mean()))
    # the error is that between samples of a prompt, not between prompts
    assert found["reward_0"].se < 0.06 < float(seen.values["reward_0"].std()) / math.sqrt(8)
    image = observe(grey[:, :, 0], prompts, None, None)
    assert set(measures(image, 4)) == {"mean_brightness"}


def test_distances_to_given_data():
    rng = torch.Generator().manual_seed(0)
    features, real = torch.randn(40, 3, generator=rng), torch.randn(30, 3, generator=rng)
    found = measures(Seen({"mean_brightness": torch.zeros(40)}, features), 4, real)
    assert found["fd"].value == pytest.approx(frechet_distance(features, real)) and found["fd"].se > 0
    far = measures(Seen({"mean_brightness": torch.zeros(40)}, features + 100), 4, real)
    assert far["precision"].value == far["recall"].value == 0 and found["precision"].value > 0.8
    assert far["fd"].value == pytest.approx(3e4, rel=0.02)


def test_features_are_the_networks_own(clip, tmp_path):
    media = torch.rand(2, 3, 3, 40, 56)
    frames = media.transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        want = clip[1].get_image_features(pixel_values=by_hand(resized(frames, 32, 44)[..., 6:38])).pooler_output
    torch.testing.assert_close(frame_features(str(clip[0]))(media), want.unflatten(0, (2, 3)), atol=1e-4, rtol=1e-4)
    classifier, normal = tiny_dinov2(tmp_path)
    classifier.dinov2.save_pretrained(tmp_path)
    with torch.no_grad():
        want = classifier.dinov2(pixel_values=by_hand(resized(frames, 32, 44)[..., 2:30, 8:36], *normal)).last_hidden_state[:, 0]
    torch.testing.assert_close(frame_features(str(tmp_path))(media), want.unflatten(0, (2, 3)), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="features: .* is no folder"):
        frame_features(str(tmp_path / "nothing"))


def test_two_families_on_the_command_line(clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_wan_pipeline().save_pretrained("wan")
    tiny_sd3_pipeline().save_pretrained("sd3")
    (tmp_path / "prompts.txt").write_text("a hen\na cat\n")
    (tmp_path / "data").mkdir()
    for i in range(5):
        Image.new("RGB", (20, 16), (50 * i, 0, 90)).save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text("a colour")
    line = ["--prompts", "prompts.txt", "--copies", "2", "--steps", "1", "--guidance", "1"]
    assert main(["eval", "wan", *line, "--size", "16", "16", "5", "--reward", "compressible, dynamic-degree", "--features", str(clip[0])]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    row = found["rows"][0]
    assert set(row["values"]) == {"mean_brightness", "flicker", "dynamic_degree", "reward_0", "reward_1", "vendi", "consistency", "seconds"}
    assert (row["n"], row["nfe"], row["kind"]) == (4, 1, "teacher") and row["values"]["reward_1"] == row["values"]["dynamic_degree"]
    assert [column["head"] for column in found["columns"]][:2] == ["compressible", "dynamic-degree"] and found["protocol"]["prompts"] == ["a hen", "a cat"]
    assert "wrote evaluation.json" in capsys.readouterr().out
    image = ["eval", "sd3", *line[:2], "--copies", "4", *line[4:], "--size", "16", "16", "1", "--features", str(clip[0]), "--real", "data"]
    read, real_reader = [], evaluate_prompts.read_clip
    monkeypatch.setattr(evaluate_prompts, "read_clip", lambda path, *more: read.append(path) or real_reader(path, *more))
    assert main([*image[:2], "sd3", *image[2:], "--out", "sd3.json"]) == 0
    assert len(read) == len(set(read)) > 0, "the given data are read once for all models of a size"
    values = json.loads((tmp_path / "sd3.json").read_text())["rows"][0]["values"]
    assert {"fd", "precision", "recall", "vendi"} <= set(values) and "flicker" not in values and values["fd"]["value"] > 0
    capsys.readouterr()
    shutil.copytree("sd3", "bare")
    (tmp_path / "bare" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "first.txt").write_text("a hen [image: hen.png]\n" * 4)
    (tmp_path / "flat").write_text("")
    monkeypatch.setattr(evaluate_prompts, "measured", lambda *_: pytest.fail("nothing is measured before all is checked"))
    for wrong, message in (
        (["eval", "sd3", "nothing", *line, "--out", "a.json"], "dir: 'nothing' is neither a finished run"),
        (["eval", "sd3", "bare", *line, "--out", "a.json"], "model: bare/vae has no weights"),
        (["eval", "sd3", "wan", *line, "--size", "16", "16", "4", "--out", "a.json"], "size: "),
        (["eval", "sd3", "--prompts", "first.txt", "--out", "a.json"], "names a first frame, and sd3 takes text alone"),
        (["eval", "sd3", *line, "--out", "flat/a.json"], "out: flat/a.json cannot be written (File exists); choose another place with --out"),
        (["eval", "sd3", *line, "--out", "sd3.json"], "out: sd3.json exists"),
        (["eval", "sd3", "--reward", "compressible"], "reward: it measures samples of your own prompts; give them with --prompts FILE"),
        (["eval", *line, "--out", "a.json"], "dirs: none was given"),
        (["eval", "sd3", *line[:2], "--copies", "1", "--out", "a.json"], "copies: 2 prompts x 1 are too few"),
        (["eval", "sd3", *line, "--out", "a.json", "--real", "data"], "features: none were given; distances"),
        (["eval", "sd3", *line, "--out", "a.json", "--real", "data", "--features", str(clip[0])], "real: 5 files and 4 samples are too few"),
    ):
        assert main(wrong) == 2 and message in capsys.readouterr().err, wrong
