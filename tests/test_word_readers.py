"""The readers of moving words: CTC, what they read and refuse to read, rewards, monitor, features, and what they are trained on."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pretrain import word_readers
from pretrain.word_damage import joined, labelled
from pretrain.word_readers import Pool, loss_of, random_videos, reference_videos

from instep.bundled import words
from instep.bundled.ctc import best_path, ctc_log_probability
from instep.bundled.glyphs import FONTS, LETTERS
from instep.bundled.word_networks import ARCHITECTURES
from instep.bundled.word_readers import FOLDER, correct_of, exact_match, features, monitor, reader, reward, whole_frames
from instep.bundled.words import Spec
from instep.core.size import Size
from instep.training.probe import ModeMonitor

torch.set_num_threads(1)
NAMES = ("training", "monitor")


@pytest.fixture(scope="module")
def videos():
    return reference_videos(40, seed=5)


@pytest.fixture(scope="module")
def judged(videos):
    return {name: reader(name).judge(videos[0]) for name in NAMES}


def _log_p(n, columns, symbols, seed=0):
    return (torch.randn(n, columns, symbols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2).log_softmax(2)


def _merged(path):
    return tuple(symbol for i, symbol in enumerate(path) if symbol and (i == 0 or path[i - 1] != symbol))


def test_ctc_is_the_sum_over_all_paths_that_read_the_word():
    log_p = _log_p(2, 5, 3)
    summed = [{}, {}]
    for path in itertools.product(range(3), repeat=5):
        for row in (0, 1):
            p = math.exp(sum(float(log_p[row, t, symbol]) for t, symbol in enumerate(path)))
            summed[row][_merged(path)] = summed[row].get(_merged(path), 0.0) + p
    for word in ((), (1,), (2, 1), (1, 1), (2, 2, 1), (1, 2, 1)):
        padded = torch.tensor([[*word, *[2] * (3 - len(word))]] * 2)
        found = ctc_log_probability(log_p, padded, torch.full((2,), len(word))).exp()
        assert torch.allclose(found, torch.tensor([each[word] for each in summed], dtype=torch.float64), rtol=1e-12)
    assert abs(sum(summed[0].values()) - 1) < 1e-12


def test_ctc_agrees_with_torch_and_its_gradient_with_differences():
    log_p, targets = _log_p(6, 12, 27, seed=1), torch.tensor([[1, 1, 2, 26], [3, 3, 3, 3], [4, 5, 6, 7], [9, 8, 9, 8], [2, 2, 1, 1], [26, 1, 1, 26]])
    stock = F.ctc_loss(log_p.transpose(0, 1), targets, [12] * 6, [4] * 6, reduction="none")
    assert torch.allclose(ctc_log_probability(log_p, targets), -stock, rtol=1e-12)
    logits = _log_p(1, 5, 3, seed=2).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: ctc_log_probability(x.log_softmax(2), torch.tensor([[1, 1]])), logits)


def test_ctc_of_a_word_with_too_few_columns_is_impossible_but_finite():
    log_p = _log_p(1, 2, 3).requires_grad_(True)
    found = ctc_log_probability(log_p, torch.tensor([[1, 1]]))
    (gradient,) = torch.autograd.grad(found.sum(), log_p)
    assert found < -1e8 and gradient.isfinite().all()


def test_the_best_path_merges_repetitions_and_drops_blanks():
    symbols = torch.tensor([[0, 1, 1, 0, 1, 2, 2, 0], [0] * 8])
    assert best_path(F.one_hot(symbols, 3).double()) == [[1, 1, 2], []]


@pytest.mark.parametrize("name", NAMES)
def test_readers_read_held_out_words_and_tell_motion_size_and_font(name, videos, judged):
    media, prompts = videos
    right = correct_of(judged[name], prompts)
    assert right.word.float().mean() >= 0.95 and right.motion.float().mean() >= 0.95 and right.look.float().mean() >= 0.85
    assert torch.equal(right.both, right.word & right.motion)
    read = reader(name).read(media[:2])
    assert read == judged[name].texts[:2] and all(len(texts) == 9 for texts in read)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_prompt_leaves_open_is_right_and_what_it_says_wrongly_is_wrong(name, videos, judged):
    specs = [words.parse(prompt) for prompt in videos[1]]
    plain = correct_of(judged[name], [words.describe(Spec(spec.word)) for spec in specs])
    assert plain.motion.all() and plain.look.all() and torch.equal(plain.both, plain.word)
    others = [words.motion_spec(specs[i - 1].word, (words.motion_of(spec) + 1) % 9) for i, spec in enumerate(specs)]
    looks = [Spec(spec.word, size=spec.size, font=FONTS[FONTS.index(spec.font) - 1]) for spec in specs]
    turned = correct_of(judged[name], list(map(words.describe, others)))
    assert turned.word.float().mean() < 0.05 and turned.motion.float().mean() < 0.1
    assert correct_of(judged[name], list(map(words.describe, looks))).look.float().mean() < 0.2


def test_a_word_is_right_when_more_than_half_of_the_frames_that_count_are_read_exactly(videos):
    drawn = words.render([Spec("WMQO", "left", "fast", "large", "sans")], seed=0)
    counts = whole_frames(drawn.media.mean(1))
    inside = (drawn.boxes[..., 0] >= 1) & (drawn.boxes[..., 2] <= 63)
    assert not drawn.whole.all() and counts[inside].all() and not counts[~drawn.whole].any()
    assert counts[0, 3:6].all() and whole_frames(torch.zeros(1, 9, 32, 64)).sum() == 3
    read = reader("training").judge(drawn.media)
    n = int(counts.sum())
    for hits in range(n + 1):
        texts = iter(["WMQO"] * hits + ["WMQ"] * (n - hits))
        made = [[next(texts) if counted else "WMQO" for counted in counts[0].tolist()]]
        found = correct_of(type(read)(made, counts, read.attributes, read.features), ["the word WMQO"])
        assert bool(found.word) == (hits > n / 2)


@pytest.mark.parametrize("name", NAMES)
def test_readers_do_not_read_what_nobody_can(name, videos):
    """A word that is smeared, two words over each other, a letter that is scribbled out, noise, and nothing at all."""
    media, prompts = videos
    asked = [words.parse(prompt).word for prompt in prompts]
    smeared = F.avg_pool2d(F.avg_pool2d(media.flatten(0, 2)[:, None], (9, 9), 1, 4), (9, 9), 1, 4).view_as(media)
    ghosts = (media + media.roll(1, 0)) / 2
    noise = torch.rand(media.shape, generator=torch.Generator().manual_seed(0))
    judge = reader(name)
    for broken, limit in ((smeared, 0.05), (ghosts, 0.1), (noise, 0.0), (torch.ones_like(media), 0.0)):
        read = judge.read(broken[:20])
        assert sum(text == word for texts, word in zip(read, asked, strict=False) for text in texts) <= limit * 180
    blank = judge.read(torch.ones_like(media[:1]))
    assert blank == [[""] * 9]


@pytest.mark.parametrize("name", NAMES)
def test_log_probability_is_ctc_a_letter_over_every_second_frame_that_counts(name, videos):
    media, prompts = videos[0][:4], videos[1][:4]
    asked, judge = [words.parse(prompt).word for prompt in prompts], reader(name)
    with torch.no_grad():
        log_p = judge(media).log_p.double()
    targets = torch.tensor([[1 + LETTERS.index(letter) for letter in word] for word in asked])
    columns = log_p.shape[2]
    each = torch.stack([-F.ctc_loss(log_p[:, f].transpose(0, 1), targets, [columns] * 4, [4] * 4, reduction="none") for f in range(0, 9, 2)], 1) / 4
    counts = whole_frames(media.mean(1))[:, ::2]
    assert torch.allclose(judge.log_probability(media, asked).double(), (each * counts).sum(1) / counts.sum(1), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_the_reward_writes_the_letter_that_is_asked_for(name):
    """A few steps along the gradient turn F into E; a step raises the score of every video, and the reader stays as it is."""
    judge = reader(name)
    media = words.render([Spec(word, "still", None, "large", "sans") for word in ("KTFB", "FONS")], seed=1).media.requires_grad_(True)
    asked = ["KTEB", "EONS"]
    score = judge.log_probability(media, asked)
    (gradient,) = torch.autograd.grad(score.sum(), media)
    assert gradient.isfinite().all() and (gradient.abs().sum((1, 2, 3, 4)) > 0).all()
    unit = gradient / gradient.square().sum((1, 2, 3, 4), keepdim=True).sqrt()
    assert (judge.log_probability(media + 0.05 * unit, asked) > score).all()
    assert not any(p.requires_grad for p in judge.parameters())


def test_rewards_are_the_training_reader_s_and_tell_right_words_from_wrong_ones(videos):
    media, prompts = videos
    smooth, match = reward(), exact_match()
    assert (smooth.differentiable, match.differentiable, smooth.space, match.space) == (True, False, "pixel", "pixel") and smooth.name != match.name
    right, wrong = smooth.score(media, prompts), smooth.score(media, prompts[1:] + prompts[:1])
    assert (right <= 0).all() and right.median() > -0.2 and (right > wrong).all()
    found = match.score(media, prompts)
    assert torch.equal(found, reader("training").correct(media, prompts).word.float()) and found.mean() >= 0.95
    assert match.score(media, prompts[1:] + prompts[:1]).sum() == 0
    only = [words.describe(Spec(words.parse(prompt).word)) for prompt in prompts]
    assert torch.equal(smooth.score(media, only), right)


def test_the_monitor_is_the_other_reader_and_counts_modes_of_what_is_open(videos):
    media, prompts = videos
    watch = monitor()
    assert isinstance(watch, ModeMonitor)
    found = watch.metrics(media, prompts)
    right = reader("monitor").correct(media, prompts)
    assert found["monitor_both"] == pytest.approx(float(right.both.float().mean())) and found["monitor_word"] >= found["monitor_both"] > 0.9
    assert found["monitor_score"] == pytest.approx(float(reader("monitor").log_probability(media, [words.parse(p).word for p in prompts]).mean()), abs=1e-5)
    assert watch.metrics(media, prompts[1:] + prompts[:1])["monitor_both"] < 0.1
    specs = [words.parse(prompt) for prompt in watch.open_prompts]
    assert {words.split_of(spec.word) for spec in specs} == {"train"} and len({spec.word for spec in specs}) == 8
    assert [(len(words.motions_allowed(spec)), spec.font is None, spec.size is None) for spec in specs] == [(9, False, False)] * 4 + [(1, True, True)] * 4
    varied = words.render([spec for spec in specs for _ in range(watch.open_copies)], seed=2).media
    assert 4.5 < watch.modes(varied) < 6.3
    assert watch.modes(varied[::8].repeat_interleave(8, 0)) == 1
    assert watch.modes(varied[:8]) == len(reader("monitor").attributes(varied[:8]).motion.unique())


@pytest.mark.parametrize("name", NAMES)
def test_features_hold_what_prompts_ask_for(name, videos):
    media, prompts = videos[0][:6], videos[1][:6]
    judge = reader(name)
    sample, asked = judge.features(media), judge.asked(prompts)
    assert sample.shape == asked.shape == (6, 128) and torch.allclose(sample, judge.judge(media).features, atol=1e-5)
    motion = judge.net.moved(sample[:, 96:])
    bias = judge.net.moved.bias
    at = torch.tensor([words.motion_of(words.parse(prompt)) for prompt in prompts])
    above = (motion - bias)[torch.arange(6), at] - (motion - bias).mean(1)
    assert torch.allclose((sample * asked)[:, 96:].sum(1), above, atol=1e-4)
    open_parts = judge.asked(["the word KTLB"])
    assert open_parts[0, 64:].abs().max() < 1e-6 and open_parts[0, :64].abs().max() > 0.01
    both = features(name)
    assert both.width == 384 and both(media, prompts).shape == (6, 384) and both.frames == 9 and both.given == f"moving-words:{name}"
    assert both.size == Size(height=32, width=64, frames=9)


def test_readers_are_small_and_share_neither_architecture_nor_seed():
    about = [json.loads((FOLDER / f"{name}.json").read_text()) for name in NAMES]
    assert len({each["architecture"] for each in about}) == len({each["config"]["seed"] for each in about}) == 2
    assert sum((FOLDER / f"{name}.safetensors").stat().st_size for name in NAMES) < 1_500_000
    for name, each in zip(NAMES, about, strict=True):
        assert each["accuracy"] == reader(name).accuracy and each["architecture"] == ARCHITECTURES[name].__name__


def test_refusals(videos):
    with pytest.raises(ValueError, match="which: 'heldout' is not allowed; use one of training, monitor"):
        reader("heldout")
    with pytest.raises(ValueError, match=r"media: shape \(2, 3, 9, 48, 48\) is not allowed; this reader takes \[B, 3, 9, 32, 64\]"):
        reader("training").read(torch.zeros(2, 3, 9, 48, 48))
    with pytest.raises(ValueError, match="outside the grammar"):
        reward().score(videos[0][:1], ["a word"])


def test_damaged_letters_are_left_out_of_the_label_and_the_others_keep_their_places():
    rng = torch.Generator().manual_seed(0)
    drawn = random_videos(200, rng)
    batch = labelled(drawn, rng)
    assert 0.4 < (batch.lengths == 4).float().mean() < 0.9 and set(batch.lengths.tolist()) == {0, 1, 2, 3, 4}
    assert batch.ink.isfinite().all() and (batch.lengths[~batch.clear] == 0).all()
    for spec, letters, length, centres, box in zip(drawn.shown, batch.letters.tolist(), batch.lengths.tolist(), batch.centres, drawn.boxes, strict=True):
        text = "".join(LETTERS[symbol - 1] for symbol in letters[:length])
        rest = iter(spec.word)
        assert all(letter in rest for letter in text)  # in their order
        assert (centres[:, :length].diff(dim=1) > 0).all() and (centres >= box[:, :1]).all() and (centres <= box[:, 2:3]).all()


def test_the_loss_falls_with_the_letters_and_ignores_those_that_cannot_be_read():
    """A network that is right has a lower loss than one that was never trained, and damaged videos do not count as misread."""
    rng = torch.Generator().manual_seed(0)
    batch = labelled(random_videos(16, rng), rng)
    trained, fresh = reader("training").net, ARCHITECTURES["training"]()
    losses = [loss_of(net, batch, 0.0, 0.0, torch.Generator().manual_seed(1)).item() for net in (trained, fresh)]
    assert losses[0] < 0.7 * losses[1] and losses[0] < 2.0


def test_one_command_trains_both_readers_and_keeps_what_is_done(tmp_path, monkeypatch):
    small = tuple(replace(config, steps=1, batch=4) for config in word_readers.READERS)
    monkeypatch.setattr(word_readers, "READERS", small)
    monkeypatch.setattr(word_readers, "TESTED", 2)
    word_readers.pretrain_word_readers(tmp_path)
    files = {path.name: path.read_bytes() for path in (tmp_path / "readers").iterdir()}
    assert set(files) == {f"{name}.{kind}" for name in NAMES for kind in ("json", "safetensors")}
    assert reader("monitor", tmp_path / "readers").net.letters.weight.shape == (27, 64)
    (tmp_path / "readers" / "training.json").unlink()
    word_readers.pretrain_word_readers(tmp_path)
    assert not (tmp_path / "readers" / "training.json").exists()  # it was done


def test_a_part_of_the_videos_comes_through_the_vae(monkeypatch):
    """With a round trip that leaves nothing but a mark, that part of a batch holds the mark and keeps its labels."""
    seen = []
    monkeypatch.setattr(word_readers, "round_trip", lambda vae, media, noise: seen.append(float(noise.abs().max())) or media * 0 + 0.5)
    pool = Pool(None, 32, torch.Generator().manual_seed(0))
    assert 0.1 < seen[0] < 2 and len(pool.shown) == 32 and (pool.media == 0.5).all()
    drawn = pool.draw(6, torch.Generator().manual_seed(1))
    spec = pool.shown[int(torch.randint(32, (6,), generator=torch.Generator().manual_seed(1))[0])]
    assert drawn.classes[0].tolist() == [words.motion_of(spec), words.SIZES.index(spec.size), FONTS.index(spec.font)]
    net = ARCHITECTURES["training"]()
    loss = loss_of(net, joined(drawn, drawn), 0.02, 1.0, torch.Generator().manual_seed(2))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
