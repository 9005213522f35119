"""Moving words, measured: what a text tells of its word, PP-OCR's crops, the whole protocol on videos whose figures are known, and the world's commands."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from instep.bundled import words, words_evaluation
from instep.bundled.glyphs import FONTS
from instep.bundled.outside_reader import MARGIN, OutsideReader, cropped, installed, outside_reader
from instep.bundled.word_figures import figures_of
from instep.bundled.word_readers import Attributes, Reading, whole_frames
from instep.bundled.words_evaluation import WordsEvaluation, WordsSet, evaluation_set, measure, real_videos
from instep.data.prompt import Prompt
from instep.metrics.compare import Cost, Row, direction
from instep.metrics.figures import Value

torch.set_num_threads(1)
ALL = torch.ones(1, 9, dtype=torch.bool)


def test_a_word_is_right_in_more_than_half_of_the_frames_that_count():
    texts = [["KTLB"] * 4 + ["KTLD"] * 5]
    assert not figures_of(texts, ALL, ["KTLB"]).word
    five = ALL.clone()
    five[0, :4] = False
    assert figures_of([["KTLD"] * 4 + ["KTLB"] * 5], five, ["KTLB"]).letters == 1.0
    half = ALL.clone()
    half[0, 8] = False
    assert not figures_of(texts, half, ["KTLB"]).word and figures_of(texts, half, ["KTLD"]).letters == pytest.approx((4 * 0.75 + 4) / 8)
    found = figures_of([*texts, [""] * 9], ALL.repeat(2, 1), ["KTLB", "KTLB"])
    assert found.letters.tolist() == pytest.approx([(4 + 5 * 0.75) / 9, 0.0])


def test_a_misspelling_is_legible_and_a_smear_is_not():
    misspelt, unsteady, short = ["QQQQ"] * 9, ["AAAA", "BBBB", "CCCC"] * 3, ["AB"] * 9
    found = figures_of([misspelt, unsteady, short], ALL.repeat(3, 1), ["KTLB"] * 3)
    assert found.legible.tolist() == [True, False, False] and not found.word.any()
    nothing = figures_of([misspelt], torch.zeros_like(ALL), ["QQQQ"])
    assert not nothing.word.any() and nothing.letters == 0 and not nothing.legible.any()


def test_an_outside_reader_gets_the_ink_with_a_white_margin():
    frame = torch.ones(32, 64)
    frame[0:10, 5:30] = 0.2
    assert cropped(torch.ones(32, 64)) is None
    cut = cropped(frame)
    assert (
        cut is not None and cut.shape == (10 + 2 * MARGIN, 25 + 2 * MARGIN) and (cut[:MARGIN] == 1).all() and (cut[MARGIN:-MARGIN, MARGIN:-MARGIN] == 0.2).all()
    )
    seen = []
    reader = OutsideReader(lambda image: seen.append(image) or "kt lb")
    media = frame.expand(1, 3, 9, 32, 64).clone()
    media[:, :, 8] = 1.0
    counts = ALL.clone()
    counts[0, 0] = False
    assert reader.texts(media, counts) == [["", *["KTLB"] * 7, ""]]
    assert len(seen) == 7 and seen[0].dtype == torch.uint8 and seen[0].shape == (14, 29, 3) and set(seen[0].unique().tolist()) == {51, 255}


@dataclass(frozen=True)
class Oracle:
    """A reader that was told what each video shows; its features are that, too."""

    shown: tuple[words.Spec, ...]
    misread: int = 0  # the first videos are read wrong
    accuracy: dict[str, float] | None = None

    def judge(self, media: torch.Tensor) -> Reading:
        motion = torch.tensor(list(map(words.motion_of, self.shown)))
        size = torch.tensor([words.SIZES.index(spec.size or "") for spec in self.shown])
        font = torch.tensor([FONTS.index(spec.font or "") for spec in self.shown])
        features = torch.stack([motion == k for k in range(9)] + [font == k for k in range(len(FONTS))], 1).float()
        texts = [["QQQQ" if i < self.misread else spec.word] * 9 for i, spec in enumerate(self.shown)]
        return Reading(texts, whole_frames(media.mean(1)), Attributes(motion, size, font), features)

    def log_probability(self, media: torch.Tensor, asked: list[str]) -> torch.Tensor:
        return torch.zeros(len(media))


@pytest.fixture(scope="module")
def small() -> WordsSet:
    quick = evaluation_set()
    return WordsSet(quick.full[:24], quick.open[:32], name="quick")


@pytest.fixture(scope="module")
def drawn(small) -> words.Drawn:
    return words.render([words.parse(prompt) for prompt in small.prompts], 900_100)


def test_the_prompts_are_held_out_balanced_and_those_of_every_seed():
    for name, total, (full, many, copies) in (("quick", 240, (144, 6, 16)), ("full", 612, (420, 12, 16))):
        found = evaluation_set(name, seed=3)
        assert len(found.prompts) == total and len(found.full) == full and len(set(found.open)) == many and len(found.open) == many * copies
        assert {words.split_of(word) for word in found.words} == {"heldout"} and found.prompts == evaluation_set(name).prompts
        specs = [words.parse(prompt) for prompt in found.full]
        assert all(None not in (spec.direction, spec.size, spec.font) for spec in specs) and {words.motion_of(spec) for spec in specs} == set(range(9))
    negative = evaluation_set(negative="blurry")
    assert negative.asked[0] == Prompt(negative.prompts[0], negative="blurry")


def test_metrics_of_videos_whose_figures_are_known(small, drawn, monkeypatch):
    """An oracle reads them: 6 of 24 words misread by the monitor, 12 by PP-OCR; the reference is the very draw, so the distance is that of its own draws."""
    oracle = Oracle(drawn.shown)
    readers = {"train": oracle, "monitor": replace(oracle, misread=6)}
    outside = OutsideReader(lambda image: "")
    asked = replace(small, reference={"monitor": oracle.judge(drawn.media).features[:, None]})
    monkeypatch.setattr(OutsideReader, "texts", lambda self, media, counts: replace(oracle, misread=12).judge(media).texts)
    found = measure(drawn.media, Cost(0.5, 0.25), asked, readers, outside)
    assert found["monitor_word"].value == 0.75 and found["heldout_word"].value == 0.5 and found["train_word"].value == 1.0
    letters = sum(word.count("Q") / 4 for word in small.words[:12]) + 12
    assert found["heldout_letters"].value == pytest.approx(letters / 24)
    assert found["heldout_legible"].value == found["heldout_word_open"].value == 1.0
    assert found["monitor_motion"].value == found["monitor_look"].value == 1.0 and found["train_score"].value == 0.0
    assert found["fd"].value == pytest.approx(0, abs=1e-4) and found["precision"].value == found["recall"].value == 1.0
    shown = drawn.shown[24:]
    for key, of in (("modes_motion", words.motion_of), ("modes_size", lambda s: s.size), ("modes_font", lambda s: s.font)):
        seen = [len({of(spec) for spec in shown[i : i + 16]}) for i in (0, 16)]
        assert found[key].value == sum(seen) / 2
    assert found["modes"].value >= max(found[f"modes_{key}"].value for key in ("motion", "size", "font"))
    assert found["wobble"].value < 0.15 and found["dynamic"].value > 2 and (found["seconds"].value, found["seconds_wall"].value) == (0.5, 0.25)
    named = {column.key: column for column in WordsEvaluation().columns}
    assert found.keys() == named.keys(), "each metric has a column, and each column a metric"
    assert all(direction(key) == 1 for key in ("heldout_word", "monitor_motion", "modes", "heldout_legible")) and direction("fd") == -1
    assert list(named)[:2] == ["heldout_word", "monitor_word"], "the headline, and what stands in its place"
    with pytest.raises(ValueError, match="raw: 3 videos for 56 prompts"):
        measure(drawn.media[:3], Cost(), small, readers, None)


def test_without_the_outside_reader_its_figures_are_left_out_and_a_line_says_so(small, drawn, monkeypatch):
    monkeypatch.setattr(words_evaluation, "reference_features", lambda asked, monitor: monitor.judge(drawn.media).features[:, None])
    without = WordsEvaluation(reader=lambda name: Oracle(drawn.shown), outside=lambda: None, has_outside=lambda: False)
    assert "pip install 'instep[ocr]'" in (without.notice or "")
    found = without.real_row(small, through=lambda media: media)
    assert found.name == "real videos through the VAE" and found.n == 56 and not any(key.startswith("heldout") for key in found.values)
    with_it = WordsEvaluation(has_outside=lambda: True)
    assert with_it.notice is None and without.complete(found) and not with_it.complete(found), "a row without PP-OCR is measured anew where it is installed"
    assert with_it.complete(Row("a", "real", {"heldout_word": Value(1.0, 0.0)}))


def test_the_fingerprint_changes_with_prompts_seed_readers_and_version(small, monkeypatch):
    own = WordsEvaluation()
    marks = [own.fingerprint(small), own.fingerprint(replace(small, seed=1)), own.fingerprint(replace(small, negative="blurry"))]
    for name, value in (("VERSION", words_evaluation.VERSION + 1), ("_reader_files", lambda: b"other weights")):
        with monkeypatch.context() as changed:
            changed.setattr(words_evaluation, name, value)
            marks.append(own.fingerprint(small))
    assert len(set(marks)) == len(marks) and own.fingerprint(small) == marks[0]


def test_another_draw_of_real_videos_is_another(small):
    assert not torch.equal(real_videos(small, 900_002), real_videos(small, 900_100))


@pytest.mark.skipif(not installed(), reason="needs the extra ocr")
def test_pp_ocr_reads_real_words():
    prompts = words.prompts_of("heldout", 6, 5, full=1.0)
    media = words.render([words.parse(prompt) for prompt in prompts], 5).media
    reader = outside_reader()
    assert reader is not None
    counts = torch.zeros(6, 9, dtype=torch.bool)
    counts[:, 4] = True
    found = figures_of(reader.texts(media, counts), counts, [words.parse(prompt).word for prompt in prompts])
    assert found.word.sum() >= 5
