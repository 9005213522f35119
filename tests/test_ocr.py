"""The reward of legible text: edit distances, quotes, frames, refusals; PP-OCR itself where it is installed."""

import importlib.util
import itertools
import random
import socket
import sys

import numpy as np
import pytest
import torch

from instep.bundled import words
from instep.bundled.words import Spec
from instep.cli.main import main
from instep.cli.rewards import load_reward
from instep.rewards import ocr
from instep.rewards.base import RewardError, check_prompts, checked_scores
from instep.rewards.frames import SampledFrames
from instep.rewards.ocr import OCR, edit_distance, likeness, quoted, rapid_ocr
from instep.rewards.several import several


class Brightness:
    """Reads a frame's mean brightness as a text: 0 to 255."""

    name = "brightness"

    def __init__(self):
        self.shapes = []

    def read(self, frame):
        assert frame.dtype == torch.uint8
        self.shapes.append(tuple(frame.shape))
        return str(round(float(frame.float().mean())))


def _shortest(a, b):
    """The edit distance by search: strings one edit away, then two ..."""
    seen, front = {a}, {a}
    for distance in itertools.count():
        if b in front:
            return distance
        cut = {s[:i] + s[i + 1 :] for s in front for i in range(len(s))}
        put = {s[:i] + c + s[i:] for s in front for i in range(len(s) + 1) for c in "ab"}
        turned = {s[:i] + c + s[i + 1 :] for s in front for i in range(len(s)) for c in "ab"}
        front = (cut | put | turned) - seen
        seen |= front


def test_edit_distance_is_the_fewest_edits():
    rng = random.Random(0)
    for _ in range(40):
        a, b = ("".join(rng.choice("ab") for _ in range(rng.randint(0, 4))) for _ in range(2))
        assert edit_distance(a, b) == _shortest(a, b), (a, b)
    assert edit_distance("kitten", "sitting") == 3


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("OPEN", "OPEN", 1.0),
        ("o pen\n", "Open", 1.0),
        ("WE ARE OPEN", "open", 1.0),
        ("OPFN", "OPEN", 0.75),
        ("PEN", "OPEN", 0.75),
        ("", "OPEN", 0.0),
        ("something else entirely", "OPEN", 0.0),
        ("HELLOWORL", "Hello World", 0.9),
    ],
)
def test_likeness_is_flow_grpo_s(read, wanted, score):
    assert likeness(read, wanted) == pytest.approx(score)


def test_the_text_is_that_of_the_first_quotes():
    assert quoted('a sign "Open now", not "closed"') == "Open now" and quoted("a sign “Open”") == "Open"
    for prompt in ("a sign", 'a sign ""', 'a "', 'a sign " "'):
        with pytest.raises(RewardError, match="has no text between quotes; write for example: a sign that says"):
            quoted(prompt)


def test_a_video_s_score_is_the_mean_over_every_fourth_frame():
    reward = OCR(Brightness())
    media = torch.zeros(2, 3, 9, 8, 16)
    media[0, :, 0], media[0, :, 4], media[0, :, 8] = 10 / 255, 100 / 255, 200 / 255
    media[1, :, ::4] = 200 / 255
    found = reward.score(media, ['a "200"', 'a "200"'])
    assert torch.allclose(found, torch.tensor([(1 / 3 + 2 / 3 + 1) / 3, 1.0])) and reward.recogniser.shapes == [(8, 16, 3)] * 6
    images = reward.score(media[:, :, 0], ['a "10"', 'a "19"'])
    assert torch.allclose(images, torch.tensor([1.0, 0.0]))
    assert (reward.differentiable, reward.space, reward.name) == (False, "pixel", "ocr (brightness)")


def test_every_prompt_is_looked_at_before_a_run():
    reward = OCR(Brightness())
    for each in (reward, SampledFrames(reward, 2), several((reward, 1.0), (lambda media, prompts: media.mean((1, 2, 3)), 1.0))):
        check_prompts(each, ['a "b"', 'a "c"'])
        with pytest.raises(RewardError, match="the prompt 'a bird' has no text"):
            check_prompts(each, ['a "b"', "a bird", 'a "c"'])
    check_prompts(lambda media, prompts: media, ["a bird"])


