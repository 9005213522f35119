"""The moving-words world: grammar, split, drawing, labelled pairs, and the parts of its pipeline."""

import hashlib
import math

import pytest
import torch
from diffusers import WanPipeline
from pretrain.moving_digits import pipeline_writer, portable_names
from pretrain.teacher import Reading
from pretrain.words import (
    WordLatents,
    WordTexts,
    build_words_encoder,
    build_words_tokenizer,
    build_words_transformer,
    build_words_vae,
    decoded_spec,
    encoded_spec,
    letter_parts,
)

from instep.bundled import words
from instep.bundled.glyphs import FONTS, LETTERS, spread
from instep.bundled.moving_words import SHOWN, real_and_wrong
from instep.bundled.words import Spec
from instep.data.media import slow_motion
from instep.data.prompt import as_prompts

torch.set_num_threads(1)


def test_a_prompt_and_its_spec_are_inverses_and_every_part_but_the_word_may_stay_open():
    assert words.parse("the word KTLB") == Spec("KTLB")
    assert words.parse("the word KTLB in serif letters moving left") == Spec("KTLB", "left", None, None, "serif")
    assert words.parse("the word KTLB in large serif letters standing still") == Spec("KTLB", "still", None, "large", "serif")
    for prompt in words.training_prompts():
        assert words.describe(words.parse(prompt)) == prompt
    for wrong in ("the word ktlb", "the word KTL", "KTLB", "the word KTLB moving", "the word KTLB in letters", "the word KTLB in serif large letters", ""):
        with pytest.raises(ValueError, match="outside the grammar"):
            words.parse(wrong)


@pytest.mark.parametrize(
    "given,named",
    [({"word": "KTL"}, "word: 'KTL'"), ({"speed": "fast"}, "speed: 'fast'"), ({"font": "comic"}, "font: 'comic'"), ({"size": "huge"}, "size: 'huge'")],
)
def test_a_spec_names_what_is_not_allowed(given, named):
    with pytest.raises(ValueError, match=named):
        Spec(**{"word": "KTLB"} | given)


def test_a_tenth_of_the_words_is_held_out_and_no_training_prompt_has_one():
    rng = torch.Generator().manual_seed(0)
    letters = torch.randint(26, (20000, 4), generator=rng).tolist()
    share = sum(words.split_of("".join(LETTERS[i] for i in row)) == "heldout" for row in letters) / 20000
    assert abs(share - 0.1) < 0.01
    assert {words.split_of(words.parse(p).word) for p in words.training_prompts()} == {"train"}
    assert {words.split_of(w) for w in words.random_words("heldout", 50, rng)} == {"heldout"}
    assert len(set(words.training_prompts())) == 512


def test_half_of_the_training_prompts_leave_something_open_and_each_choice_comes():
    specs = [words.parse(p) for p in words.training_prompts()]
    complete = [None not in (s.direction, s.size, s.font) and (s.direction == "still" or s.speed is not None) for s in specs]
    assert 0.45 < sum(complete) / len(specs) < 0.6
    assert {s.font for s in specs} == {None, *FONTS} and {s.size for s in specs} == {None, *words.SIZES}
    assert {s.direction for s in specs} == {None, "still", *words.DIRECTIONS}


def test_a_video_shows_its_spec_and_its_ink_fills_the_stated_box():
    specs = [words.parse(p) for p in words.training_prompts()[:64]]
    drawn = words.render(specs, seed=3)
    assert drawn.media.shape == (64, 3, 9, 32, 64) and drawn.media.min() >= 0 and drawn.media.max() == 1
    for spec, shown in zip(specs, drawn.shown, strict=True):
        assert shown.word == spec.word and words.motion_of(shown) in words.motions_allowed(spec)
        assert spec.size in (None, shown.size) and spec.font in (None, shown.font)
    for video, boxes, whole in zip(drawn.media[:, 0], drawn.boxes, drawn.whole, strict=True):
        for frame, (left, top, right, bottom), is_whole in zip(video, boxes.tolist(), whole.tolist(), strict=True):
            ink = (frame < 0.98).nonzero()
            seen = (int(ink[:, 1].min()), int(ink[:, 0].min()), int(ink[:, 1].max()) + 1, int(ink[:, 0].max()) + 1)
            assert is_whole == (left >= 0 and top >= 0 and right <= 64 and bottom <= 32)
            expected = (max(left, 0), max(top, 0), min(right, 64), min(bottom, 32))
            assert max(abs(a - b) for a, b in zip(seen, expected, strict=True)) <= 1.05
    assert (drawn.whole.sum(1) >= 3).all()


