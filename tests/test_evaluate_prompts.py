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

from instep.bundled import WORLDS, find, load
from instep.cli import evaluate_prompts
from instep.cli.main import main
from instep.core.statistics import wilson
from instep.data.animation import save_animation
from instep.data.prompt import as_prompts
from instep.metrics import image_features
from instep.metrics.any_model import Given, Networks, Seen, gathered, key_frames, measures, observe, temporal_consistency
from instep.metrics.figures import frechet_distance, vendi
from instep.metrics.image_features import frame_features
from instep.metrics.win_rate import win_rate
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
    # frames at 0, 150 and 180 degrees: what is negative counts as 0, and cos 30 is left
    angles = torch.tensor([0.0, 150.0, 180.0]).deg2rad()
    opposed = torch.stack([angles.cos(), angles.sin()], 1)[None]
    assert float(temporal_consistency(opposed)) == pytest.approx(math.cos(math.radians(30)) / 4, abs=1e-6)


def test_measures_of_known_samples(clip):
    network = frame_features(str(clip[0]))
    bright = FunctionReward(lambda media, prompts: media.flatten(1).mean(1), name="bright")
    grey = torch.linspace(0.05, 0.75, 8).reshape(8, 1, 1, 1, 1).expand(8, 3, 4, 32, 32).clone()
    grey[:, :, 1::2] += 0.1  # flickers by 0.1 at each of three changes
    prompts = as_prompts(["a"] * 4 + ["b"] * 4)
    seen = gathered([observe(grey[rows], prompts[rows], bright, Networks(network)) for rows in (slice(0, 4), slice(4, 8))])
    found = measures(seen, 4)
    assert found["reward_0"].value == pytest.approx(0.45, abs=1e-6) == found["mean_brightness"].value
    assert found["flicker"].value == pytest.approx(0.9, abs=1e-6) and 1 <= found["vendi"].value <= 4
    want = network(grey)
    torch.testing.assert_close(seen.features, want.mean(1))
    assert found["consistency"].value == pytest.approx(float(temporal_consistency(want).mean()))
    # the error is that between samples of a prompt, not between prompts
    assert found["reward_0"].se < 0.06 < float(seen.values["reward_0"].std()) / math.sqrt(8)
    image = observe(grey[:, :, 0], prompts, None)
    assert set(measures(image, 4)) == {"mean_brightness", "vendi_pixels"}
    # first and last frame of four; each prompt by itself, against the authors' Vendi score
    frames = torch.stack([want[:4, 0], want[4:, 0], want[:4, 3], want[4:, 3]])
    assert found["vendi_frames"].value == pytest.approx(sum(vendi(each) for each in frames) / 4, abs=1e-5)
    assert found["vendi_pixels"].value == pytest.approx(1, abs=1e-6), "grey frames differ in length alone"
    dark = observe(torch.cat([torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)]), prompts[:4], None)
    assert measures(dark, 4)["vendi_pixels"].value == pytest.approx(2, abs=1e-6), "black frames are alike"


def test_distances_to_given_data():
    rng = torch.Generator().manual_seed(0)
    features, real = torch.randn(40, 3, generator=rng), torch.randn(30, 3, generator=rng)
    found = measures(Seen({"mean_brightness": torch.zeros(40)}, features, features[:, :2]), 4, Given(real, real[:, :2]))
    assert found["fd"].value == pytest.approx(frechet_distance(features, real)) and found["fd"].se > 0
    assert found["sfd"].value == pytest.approx(frechet_distance(features[:, :2], real[:, :2])) and found["sfd"].se > 0
    far = measures(Seen({"mean_brightness": torch.zeros(40)}, features + 100), 4, Given(real))
    assert far["precision"].value == far["recall"].value == 0 and found["precision"].value > 0.8
    assert far["fd"].value == pytest.approx(3e4, rel=0.02)


