"""The embedded default's data: grammar, splits, rendering."""

import json
from pathlib import Path

import pytest
import torch

from instep.bundled import digits as D
from instep.bundled.digits import MOTIONS, PromptSpec, describe, motions_allowed, parse, render

torch.set_num_threads(1)


def centre(media: torch.Tensor) -> torch.Tensor:
    """Centre of mass of every frame, [B, F, 2] (x, y)."""
    grey = media.mean(1)
    mass = grey.sum((2, 3))
    axis = torch.arange(grey.shape[-1]).float()
    return torch.stack([(grey.sum(2) * axis).sum(-1) / mass, (grey.sum(3) * axis).sum(-1) / mass], -1)


def test_prompts_round_trip_and_are_distinct():
    full, open_ = D.full_prompts(), D.open_prompts()
    assert len(full) == len(set(full)) == 90
    assert len(open_) == len(set(open_)) == 64
    assert not set(full) & set(open_)
    for prompt in full + open_:
        assert describe(parse(prompt)) == prompt
    assert set(D.training_prompts()) == set(full + open_)
    assert "an eight moving up slowly" in full and "a digit" in open_


OUTSIDE = ("", "seven", "a cat", "a seven moving", "a seven moving sideways", "a seven moving left left", "a seven standing", "a seven moving still")


@pytest.mark.parametrize("prompt", OUTSIDE)
def test_prompts_outside_the_grammar_name_themselves(prompt):
    with pytest.raises(ValueError, match=f"prompt: {prompt!r}"):
        parse(prompt)


def test_a_spec_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="speed: 'fast' needs a direction"):
        PromptSpec(3, "still", "fast")
    with pytest.raises(ValueError, match="digit: 10"):
        PromptSpec(10)


def test_motions_allowed_are_those_the_prompt_leaves_open():
    assert [MOTIONS[i] for i in motions_allowed(parse("a seven moving left"))] == ["left slowly", "left fast"]
    assert [MOTIONS[i] for i in motions_allowed(parse("a digit standing still"))] == ["still"]
    assert motions_allowed(parse("a seven")) == list(range(9))
    for m in range(9):
        assert motions_allowed(D.motion_spec(None, m)) == [m]


def test_splits_are_disjoint_cover_all_scans_and_hold_every_class_alike():
    splits = json.loads((Path(D.__file__).with_name("digits_split.json")).read_text())
    everything = sum(splits.values(), [])
    assert sorted(everything) == list(range(1797))
    assert {k: len(v) for k, v in splits.items()} == {"train": 800, "monitor": 300, "heldout": 400, "reference": 297}
    classes = D._scans()[1]
    for chosen in splits.values():
        counts = torch.bincount(classes[chosen], minlength=10)
        assert counts.max() - counts.min() <= 4


def test_videos_move_as_their_prompts_say_and_stay_on_the_canvas():
    specs = [D.motion_spec(m % 10, m) for m in range(9)] * 4
    media = render("reference", specs, seed=1)
    assert media.shape == (36, 3, 9, 48, 48) and media.dtype == torch.float32
    assert media.min() >= 0 and 0.8 < media.max() <= 1
    assert torch.equal(media[:, 0], media[:, 2])
    moved = centre(media)[:, -1] - centre(media)[:, 0]
    distance = {"slowly": 8.0, "fast": 16.0}
    signs = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    wanted = torch.tensor([[s * distance[spec.speed] for s in signs[spec.direction]] if spec.speed else [0.0, 0.0] for spec in specs])
    assert (moved - wanted).abs().max() < 0.5
    # nothing of a digit leaves the canvas: every frame is as bright in the mean as the first
    brightness = media.mean((1, 3, 4))
    assert ((brightness - brightness[:, :1]).abs() / brightness[:, :1]).max() < 0.05


def test_motion_is_sub_pixel():
    """Slow motion is 1 px a frame from a start anywhere between pixels: the eighth frame is the first, shifted by exactly 8 px."""
    media = render("train", [parse("a five moving right slowly")], seed=3)
    assert torch.allclose(media[:, :, 8, :, 8:], media[:, :, 0, :, :-8], atol=2e-3)
    starts = centre(render("train", [parse("a five standing still")] * 20, seed=4))[:, 0]
    assert (starts - starts.round()).abs().max() > 0.2


def test_the_seed_decides_and_open_parts_vary():
    specs = [parse("a seven")] * 40
    a, b, c = (render("train", specs, seed=s) for s in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)
    moved = (centre(a)[:, -1] - centre(a)[:, 0]).round()
    assert len({tuple(m) for m in moved.tolist()}) >= 7


def test_splits_show_different_scans():
    specs = [parse("a three standing still")]
    assert not torch.equal(render("train", specs, 0), render("heldout", specs, 0))
    with pytest.raises(ValueError, match="split: 'test' is not allowed"):
        render("test", specs, 0)
