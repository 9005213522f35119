"""A reward learned from a file of preferences: held out by prompt, on features with a gradient, to a folder and back, and on the command line."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer

from instep.bundled import digits
from instep.bundled.classifiers import load_classifier
from instep.bundled.digit_classifiers import load_digit_classifier
from instep.bundled.features import features_of
from instep.bundled.worlds import class_digits
from instep.cli.main import main
from instep.cli.rewards import load_reward
from instep.cli.sample import save_each
from instep.core.statistics import wilson
from instep.data.pairs import PreferencePair, write_pairs
from instep.recipes.common import Common
from instep.recipes.refl import refl
from instep.rewards.base import Reward, checked_scores
from instep.rewards.bradley_terry import fit
from instep.rewards.features import image_text_features
from instep.rewards.preferences import learn, load_preferences, read_features, save
from instep.rewards.prepare import Preparation
from instep.training.options import RunOptions
from instep.training.run import train


def test_pairs_of_a_prompt_are_on_one_side_only():
    """Answers drawn for each prompt, the same for all its pairs: a head that has seen the prompt knows them, one that has not is a coin."""
    rng = torch.Generator().manual_seed(0)
    prompt = torch.arange(60).repeat_interleave(8)
    first, second = torch.zeros(480, 60), torch.zeros(480, 60)
    first[torch.arange(480), prompt] = torch.randn(60, generator=rng).sign()[prompt]
    outcome = torch.randn(60, generator=rng).sign()[prompt]
    assert fit(first, second, outcome).accuracy > 0.95, "split by pairs, every prompt was seen"
    apart = fit(first, second, outcome, groups=[f"prompt {int(p)}" for p in prompt])
    assert apart.accuracy == 0.5 and apart.log_prob < apart.coin, "no feature of a held-out prompt has a weight: gaps are 0"
    assert (apart.pairs, apart.heldout, apart.answers) == (384, 96, 12)
    with pytest.raises(ValueError, match="groups: 3 for 480 pairs"):
        fit(first, second, outcome, groups=[1, 2, 3])
    with pytest.raises(ValueError, match="pairs: 2 of 2 prompts with 1 preferences are too few"):
        fit(first[:2], second[:2], torch.tensor([1.0, 0.0]), groups=["a", "b"])


def test_first_frames_that_prompts_name_are_not_read():
    """A reward is told the text alone; what the head learns from must be that too, and one text with two first frames is one prompt."""
    features = features_of("moving-digits-i2v")
    assert isinstance(features.classifier, type(load_classifier("training"))) and features.name.startswith("moving-digits-i2v")
    seen = []

    class Told:
        width, frames, given, name = 1, 1, "told", "told"

        def read(self, path):
            return torch.zeros(1, 3, 4, 4)

        def __call__(self, media, prompts):
            seen.extend(prompts)
            return torch.zeros(1, 1)

    pair = lambda prompt: PreferencePair(prompt, Path("a.png"), Path("b.png"))  # noqa: E731
    pairs = [pair("a cat [image: x.png]"), pair("a cat [image: y.png]")]
    read_features(pairs, Told())
    assert set(seen) == {"a cat"}
    with pytest.raises(ValueError, match="2 of 1 prompt are too few"):
        learn(pairs, Told())


def test_the_coin_and_the_worth_of_answers():
    rng = torch.Generator().manual_seed(0)
    first, second = torch.randn(100, 3, generator=rng), torch.randn(100, 3, generator=rng)
    outcome, groups = torch.ones(100), [0] * 50 + list(range(1, 51))
    outcome[::4] = 0
    found = [fit(first, second, outcome, steps=1, groups=groups, seed=seed) for seed in range(20)]
    assert {got.heldout for got in found} == {10, 59}, "10 of 51 groups, with the one of fifty pairs or without"
    for got in found:
        # fifty pairs of one group, 37 of them with a preference, and nine of others are worth little more than one answer
        assert 1 < got.answers < 2 if got.heldout == 59 else got.answers in range(3, 11)
    plain = fit(first, second, torch.ones(100), steps=1)
    assert plain.answers == 20 and plain.coin == pytest.approx(math.log((1 - 1 / 82) / 2))


def test_what_never_varied_is_not_blown_up():
    first, second = torch.randn(50, 2), torch.randn(50, 2)
    first[:, 1] = second[:, 1] = 3
    head = fit(first, second, (first - second)[:, 0].sign(), hidden=4, decay=0).head
    assert float(head(torch.tensor([[0.0, 4.0]])).abs()) < 100


@pytest.mark.parametrize("name", ["training", "monitor"])
def test_what_prompts_ask_for_points_to_what_classifiers_see(name):
    """The product with the features, summed, is the logit of what was asked above the mean of all, up to the last layer's biases."""
    for classifier, media, prompt, row in (
        (load_digit_classifier(name), torch.rand(2, 3, 8, 8), "3", 3),
        (load_classifier(name), torch.rand(2, 3, 9, 48, 48), "a three", 3),
    ):
        logits = classifier.logits(media) if isinstance(classifier, type(load_digit_classifier(name))) else classifier.logits(media)[0]
        without = logits - classifier.net.digit.bias
        got = (classifier.features(media) * classifier.asked([prompt, prompt])).sum(1)
        torch.testing.assert_close(got, without[:, row] - without.mean(1), rtol=1e-4, atol=1e-4)
    open_prompt = load_classifier(name).asked(["a digit"])
    assert open_prompt.shape == (1, 128) and float(open_prompt.abs().max()) < 1e-6, "nothing is asked"