def test_ink_is_kept_at_any_position_to_the_last_decimal():
    """A pixel is the mean over its area: the ink on the canvas is the picture's own ink times the scale squared, wherever the word stands."""
    shown = [Spec("KTLB", "still", None, "small", "serif")] * 4
    drawn = words.place(shown, torch.tensor([[0.5, 0.1, 0.2], [0.5, 0.53, 0.47], [0.5, 0.9, 0.61], [0.5, 0.31, 0.77]]))
    ink = (1 - drawn.media[:, 0].double()).sum((2, 3))
    picture = spread("KTLB", "serif").pixels
    assert (ink / (picture.sum() * (10.5 / 48) ** 2) - 1).abs().max() < 2e-3


def test_speeds_and_sizes_are_as_stated():
    shown = [Spec("HHHH", "right", speed, size, "sans") for speed in words.SPEEDS for size in words.SIZES]
    boxes = words.place(shown, torch.full((4, 3), 0.5)).boxes
    assert torch.allclose(boxes[:, -1, 0] - boxes[:, 0, 0], torch.tensor([6.0, 6.0, 12.0, 12.0]), atol=1e-4)
    assert torch.allclose(boxes[:, 0, 3] - boxes[:, 0, 1], torch.tensor([10.5, 13.5, 10.5, 13.5]), atol=0.3)


def test_the_same_seed_draws_the_same_videos_on_every_machine():
    drawn = words.render([words.parse(p) for p in words.training_prompts()[:32]], seed=0)
    pixels = drawn.media.mul(255).round().to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(pixels).hexdigest() == "2ded1f943bd3a5418b107807d0751c3134e16d16a13458d97ea300dccbf15a94"


def test_a_wrong_video_differs_in_a_letter_a_motion_or_in_its_pace():
    prompts = as_prompts(words.training_prompts())
    good, bad, names = real_and_wrong(prompts, 48, seed=0)
    assert good.shape == bad.shape == (48, 3, 9, 32, 64) and set(names) <= set(prompts)
    assert ((good - bad).abs().amax((1, 2, 3, 4)) > 0.2).all()
    slowed = (slow_motion(good) == bad).flatten(1).all(1)
    assert 5 < slowed.sum() < 35
    assert {words.split_of(words.parse(prompt).word) for prompt in SHOWN} == {"heldout"}


def test_a_video_s_labels_are_kept_as_numbers_and_its_captions_fit_it():
    shown = words.render([words.parse(p) for p in words.training_prompts()[:40]], seed=0).shown
    data = WordLatents(torch.zeros(40, 1), torch.tensor([encoded_spec(spec) for spec in shown]), torch.zeros(40, 1))
    assert [decoded_spec(code) for code in data.codes.tolist()] == list(shown)
    for i, spec in enumerate(shown):
        assert words.parse(data.caption(i, torch.tensor([0.0, 0.0]), 0.5)) == spec
        assert data.caption(i, torch.tensor([0.9, 0.0]), 0.5) == f"the word {spec.word}"


