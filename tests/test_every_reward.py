"""What every reward with a name has in common, on tiny random networks: memory layout, dtype, order of the batch and device do not matter, media stay in range,
and what is missing is one line. Values and gradients against a second computation: test_named_rewards.py, test_qwen_rewards.py."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import test_qwen_rewards as qwen
import torch
from second_device import NoMixing
from test_named_rewards import published_image_reward, tiny_dinov2
from test_ocr import Brightness
from test_preferences import tiny_clip
from test_reward_inputs import Decoder
from torch.utils._python_dispatch import TorchDispatchMode

from instep.cli.main import main
from instep.cli.rewards import load_reward
from instep.rewards.base import RewardError, checked_scores
from instep.rewards.convert import convert
from instep.rewards.decoded import make_reward_fn, make_reward_grad_fn
from instep.rewards.named import NAMED
from instep.rewards.score_head import ScoreHead

WORDS = ("a hen", "a red cat runs", "two")
base = qwen.base


@dataclass(frozen=True)
class Case:
    """How a reward is given on the command line, and prompts that it can score."""

    text: str
    prompts: tuple[str, ...] = WORDS


@pytest.fixture(scope="module")
def cases(base, tmp_path_factory) -> dict[str, Case]:
    """Every reward with a name; those with networks from folders of tiny ones."""
    at = tmp_path_factory.mktemp("every")
    tiny_clip(at / "clip")
    tiny_dinov2(at / "dinov2")
    torch.manual_seed(0)
    torch.save(ScoreHead(24).state_dict(), at / "head.pth")
    convert(at / "head.pth", at / "aesthetic")
    published_image_reward(at)
    convert(at / "ImageReward.pt", at / "imagereward", at / "bert")
    folder, network, _ = base
    qwen.published_hpsv3(network, at)
    convert(at / "HPSv3.safetensors", at / "hpsv3", folder, folder / "authors.py")
    record = json.loads((at / "hpsv3" / "reward.json").read_text())
    (at / "hpsv3" / "reward.json").write_text(json.dumps(record | {"pixels": [16 * 24] * 2}))
    (at / "videoreward" / "checkpoint-1").mkdir(parents=True)
    torch.save(qwen.published_videoalign(network)[0], at / "videoreward" / "checkpoint-1" / "model.pth")
    (at / "videoreward" / "model_config.json").write_text(json.dumps(qwen.SETTINGS))
    convert(at / "videoreward" / "checkpoint-1" / "model.pth", at / "videoalign", folder, folder / "authors.py")
    clips = {name: Case(f"folder={at / 'clip'} {name}") for name in ("clipscore", "dfn-clip", "pickscore", "hpsv2")}
    return clips | {
        "aesthetic": Case(f"folder={at / 'aesthetic'} base={at / 'clip'} aesthetic"),
        "dinov2": Case(f"folder={at / 'dinov2'} dinov2", ("hen", "0", "tench")),
        "imagereward": Case(f"folder={at / 'imagereward'} imagereward"),
        "hpsv3": Case(f"folder={at / 'hpsv3'} dtype=float32 hpsv3"),
        "videoalign": Case(f"folder={at / 'videoalign'} dtype=float32 fps=8 videoalign"),
        **{name: Case(name) for name in ("compressible", "incompressible", "dynamic-degree")},
        "ocr": Case("ocr", ('a "127"', 'a "1"', 'a "90"')),
    }


def reward_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("instep.rewards.named.rapid_ocr", Brightness)
    return load_reward(case.text)


def test_no_reward_is_left_out(cases):
    assert set(cases) == set(NAMED)


def video(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 3, 6, 24, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMED)
def test_layout_dtype_and_order_do_not_matter(cases, name, monkeypatch):
    case, media = cases[name], video()
    reward, prompts = reward_of(case, monkeypatch), list(case.prompts)
    got = checked_scores(reward, media, prompts)
    close = {"atol": 1e-4 * float(got.abs().max()), "rtol": 1e-4}
    assert got.dtype == torch.float32 and got.shape == (3,) and len(got.unique()) == 3 and reward.differentiable == NAMED[name].gradient
    for other in (media.contiguous(memory_format=torch.channels_last_3d), media.transpose(0, 4).contiguous().transpose(0, 4), media.double()):
        torch.testing.assert_close(checked_scores(reward, other, prompts), got, **close)
    rounded = media.bfloat16()
    torch.testing.assert_close(checked_scores(reward, rounded, prompts), checked_scores(reward, rounded.float(), prompts), **close)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(checked_scores(reward, media[order], [prompts[i] for i in order]), got[order], **close)
    for i in range(3):
        torch.testing.assert_close(checked_scores(reward, media[i : i + 1], prompts[i : i + 1]), got[i : i + 1], **close)


@pytest.mark.parametrize("name", NAMED)
def test_a_decoder_that_leaves_the_range_changes_nothing_else(cases, name, monkeypatch):
    """Scores are those of the clamped media, black and white ones too; a gradient reaches the pixels outside, and each sample its own alone."""
    case, media = cases[name], video() * 1.6 - 0.3
    reward, prompts = reward_of(case, monkeypatch), list(case.prompts)
    fn = make_reward_fn(Decoder(), reward)
    want = checked_scores(reward, media.clamp(0, 1), prompts)
    torch.testing.assert_close(fn(media, prompts), want)
    assert checked_scores(reward, torch.stack([torch.zeros_like(media[0]), torch.ones_like(media[0]), media[0].clamp(0, 1)]), prompts).isfinite().all()
    climbed = make_reward_grad_fn(Decoder(), reward)
    assert (climbed is not None) == NAMED[name].gradient
    if climbed is not None:
        x = media.clone().requires_grad_()
        scores = climbed(x, prompts)
        torch.testing.assert_close(scores.detach(), want, atol=1e-4 * float(want.abs().max()), rtol=1e-4)
        slope = torch.autograd.grad(scores[1], x)[0]
        outside = (media[1] < 0) | (media[1] > 1)
        assert not slope[[0, 2]].any() and slope[1][outside].abs().sum() > 0


NEEDED = [(name, needed, setting) for name, known in NAMED.items() for needed, setting in zip(known.needs, ("folder", "base"), strict=False)]


@pytest.mark.parametrize(("name", "setting"), [(name, setting) for name, _, setting in NEEDED])
def test_a_folder_that_lacks_something_is_one_line(cases, name, setting, tmp_path, capsys):
    case = cases[name]
    whole = Path(case.text.split(f"{setting}=")[1].split(" ")[0])
    needed = next(needed for other, needed, key in NEEDED if (other, key) == (name, setting))

    def refused(folder: Path) -> str:
        text = case.text.replace(f"{setting}={whole}", f"{setting}={folder}")
        assert main(["train", "dm-align-group", "--steps", "1", "--reward", text, "--out", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and said[0].startswith("error: reward: ") and not (tmp_path / "run").exists()
        return said[0]

    assert f"{setting}: {tmp_path / 'nowhere'} is no folder" in refused(tmp_path / "nowhere")
    for i, pattern in enumerate(needed.files):
        shutil.copytree(whole, tmp_path / f"{i}")
        for file in list((tmp_path / f"{i}").glob(pattern)):
            file.unlink()
        said = refused(tmp_path / f"{i}")
        assert f"{setting}: {tmp_path / str(i)} lacks {pattern}" in said and needed.fetch in said
    for i, file in enumerate(sorted(whole.glob("*.safetensors"))):
        shutil.copytree(whole, tmp_path / f"torn{i}")
        (tmp_path / f"torn{i}" / file.name).write_bytes(file.read_bytes()[:100])
        assert f"{name}: {tmp_path / f'torn{i}'}" in refused(tmp_path / f"torn{i}")


@pytest.mark.parametrize("name", ["clipscore", "dfn-clip", "pickscore", "hpsv2", "imagereward", "hpsv3", "videoalign", "dinov2", "ocr"])
def test_an_empty_prompt_is_one_line(cases, name, monkeypatch):
    reward = reward_of(cases[name], monkeypatch)
    for empty in ("", " \n"):
        with pytest.raises(RewardError, match=f"reward '?{name}'?: the prompt .*(is empty|is no class|has no text)") as caught:
            checked_scores(reward, video(), [cases[name].prompts[0], empty, cases[name].prompts[2]])
        assert "\n" not in str(caught.value).replace(repr(empty), "")


class Held(TorchDispatchMode):
    """Conditions that a network reads back from the meta device are taken to hold: text encoders of transformers ask whether a padding mask is needed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = str(func).startswith("aten._local_scalar_dense") and args[0].is_meta and args[0].dtype == torch.bool
        return True if asked else func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in NAMED if NAMED[name].needs and name not in ("hpsv3", "videoalign")])
def test_on_another_device_nothing_mixes_with_the_host(cases, name, monkeypatch):
    """On torch's meta device, where a score has no value, but an operation on tensors of two devices raises, as it would on a GPU.

    Qwen2-VL reads sizes of images back from the device, so `hpsv3` and `videoalign` cannot be traced there; those without a network work on the host.
    """
    case = cases[name]
    reward, media = reward_of(case, monkeypatch), torch.rand(3, 3, 24, 32, device="meta", requires_grad=True)
    with Held():
        reward.score(media, list(case.prompts))  # the networks come to the device
    with NoMixing(), Held():
        found = reward.score(media, list(case.prompts))
    assert found.is_meta and found.shape == (3,) and torch.autograd.grad(found.sum(), media)[0].shape == media.shape