def test_preferences_for_what_was_asked_reach_prompts_never_seen():
    """Videos of the prompt against videos of another digit. Where the answers are drawn from a hat nothing is learned."""
    said = [spec for spec in map(digits.parse, digits.training_prompts()) if spec.digit is not None] * 2
    wrong = [replace(spec, digit=(spec.digit + 1 + i % 9) % 10) for i, spec in enumerate(said)]
    prompts, features = [digits.describe(spec) for spec in said], features_of("moving-digits")
    with torch.no_grad():
        first, second = (features(digits.render("train", specs, seed).expand(-1, 3, -1, -1, -1), prompts) for seed, specs in ((1, said), (2, wrong)))
    got = fit(first, second, torch.ones(len(said)), groups=prompts)
    assert got.accuracy > 0.95 and got.log_prob > got.coin + 0.4
    drawn = torch.randn(len(said), generator=torch.Generator().manual_seed(0)).sign()
    assert fit(first, second, drawn, groups=prompts).accuracy == pytest.approx(0.5, abs=0.15)


def files(folder, name, media, prompts):
    """Media [N, 3, F, H, W] or [N, 3, H, W] as files in folder / name."""
    frames = media if media.ndim == 5 else media[:, :, None]
    save_each(folder / name, (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1), prompts, 1, 0)
    return sorted((folder / name).glob("*.webp"))


@pytest.fixture(scope="module")
def liked(tmp_path_factory):
    """Scans of digits: the asked one is preferred to another, and two of the asked one are alike."""
    folder = tmp_path_factory.mktemp("liked")
    scans, classes = digits.scans_of("train")
    wanted = torch.arange(10).repeat(12)
    rng = torch.Generator().manual_seed(0)

    def some(asked):
        rows = [(classes == c).nonzero()[:, 0] for c in asked]
        return torch.stack([scans[row[torch.randint(len(row), (), generator=rng)]] for row in rows])[:, None].expand(-1, 3, -1, -1)

    other = (wanted + 1 + torch.randint(9, (120,), generator=rng)) % 10
    alike = torch.arange(120) >= 90
    names = [str(int(c)) for c in wanted]
    chosen = files(folder, "chosen", some(wanted), names)
    rejected = files(folder, "rejected", some(torch.where(alike, wanted, other)), names)
    pairs = [PreferencePair(p, a, b, votes=(0, 0, 1) if tie else (1, 0, 0)) for p, a, b, tie in zip(names, chosen, rejected, alike.tolist(), strict=True)]
    write_pairs(folder / "pairs.jsonl", pairs)
    return folder, pairs