def test_a_run_with_a_prompt_without_quotes_ends_in_one_line_before_it_begins(monkeypatch, tmp_path, capsys):
    """Also where it is neither the first nor the last prompt, which the trial of every reward looks at: nothing is written."""
    monkeypatch.setattr("instep.rewards.named.rapid_ocr", Brightness)
    (tmp_path / "prompts.txt").write_text('a "seven"\na seven\na "two"\n')
    line = ["train", "dm-align-group", "--steps", "1", "--reward", "ocr", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "run")]
    assert main(line) == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and "the prompt 'a seven' has no text between quotes" in err.splitlines()[-1] and not (tmp_path / "run").exists()


def test_without_its_packages_the_reward_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"ocr: it needs onnxruntime, which is not installed; run: pip install 'instep\[ocr\]'"):
        rapid_ocr()
    assert main(["train", "dm-align-group", "--reward", "ocr"]) == 2
    assert capsys.readouterr().err == "error: reward: ocr: it needs onnxruntime, which is not installed; run: pip install 'instep[ocr]'\n"


def test_the_command_line_takes_frames_and_weights(monkeypatch):
    monkeypatch.setattr("instep.rewards.named.rapid_ocr", Brightness)
    both = load_reward("0.5*frames=3 ocr, compressible")
    assert both.name == "0.5 ocr (brightness), 3 frames + 1 compressible"


needs_ocr = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("rapidocr", "onnxruntime"))), reason="the extra ocr is not installed")


@pytest.fixture(scope="module")
def pp_ocr():
    """The reward by its name, with PP-OCR's own weights; no connection is made."""
    connect = socket.socket.connect

    def refused(self, address):
        raise AssertionError(f"a connection to {address}")

    socket.socket.connect = refused
    try:
        yield load_reward("ocr")
    finally:
        socket.socket.connect = connect


@needs_ocr
def test_pp_ocr_reads_a_word_and_not_another(pp_ocr):
    media = words.render([Spec("KTLB", "still", None, "large", "sans")], seed=0).media
    large = torch.nn.functional.interpolate(media[:, :, 0], scale_factor=4.0, mode="bicubic").clamp(0, 1)
    assert pp_ocr.score(large, ['the word "KTLB"']).item() == 1.0
    assert pp_ocr.score(large, ['the word "VOSY"']).item() <= 0.25
    assert pp_ocr.score(torch.ones(1, 3, 64, 128), ['the word "KTLB"']).item() == 0.0
    assert ocr.EVERY == 4


@needs_ocr
def test_pp_ocr_reads_the_bundled_world_as_it_is(pp_ocr):
    """Moving words of 64 x 32, frames 0, 4 and 8 of each video: right ones score higher than each other's."""
    shown = [Spec("KTLB", "left", "slowly", "large", "sans"), Spec("MURO", "still", None, "large", "serif")]
    media = words.render(shown, seed=1).media
    asked = [f'the word "{spec.word}"' for spec in shown]
    right, crossed = checked_scores(pp_ocr, media, asked), checked_scores(pp_ocr, media, asked[::-1])
    assert right.min() >= 0.75 and crossed.max() <= 0.5


@needs_ocr
def test_pp_ocr_reads_rendered_text(pp_ocr):
    """Pillow's own font in black on white, and light on dark: two lines, another order of channels, a video of which half shows it."""
    from PIL import Image, ImageDraw, ImageFont

    def page(text, ink, paper):
        image = Image.new("RGB", (320, 128), paper)
        ImageDraw.Draw(image).multiline_text((20, 16), text, fill=ink, font=ImageFont.load_default(36))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    pages = torch.stack([page("Open now", (0, 0, 0), (255, 255, 255)), page("Fresh\nbread", (250, 240, 80), (20, 30, 90))])
    prompts = ['a sign that says "Open now"', "a shop window with the words “fresh bread”"]
    assert checked_scores(pp_ocr, pages, prompts).tolist() == [1.0, 1.0]
    assert checked_scores(pp_ocr, pages, prompts[::-1]).max() < 0.5
    blank = torch.ones(3, 128, 320)
    video = torch.stack([blank, *[pages[0]] * 4], 1)[None]
    assert checked_scores(pp_ocr, video, prompts[:1]).tolist() == [0.5]
