"""Negatives in slow motion from a user's own videos and pairs, on the command line."""

from __future__ import annotations

import json

import pytest
import torch

from instep.cli.main import main
from instep.data.animation import save_animation
from instep.data.media import read_media
from instep.data.pairs import read_pairs


@pytest.fixture
def videos(tmp_path, monkeypatch):
    """Two videos that brighten from frame to frame, and one that stands still."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name, step in (("a", 20), ("b", 30), ("still", 0)):
        frames = (torch.arange(9) * step + 10)[:, None, None, None].expand(9, 4, 6, 3).to(torch.uint8)
        save_animation(tmp_path / "mine" / f"{name}.webp", frames)
        (tmp_path / "mine" / f"{name}.txt").write_text(f"video {name}")
    return tmp_path


def test_a_folder_of_videos(videos, capsys):
    assert main(["pairs", "slow", "mine", "slow.jsonl", "--frames", "9"]) == 0
    assert "0 pairs as they were, 2 of a video and its slow copy; 1 videos hardly move" in capsys.readouterr().out
    first, second = read_pairs("slow.jsonl")
    assert (first.prompt, first.question, first.chosen.name, second.chosen.name) == ("video a", "motion", "a.webp", "b.webp")
    slow = read_media(first.rejected, 9)
    # half the speed from the same first frame on, in as many frames of the same size
    assert slow.shape == (3, 9, 4, 6) and (slow[0, :, 0, 0] * 255).round().tolist() == [10 + 10 * i for i in range(9)]
    assert main(["pairs", "slow", "mine", "slow.jsonl"]) == 2 and "out: slow.jsonl exists" in capsys.readouterr().err


def test_pairs_keep_their_rows_and_preferred_ones_are_slowed(videos, capsys):
    rows = [{"prompt": "one", "chosen": "mine/a.webp", "rejected": "mine/b.webp"}, {"prompt": "two", "chosen": "mine/b.webp"}]
    (videos / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["pairs", "slow", "pairs.jsonl", "more.jsonl", "--frames", "9", "--factor", "4"]) == 0
    found = read_pairs("more.jsonl")
    assert [(pair.prompt, pair.chosen.name, pair.rejected.parent.name) for pair in found] == [
        ("one", "a.webp", "mine"),
        ("one", "a.webp", "more-media"),
        ("two", "b.webp", "more-media"),
    ]
    assert (read_media(found[1].rejected, 9)[0, :, 0, 0] * 255).round().tolist() == [10 + 5 * i for i in range(9)]
    assert main(["pairs", "slow", "pairs.jsonl", "half.jsonl", "--frames", "9", "--share", "0.5"]) == 0 and len(read_pairs("half.jsonl")) == 2
    capsys.readouterr()
    for wrong, message in (
        (["--factor", "1"], "factor: 1.0 is not allowed; it slows by more than 1"),
        (["--share", "0"], "share: 0.0 is not allowed; it is above 0, and 1 at most"),
    ):
        assert main(["pairs", "slow", "pairs.jsonl", "x.jsonl", *wrong]) == 2 and message in capsys.readouterr().err
    for name in "ab":
        (videos / "mine" / f"{name}.webp").unlink()
    assert main(["pairs", "slow", "mine", "x.jsonl"]) == 2 and "none of 1 videos of mine moves" in capsys.readouterr().err


def test_slowed_pairs_teach_a_reward_that_motion_counts(videos):
    """The whole way: rows of `pairs slow` are rows of `pairs fit` and of `--pairs`."""
    from instep.cli.train import load_labelled
    from instep.recipes.apo import apo

    assert main(["pairs", "slow", "mine", "slow.jsonl", "--frames", "9"]) == 0
    assert [pair.tie for pair in load_labelled(videos / "slow.jsonl", apo()).pairs] == [False, False]