def test_from_a_file_to_a_folder_to_a_run(liked, tmp_path, capsys):
    folder, pairs = liked
    out = tmp_path / "reward"
    assert main(["pairs", "fit", str(folder / "pairs.jsonl"), str(out), "--features", "digits"]) == 0
    said = capsys.readouterr().out
    assert "120 of 10 prompts, 25 % of them ties; 96 trained on" in said and "24 pairs of other prompts" in said and f"preferences:{out}" in said
    record = json.loads((out / "preferences.json").read_text())
    assert {path.name for path in out.iterdir()} == {"preferences.json", "reward_head.json", "reward_head.safetensors"}
    assert record["interval"] == [wilson(record["accuracy"] * 2, 2).low, wilson(record["accuracy"] * 2, 2).high], "two prompts are held out"
    # a head fitted in Python to the same pairs is the same, and so are its scores from the folder
    learned = learn(pairs, features_of("digits"))
    assert (record["accuracy"], record["log_prob"], record["coin"]) == (learned.fitted.accuracy, learned.fitted.log_prob, learned.fitted.coin)
    reward = load_reward(f"preferences:{out}")
    media, prompts = torch.rand(3, 3, 8, 8, requires_grad=True), ["1", "2", "3"]
    assert isinstance(reward, Reward) and reward.differentiable
    scores = checked_scores(reward, media, prompts)
    torch.testing.assert_close(scores, learned.fitted.head(learned.features(media, prompts)))
    assert torch.autograd.grad(scores.sum(), media)[0].flatten(1).abs().sum(1).min() > 0
    # it has learned what was liked: the scan that shows the prompt's digit, also among scans that it has not seen
    scans, classes = digits.scans_of("heldout")
    shown = scans[:, None].expand(-1, 3, -1, -1)
    right, wrong = (reward.score(shown, [str(int((c + shift) % 10)) for c in classes]) for shift in (0, 1))
    assert float((right > wrong).float().mean()) > 0.85
    # and a run climbs it
    images = class_digits()
    recipe = refl(Common(steps=2, batch=4, critic_updates=1, shift=1.0, guidance=1.5), iterations=2)
    run = train(recipe, images.family, out=tmp_path / "run", prompts=images.prompts, reward=reward, options=RunOptions(save_every=10, probe_every=50))
    rows = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["grad/student"] > 0 and json.loads((run.out / "recipe.json").read_text())["reward"] == reward.name


def test_names_are_the_heads(liked, tmp_path):
    _, pairs = liked
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save(learn(pairs, features_of("digits"), steps=3, seed=seed), tmp_path / name)
    a, b, c = (load_preferences(tmp_path / name, features_of).name for name in "abc")
    assert a == b != c and a.startswith("preferences ") and " of digits:training " in a
    with pytest.raises(ValueError, match="out: .*a exists; choose another name"):
        save(learn(pairs, features_of("digits"), steps=3), tmp_path / "a")