def test_letters_are_located_in_pixels_and_in_latents():
    """Between two letters' boxes there is no ink, and the labels of latents name the letters from left to right where their ink is."""
    drawn = words.place([Spec("KTLB", "right", "fast", "large", "sans")], torch.tensor([[0.5, 0.5, 0.5]]))
    for frame, ends, box in zip(drawn.media[0, 0], drawn.letters[0], drawn.boxes[0], strict=True):
        assert ends[0, 0] == box[0] and ends[-1, 1] == box[2]
        for (_, right), (left, _) in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            between = frame[:, math.ceil(right) : math.floor(left)]
            assert (between > 0.98).all()
    parts = letter_parts(drawn)
    assert parts.shape == (1, 3, 8, 16, 5) and torch.allclose(parts.sum(-1), torch.ones(1, 3, 8, 16), atol=1e-6)
    ink = (drawn.letters[0, 0, :, 1] - drawn.letters[0, 0, :, 0]) * (drawn.boxes[0, 0, 3] - drawn.boxes[0, 0, 1])
    assert torch.allclose(parts[0, 0].sum((0, 1))[:4] * 16, ink, atol=1e-3)
    shown = WordLatents(torch.zeros(1, 1), torch.tensor([encoded_spec(drawn.shown[0])]), parts).shown(torch.tensor([0]))
    assert shown.shape == (1, 3, 8, 16, 27)
    row = shown[0, 0, 4].argmax(-1)
    assert [LETTERS[int(i)] for i in row[row < 26].unique_consecutive()] == list("KTLB")


def test_the_reading_that_helps_to_train_is_a_cross_entropy_of_each_latent():
    net = build_words_transformer()
    reading = Reading(net, 3, 27)
    net(torch.randn(2, 16, 3, 8, 16), torch.tensor([900.0, 100.0]), torch.randn(2, 5, 64))
    with torch.no_grad():
        reading.linear.weight.zero_()
        reading.linear.bias.copy_(torch.arange(4).repeat_interleave(27) * 3.0 + torch.eye(27)[5].repeat(4) * 2)
    shares = torch.zeros(2, 3, 8, 16, 27)
    shares[..., 5] = 0.75
    shares[..., 26] = 0.25
    normaliser = math.log(26 + math.exp(2))
    assert math.isclose(float(reading.loss(shares).detach()), normaliser - 0.75 * 2, rel_tol=1e-5)


def test_the_encoder_tells_each_letter_and_its_place():
    """Both can be read off one letter's output by a linear map, on words that the map was not fitted to."""
    texts = WordTexts(build_words_tokenizer(), build_words_encoder(0))
    prompts = words.prompts_of("train", 300, seed=1)
    out = texts.encode(prompts, torch.full((300,), 512))[0][:, 2:6].reshape(1200, 64)
    inputs = torch.cat([out, torch.ones(1200, 1)], 1)
    letters = torch.tensor([LETTERS.index(letter) for prompt in prompts for letter in words.parse(prompt).word])
    for classes, labels in ((4, torch.arange(1200) % 4), (26, letters)):
        read = torch.linalg.lstsq(inputs[:900], torch.eye(classes)[labels[:900]]).solution
        assert ((inputs[900:] @ read).argmax(1) == labels[900:]).float().mean() > 0.97


def test_each_letter_is_a_token_and_texts_are_encoded_as_the_stock_pipeline_does(tmp_path):
    tokenizer, encoder = build_words_tokenizer(), build_words_encoder(0)
    prompt = "the word KTLB in large serif letters moving left slowly"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)
    assert tokens == ["the", "word", "K", "T", "L", "B", "in", "large", "serif", "letters", "moving", "left", "slowly", "</s>"]
    assert tokenizer("").input_ids == [1] and all(2 not in tokenizer(p).input_ids for p in words.training_prompts())
    vae, net = build_words_vae(), build_words_transformer()
    pipeline_writer(tmp_path, vae, tokenizer, encoder, 3.0)(net)
    vae.half().save_pretrained(tmp_path / "vae")
    portable_names(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) <= 8e6
    pipe = WanPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        stock = pipe.encode_prompt([prompt, "the word ABCD"], do_classifier_free_guidance=False, max_sequence_length=512)[0]
        ours, _ = WordTexts(tokenizer, encoder).encode([prompt, "the word ABCD"], torch.full((2,), 512))
    assert (stock[:, :15] - ours).abs().max() < 1e-5 and stock[:, 15:].abs().max() == 0
    frames = pipe(prompt, height=32, width=64, num_frames=9, num_inference_steps=1, guidance_scale=3.0, output_type="pt").frames
    assert frames.shape == (1, 9, 3, 32, 64)