def test_features_are_the_networks_own(clip, tmp_path, monkeypatch):
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
    with torch.no_grad():
        places = classifier.dinov2(pixel_values=by_hand(resized(frames, 32, 44)[..., 2:30, 8:36], *normal)).last_hidden_state[:, 1:]
    assert places.shape[1:] == (4, 16)
    torch.testing.assert_close(frame_features(str(tmp_path)).spatial(frames), places.flatten(1), atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(image_features, "SPATIAL", 15)
    assert frame_features(str(tmp_path)).spatial(frames).shape == (6, 12), "three channels at four places"
    with pytest.raises(ValueError, match="features: .* is no folder"):
        frame_features(str(tmp_path / "nothing"))


def test_key_frames_are_twenty_apart():
    assert key_frames(81) == [0, 20, 40, 60, 80] and key_frames(21) == [0, 20] and key_frames(20) == [0, 19] and key_frames(1) == [0]


def test_win_rates_are_paired_and_their_intervals_know_prompts():
    prompt = torch.arange(40) // 4
    alternating = torch.tensor([1.0, 0.0] * 20)
    mixed = win_rate(alternating, torch.full((40,), 0.5), prompt)
    assert (mixed.value, mixed.n) == (0.5, 40), "every prompt has half: pairs are worth at least what independent ones are"
    assert mixed == wilson(20, 40)
    whole = win_rate((prompt % 2).double(), torch.full((40,), 0.5), prompt)
    assert whole.value == 0.5 and whole.n == 10 and whole.high - whole.low > 1.5 * (mixed.high - mixed.low), "four samples of a prompt that agree are one"
    assert win_rate(torch.zeros(8), torch.zeros(8), prompt[:8]).value == 0.5 and win_rate(torch.ones(8), torch.zeros(8), prompt[:8]) == wilson(2, 2)
    with pytest.raises(ValueError, match="scores: 3 and 2 of 3 prompts cannot be paired"):
        win_rate(torch.zeros(3), torch.zeros(2), prompt[:3])


def test_a_class_conditional_model_on_the_command_line(tmp_path, monkeypatch, capsys):
    """The bundled digits have no stock pipeline; prompts are classes."""
    monkeypatch.chdir(tmp_path)
    tiny_dinov2(tmp_path / "dino")
    (tmp_path / "prompts.txt").write_text("3\n7\n")
    (tmp_path / "data").mkdir()
    for i in range(5):
        Image.new("RGB", (8, 8), (50 * i, 0, 90)).save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text("a colour")
    shutil.copytree(tmp_path / "dino", tmp_path / "features")
    line = ["eval", "digits", "digits", "--prompts", "prompts.txt", "--copies", "4", "--steps", "2", "--guidance", "1", "--real", "data"]
    assert main([*line, "--features", "dino", "--classifier", "dino", "--reward", "compressible"]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    values = found["rows"][0]["values"]
    assert {"inception_score", "sfd", "fd", "vendi_pixels"} <= set(values) and 1 <= values["inception_score"]["value"] <= 4
    # the same model against itself, with the same noise
    (win,) = found["wins"]
    assert (win["value"], win["model"], win["reward"]) == (0.5, "digits", "compressible") and values == found["rows"][1]["values"] | {
        "seconds": values["seconds"]
    }
    assert "digits has more compressible than digits in 50 % of pairs" in capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("3\nhorse\n")
    assert main([*line[:2], *line[3:9], "--out", "a.json"]) == 2 and "prompts: 'horse' is no class of digits" in capsys.readouterr().err
    assert main([*line[:2], "--prompts", "prompts.txt", "--out", "a.json", "--classifier", "none"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_bundled_worlds_on_the_command_line(world, clip, tmp_path, monkeypatch):
    """Each on two prompts of its own, against real samples of its own kind; a second model of the same weights wins half of the pairs."""
    monkeypatch.chdir(tmp_path)
    family, prompts = load(world), find(world).ready().prompts
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in (prompts[0], prompts[-1])))
    (tmp_path / "data").mkdir()
    frames = torch.randint(256, (6, family.size.frames, family.size.height, family.size.width, 3), generator=torch.Generator().manual_seed(0))
    for i, video in enumerate(frames.to(torch.uint8)):
        save_animation(tmp_path / "data" / f"{i}.webp", video, 16)
        (tmp_path / "data" / f"{i}.txt").write_text("noise")
    line = ["eval", world, world, "--prompts", "prompts.txt", "--copies", "4", "--steps", "1", "--guidance", "1", "--real", "data", "--features", str(clip[0])]
    assert main([*line, "--reward", "compressible"]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    values = found["rows"][0]["values"]
    video = {"flicker", "dynamic_degree", "consistency", "vendi_frames"} if family.size.frames > 1 else {"sfd"}
    assert {"reward_0", "fd", "precision", "recall", "vendi", "vendi_pixels"} | video <= set(values) and found["wins"][0]["value"] == 0.5
    assert all(math.isfinite(each["value"]) and math.isfinite(each["se"]) for each in values.values())


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
    assert set(row["values"]) == {
        "mean_brightness",
        "flicker",
        "dynamic_degree",
        "reward_0",
        "reward_1",
        "vendi",
        "vendi_frames",
        "vendi_pixels",
        "consistency",
        "seconds",
    }
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
        (["eval", "sd3", "bare", *line, "--out", "a.json"], "model: bare/vae/diffusion_pytorch_model.safetensors is missing"),
        (["eval", "sd3", "wan", *line, "--size", "16", "16", "4", "--out", "a.json"], "size: "),
        (["eval", "sd3", "--prompts", "first.txt", "--out", "a.json"], "names a first frame, and sd3 takes text alone"),
        (["eval", "sd3", *line, "--out", "flat/a.json"], "out: flat/a.json cannot be written, because"),
        (["eval", "sd3", *line, "--out", "sd3.json"], "out: sd3.json exists"),
        (["eval", "sd3", "--reward", "compressible"], "reward: it measures samples of your own prompts; give them with --prompts FILE"),
        (["eval", *line, "--out", "a.json"], "dirs: none was given"),
        (["eval", "sd3", *line[:2], "--copies", "1", "--out", "a.json"], "copies: 2 prompts x 1 are too few"),
        (["eval", "sd3", *line, "--out", "a.json", "--real", "data"], "features: none were given; distances"),
        (["eval", "sd3", *line, "--out", "a.json", "--real", "data", "--features", str(clip[0])], "real: 5 files and 4 samples are too few"),
    ):
        assert main(wrong) == 2 and message in capsys.readouterr().err, wrong