def test_a_folder_that_cannot_be_finished_is_not_there(liked, tmp_path, monkeypatch):
    _, pairs = liked
    learned = learn(pairs, features_of("digits"), steps=1)
    monkeypatch.setattr("instep.rewards.preferences.write_json", lambda path, value: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=f"the disk is full: the folder {tmp_path}/out was not written"):
        save(learned, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_none_or_changed(liked, tmp_path, capsys):
    _, pairs = liked
    good = tmp_path / "good"
    save(learn(pairs, features_of("digits"), steps=1), good)

    def said(change):
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        change(bad)
        assert main(["train", "refl", "--reward", f"preferences:{bad}", "--out", str(tmp_path / "run")]) == 2
        return capsys.readouterr().err

    def record(bad, **features):
        told = json.loads((bad / "preferences.json").read_text())
        told["features"] |= features
        (bad / "preferences.json").write_text(json.dumps(told))

    assert "is not a folder that `instep pairs fit` wrote (FileNotFoundError" in said(lambda bad: (bad / "preferences.json").unlink())
    assert "is not a folder that `instep pairs fit` wrote (SafetensorError" in said(lambda bad: (bad / "reward_head.safetensors").write_bytes(b"x"))
    assert "wrote (TypeError" in said(lambda bad: (bad / "reward_head.json").write_text('{"wide": 3}'))
    wide = said(lambda bad: record(bad, given="moving-digits:training"))
    assert "reads 192 features and moving-digits:training gives 384; fit it again" in wide
    other = said(lambda bad: record(bad, given="digits:monitor"))
    assert "was fitted on digits:training" in other and "and digits:monitor is now digits:monitor" in other
    assert "features: 'digits:heldout' is not allowed" in said(lambda bad: record(bad, given="digits:heldout"))


def test_pairs_that_cannot_be_fitted(liked, tmp_path, capsys):
    folder, pairs = liked
    out = tmp_path / "out"

    def said(rows, *options):
        write_pairs(tmp_path / "pairs.jsonl", rows)
        assert main(["pairs", "fit", str(tmp_path / "pairs.jsonl"), str(out), "--features", "digits", *options]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and not out.exists()
        return err

    assert "pairs: 4 of 1 prompt are too few; it takes two prompts" in said([pairs[0]] * 4)
    assert "pairs: all 30 of them are ties" in said(pairs[90:])
    assert "pairs: 2 of 2 prompts with 1 preferences are too few to train and to measure on" in said([pairs[0], pairs[91]])
    assert "questions: 'motion' is in no row" in said(pairs, "--questions", "motion")
    assert "heldout: 1.0 is not allowed" in said(pairs, "--heldout", "1")
    assert "device: 'mars' is not allowed" in said(pairs, "--device", "mars")
    assert "features: 'nowhere' is not a model folder" in said(pairs, "--features", "nowhere")
    assert "features: 'digits:heldout' is not allowed; digits:training or digits:monitor (the held-out classifier measures" in said(
        pairs, "--features", "digits:heldout"
    )
    assert "prompt: '0' is outside the grammar" in said(pairs, "--features", "moving-digits")
    (tmp_path / "gone.webp").write_bytes(b"no image")
    assert "gone.webp cannot be read as an image" in said([*pairs, PreferencePair("1", tmp_path / "gone.webp", pairs[0].rejected)])
    (tmp_path / "gone.webp").unlink()
    assert main(["pairs", "fit", str(tmp_path / "pairs.jsonl"), str(out), "--features", "digits"]) == 2
    assert "gone.webp' is not allowed; it is a file that exists" in capsys.readouterr().err
    assert main(["pairs", "fit", str(folder / "none.jsonl"), str(out)]) == 2
    assert "none.jsonl is not a file that exists" in capsys.readouterr().err
    assert main(["pairs", "fit", str(folder / "pairs.jsonl"), str(folder)]) == 2
    assert "exists; choose another name" in capsys.readouterr().err


def test_every_file_is_read_once(liked):
    _, pairs = liked
    seen = []

    def watch(todo):
        seen.extend(todo)
        return todo

    first, second = read_features([pairs[0], pairs[0], pairs[1]], features_of("digits"), watch)
    assert len(seen) == 4 and first.shape == (3, 192)
    torch.testing.assert_close(first[0], first[1])
    assert not torch.equal(first[0], second[0])


def tiny_clip(folder, seed=0):
    """A CLIP of one layer and width 16 with random weights, as a folder; embeddings of 24."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPConfig(
            text_config={**small, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "eos_token_id": 1},
            vision_config={**small, "image_size": 32, "patch_size": 8},
            projection_dim=24,
        )
        network = CLIPModel(config)
    processor = CLIPProcessor(image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer=tokenizer)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return network.eval(), processor


def test_features_of_an_image_text_model(tmp_path):
    network, processor = tiny_clip(tmp_path / "clip")
    features = image_text_features(str(tmp_path / "clip"), frames=3)
    media = torch.rand(2, 3, 5, 40, 56)
    got = features(media, ["a hen", "a cat"])
    assert got.shape == (2, features.width) == (2, 72)
    # by hand, through the processor: frames 0, 2 and 4 as 8-bit images, embeddings of length one, mean over frames
    unit = torch.nn.functional.normalize
    for i, prompt in enumerate(["a hen", "a cat"]):
        images = [(media[i, :, f].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy() for f in (0, 2, 4)]
        given = processor(text=[prompt], images=images, return_tensors="pt", padding=True)
        with torch.no_grad():
            out = network(**given)
        image, text = unit(out.image_embeds).mean(0), unit(out.text_embeds)[0]
        torch.testing.assert_close(got[i], torch.cat([image, text, image * text]), atol=2e-3, rtol=0)
    # a gradient to the pixels, of the frames that were seen
    media.requires_grad_()
    slope = torch.autograd.grad(features(media, ["a", "b"])[:, :24].sum(), media)[0].abs().sum((0, 1, 3, 4))
    assert (slope > 0).tolist() == [True, False, True, False, True]
    image = features(media.detach()[:, :, 0], ["a", "b"])
    torch.testing.assert_close(image, features(media.detach()[:, :, :1], ["a", "b"]))
    assert features(media, ["long " * 50] * 2).isfinite().all()
    with pytest.raises(ValueError, match="frames: 0 is not allowed"):
        image_text_features(str(tmp_path / "clip"), 0)
    # only weights without code in them
    (tmp_path / "clip" / "model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="features: .*clip cannot be loaded .*give a CLIP or SigLIP with .safetensors"):
        image_text_features(str(tmp_path / "clip"))


def test_preparation_follows_the_processors_file():
    square = {"do_resize": True, "size": {"height": 6, "width": 4}, "resample": 2, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    got = Preparation.of(square, "features: x")(torch.full((1, 3, 12, 8), 0.75))
    assert got.shape == (1, 3, 6, 4) and got.unique().tolist() == [1.0]
    plain = Preparation.of({"do_resize": False, "do_center_crop": True, "crop_size": {"height": 4, "width": 2}}, "x")
    frames = torch.rand(1, 3, 6, 8)
    assert torch.equal(plain(frames), frames[:, :, 1:5, 3:5])
    with pytest.raises(ValueError, match="media: 3 x 3 are too small for a crop of 4 x 2"):
        plain(torch.rand(1, 3, 3, 3))
    for wrong in ({"do_resize": True, "size": {"max_num_patches": 256}}, {"do_resize": True, "size": {"shortest_edge": 4}, "resample": 0}):
        with pytest.raises(ValueError, match="features: x resizes images in a way that is not known"):
            Preparation.of(wrong, "features: x")


def test_a_reward_on_an_image_text_model(tmp_path, capsys):
    """Bright videos are liked: a random CLIP tells them from dark ones. The folder belongs to the very weights."""
    tiny_clip(tmp_path / "clip")
    light = torch.rand(40, 3, 4, 36, 36) * 0.3
    names = [f"prompt {i}" for i in range(40)]
    good, bad = files(tmp_path, "good", light + 0.7, names), files(tmp_path, "bad", light, names)
    write_pairs(tmp_path / "pairs.jsonl", [PreferencePair(*row) for row in zip(names, good, bad, strict=True)])
    clip, out = str(tmp_path / "clip"), tmp_path / "out"
    assert main(["pairs", "fit", str(tmp_path / "pairs.jsonl"), str(out), "--features", clip, "--frames", "2"]) == 0
    assert "100.0 % of preferences ordered right (95 % interval 67.6 to 100.0 %)" in capsys.readouterr().out, "8 of 8"
    reward = load_preferences(out, features_of)
    assert reward.name.endswith(", 2 frames") and " of clip " in reward.name
    scores = reward.score(torch.cat([light + 0.7, light]), names * 2)
    assert bool((scores[:40] > scores[40:]).all())
    shutil.rmtree(clip)
    tiny_clip(tmp_path / "clip", seed=1)
    with pytest.raises(ValueError, match="was fitted on clip .*, and .*clip is now clip .*; give that back"):
        load_preferences(out, features_of)


def test_a_fit_that_is_a_coin_says_so(liked, tmp_path, capsys):
    folder, pairs = liked
    rng = torch.Generator().manual_seed(0)
    heads = (torch.rand(90, generator=rng) < 0.5).tolist()
    mixed = [p if keep else PreferencePair(p.prompt, p.rejected, p.chosen) for p, keep in zip(pairs[:90], heads, strict=True)]
    write_pairs(tmp_path / "pairs.jsonl", mixed)
    assert main(["pairs", "fit", str(tmp_path / "pairs.jsonl"), str(tmp_path / "out"), "--features", "digits"]) == 0
    assert "a coin might do as well" in capsys.readouterr().err


def test_long_readings_show_how_far_they_are(capsys, monkeypatch):
    from instep.cli import pairs as module

    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    assert list(module._watched(list(range(12)))) == list(range(12))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "media: 2/12, 0.7 min left" and len(said) == 2
    monkeypatch.setattr(module.time, "monotonic", lambda: 0.0)
    assert list(module._watched([1, 2])) == [1, 2] and capsys.readouterr().err == ""
