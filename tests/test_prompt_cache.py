"""Encoded texts: the same from memory, disk and encoders; bounded memory; files that may be damaged, shared or half written; runs that encode once."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_dit import tiny_dit
from test_run import interrupted_before, same
from tiny import FRAMES, HEIGHT, WIDTH, tiny_cogvideox_pipeline, tiny_sd3_pipeline, tiny_wan22_pipeline, tiny_wan_pipeline

from instep.cli import train as command
from instep.core.size import Size
from instep.data.prompt import Prompt
from instep.data.samples import PairSamples, RealSamples
from instep.models import prompt_cache
from instep.models.cogvideox import CogVideoXFamily
from instep.models.dit import DiTFamily
from instep.models.prompt_cache import PromptCache, encoder_identity
from instep.models.sd3 import SD3Family
from instep.models.wan import WanFamily
from instep.models.wan22 import Wan22Family
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.training.inputs import every_prompt
from instep.training.loop import Interrupted
from instep.training.options import RunOptions
from instep.training.run import train

TEXTS = ["a seven moving left fast", "a digit", "an eight", "ein Löwe 東京", "a long text " * 60]
PROMPTS = [Prompt(TEXTS[0], negative="blurry"), *TEXTS[1:]]
RECIPE = dmd2(Common(steps=2, batch=2, critic_updates=1), iterations=3)
OPTIONS = RunOptions(save_every=1, probe_every=50, teacher_samples=4)


def wan(seed=0) -> WanFamily:
    return WanFamily(tiny_wan_pipeline(seed), Size(HEIGHT, WIDTH, FRAMES), name="tiny")


FAMILIES = {
    "wan": wan,
    "wan22": lambda: Wan22Family(tiny_wan22_pipeline(), Size(HEIGHT, WIDTH, FRAMES)),
    "sd3": lambda: SD3Family(tiny_sd3_pipeline(), Size(16, 16, 1)),
    "cogvideox": lambda: CogVideoXFamily(tiny_cogvideox_pipeline(), Size(32, 32, 9)),
}


def counted(family):
    """The family and the list of texts that its encoders are given from now on."""
    seen, encode = [], family.encode_text
    family.encode_text = lambda text: (seen.append(text), encode(text))[1]
    return family, seen


def alike(a, b) -> bool:
    tensors = {name: value for name, value in vars(a).items() if isinstance(value, torch.Tensor)}
    return bool(tensors) and all(torch.equal(value, getattr(b, name)) for name, value in tensors.items())


def of_text(text: str) -> dict[str, torch.Tensor]:
    """Stands for encoders: 8 KB that depend on the text alone."""
    seed = int.from_bytes(hashlib.sha256(repr(text).encode()).digest()[:4])
    return {"text": torch.randn(64, 32, generator=torch.Generator().manual_seed(seed))}


def opened(folder: Path, limit: int = prompt_cache.MEMORY_LIMIT) -> PromptCache:
    cache = PromptCache(limit)
    cache.open(folder, "encoders")
    return cache


def filled(folder: Path, texts, encode=of_text) -> PromptCache:
    cache = opened(folder)
    cache.fill(cache.missing(texts), encode, lambda: None)
    return cache


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_text_is_the_same_from_encoders_memory_and_disk_beside_any_neighbours(tmp_path, kind):
    fam = FAMILIES[kind]()
    fam.encode_all(PROMPTS, tmp_path)
    again, seen = counted(FAMILIES[kind]())
    again.prompt_cache.limit = 0  # every look-up goes to disk
    again.encode_all(PROMPTS, tmp_path)
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[1:2], [PROMPTS[2], PROMPTS[2]]):
        alone = FAMILIES[kind]()
        for text in TEXTS:  # in another order than they are asked for
            alone.encode([text])
        for name in ("encode", "unconditional"):
            expected = getattr(alone, name)(prompts)
            assert alike(getattr(fam, name)(prompts), expected) and alike(getattr(again, name)(prompts), expected)
    assert alike(fam.unconditional(PROMPTS[:2]), fam.encode(["blurry", ""])) and not alike(fam.unconditional(PROMPTS[:2]), fam.encode(PROMPTS[:2]))
    assert seen == [] and again.prompt_cache.nbytes == 0


@pytest.mark.parametrize("kind", ["wan", "sd3", "cogvideox"])
def test_what_is_kept_is_in_the_encoders_dtype_and_nothing_else_is_held(tmp_path, kind):
    fam = FAMILIES[kind]()
    for encoder in fam.text_modules():
        encoder.to(torch.bfloat16)
    fam.encode_all(TEXTS[:2], tmp_path)
    for family in (fam, counted(fam.with_pipe(fam.pipe, fam.size))[0]):
        family.encode_all(TEXTS[:2], tmp_path)
        (kept,) = family.encoded(TEXTS[:1])
        assert set(kept) == ({"text", "pooled"} if kind == "sd3" else {"text"})
        for value in kept.values():
            assert value.dtype == torch.bfloat16 and value.device.type == "cpu" and value.untyped_storage().nbytes() == value.nbytes
        assert family.encode(TEXTS[:1]).text.dtype == torch.float32


def resident() -> int:
    """Bytes of memory that this process holds of its own; 0 where the system does not say."""
    file = Path("/proc/self/status")
    found = dict(line.split(":", 1) for line in file.read_text().splitlines()) if file.is_file() else {}
    return int(found.get("RssAnon", "0 kB").split()[0]) * 1024


def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path):
    limit, bytes_of_one, grown = 2**20, 64 * 32 * 4, {}
    for n in (1_000, 10_000):
        texts, before = [f"text {i}" for i in range(n)], resident()
        cache = opened(tmp_path / str(n), limit)
        cache.fill(texts, of_text, lambda: None)
        assert cache.nbytes == limit // bytes_of_one * bytes_of_one, "the bound is used to the full and not exceeded"
        assert cache.missing(texts) == [] and sum(path.stat().st_size for path in cache.folder.iterdir()) > n * bytes_of_one
        for start in range(0, n, 100):
            found = cache.find(texts[start : start + 100])
            assert all(torch.equal(found[text]["text"], of_text(text)["text"]) for text in texts[start : start + 100])
        maps = Path("/proc/self/maps")
        assert cache.nbytes <= limit and not (maps.is_file() and str(tmp_path) in maps.read_text()), "nothing more is held, and no file stays mapped"
        grown[n] = resident() - before
    assert grown[10_000] < 30e6, f"of 82 MB on disk: {grown}"


def test_the_least_recently_used_text_makes_room():
    cache, one = PromptCache(limit=3 * 8192), of_text("x")
    for text in "abc":
        cache.keep(text, one)
    cache.find(["a"])
    cache.keep("d", one)
    assert set(cache.find("abcd")) == {"a", "c", "d"} and cache.nbytes == 3 * 8192
    cache.keep("d", one)
    assert cache.nbytes == 3 * 8192, "the same text again is counted once"


def test_a_file_holds_so_many_texts_or_bytes(tmp_path, monkeypatch):
    filled(tmp_path / "texts", [f"text {i}" for i in range(600)])
    assert len(list((tmp_path / "texts").iterdir())) == 3
    monkeypatch.setattr(prompt_cache, "SHARD_BYTES", 10 * 8192)
    filled(tmp_path / "bytes", [f"text {i}" for i in range(35)])
    assert len(list((tmp_path / "bytes").iterdir())) == 4


def changed_weights(fam):
    fam.pipe.text_encoder.encoder.block[0].layer[0].layer_norm.weight.data.mul_(1.01)


def changed_config(fam):
    fam.pipe.text_encoder.config.feed_forward_proj = "relu"


def changed_length(fam):
    fam.text_length = 64


def changed_dtype(fam):
    fam.pipe.text_encoder.bfloat16()


def changed_vocabulary(fam):
    fam.pipe.tokenizer.add_tokens(["seven"])


def changed_tokenizer(fam):
    fam.pipe.tokenizer.model_max_length = 64


CHANGES = [changed_weights, changed_config, changed_length, changed_dtype, changed_vocabulary, changed_tokenizer]


@pytest.mark.parametrize("change", CHANGES)
def test_other_encoders_another_tokenizer_or_length_have_another_key(tmp_path, change):
    fam = wan()
    before = fam.text_identity()
    fam.encode_all(["a digit"], tmp_path)
    assert fam.text_identity() == before == wan().text_identity(), "the same, encoded with or not, and made anew"
    change(fam)
    assert fam.text_identity() != before
    fam, seen = counted(fam)
    fam.encode_all(["a digit"], tmp_path)
    assert seen == ["", "a digit"] and len(list(tmp_path.iterdir())) == 2, "neither memory nor the files of the other encoders are used"


def test_the_key_is_that_of_a_loaded_folder_too(tmp_path):
    wan().pipe.save_pretrained(tmp_path / "here")
    wan().pipe.save_pretrained(tmp_path / "there")
    keys = {WanFamily.load(tmp_path / name, Size(HEIGHT, WIDTH, FRAMES)).text_identity() for name in ("here", "there")}
    assert len(keys) == 1, "where a model lies does not count"


def test_the_key_of_a_family_of_ones_own_differs():
    class Own(WanFamily):
        def encode_text(self, text):
            return {"text": super().encode_text(text)["text"][:1]}

    assert Own(tiny_wan_pipeline(), Size(HEIGHT, WIDTH, FRAMES)).text_identity() != wan().text_identity()


def test_the_key_tells_a_missing_encoder_and_a_slow_tokenizer():
    class Slow:
        model_max_length, special_tokens_map = 8, {"pad_token": "<pad>"}

        def __init__(self, *words: str) -> None:
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return {word: i for i, word in enumerate(self.words)}

    keys = {encoder_identity({}, {"tokenizer": Slow(*words)}, length=8) for words in ("ab", "ba", "abc")}
    assert len(keys) == 3 and encoder_identity({}, {"tokenizer": Slow("a", "b")}, length=8) in keys
    whole, without = FAMILIES["sd3"](), FAMILIES["sd3"]()
    without.pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    assert whole.text_identity() != without.text_identity() and (len(whole.text_modules()), len(without.text_modules())) == (3, 2)


def test_other_texts_have_other_keys(tmp_path):
    texts = ["", "a", "A", "a ", "ä", "a\u0308", "\ud800", "a\0"]
    filled(tmp_path, texts)
    found = opened(tmp_path).find(texts)
    assert all(torch.equal(found[text]["text"], of_text(text)["text"]) for text in texts)
    assert opened(tmp_path).missing(["b", "a", "b"]) == ["b"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def of_others(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, path)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, emptied, zeroed, of_others, flipped, os.remove])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_damaged_file_is_ignored_with_one_line_and_its_texts_encoded_again(tmp_path, capsys, monkeypatch, damage, when):
    monkeypatch.setattr(prompt_cache, "SHARD_TEXTS", 2)
    texts = ["a", "b", "c", "d"]
    cache = filled(tmp_path, texts)
    hurt = cache._files[prompt_cache._key("a")]
    cache = opened(tmp_path) if when == "after" else cache
    capsys.readouterr()
    damage(hurt)
    if when == "before":
        cache = opened(tmp_path)
    found = {text for _ in range(2) for text in cache.find(texts)}
    assert found == {"c", "d"} and cache.missing(texts) == ["a", "b"]
    printed = capsys.readouterr().out.splitlines()
    if damage is os.remove and when == "before":
        assert printed == [], "a file that is not there is not missed"
    else:
        (line,) = printed
        assert line.startswith(f"prompt cache: {hurt} is damaged or gone (") and line.endswith("and ignored; its texts are encoded again")
    again = []
    cache.fill(cache.missing(texts), lambda text: (again.append(text), of_text(text))[1], lambda: None)
    assert again == ["a", "b"] and all(torch.equal(cache.find([text])[text]["text"], of_text(text)["text"]) for text in texts)


def test_a_family_encodes_what_was_damaged(tmp_path, capsys):
    fam, seen = counted(wan())
    fam.encode_all(TEXTS[:2], tmp_path)
    whole = fam.encode(TEXTS[:2])
    fam.prompt_cache.limit = 0
    fam.prompt_cache.keep("", {"text": torch.zeros(0)})
    seen.clear()
    cut(next(tmp_path.iterdir()))
    assert alike(fam.encode(TEXTS[:2]), whole) and seen == TEXTS[:2] and capsys.readouterr().out.count("is damaged") == 1


def write_all(folder: Path, number: int, barrier) -> None:
    cache = opened(folder)
    missing = cache.missing([f"text {i}" for i in range(40)])
    barrier.wait()
    cache.fill(missing if number else missing[::-1], of_text, lambda: None)


def test_two_processes_write_into_one_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prompt_cache, "SHARD_TEXTS", 4)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=write_all, args=(tmp_path, number, barrier)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 20, "each its own files"
    texts = [f"text {i}" for i in range(40)]
    found = opened(tmp_path).find(texts)
    assert all(torch.equal(found[text]["text"], of_text(text)["text"]) for text in texts) and capsys.readouterr().out == ""


def test_nothing_to_do_is_silent_and_work_has_a_line(tmp_path, capsys):
    wan().encode_all(["a digit"], tmp_path)
    assert capsys.readouterr().err.startswith("encoding texts: 2/2 in ")
    wan().encode_all(["a digit", ""], tmp_path)
    assert capsys.readouterr() == ("", "")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"prompt_cache: .*file is a file, which is not allowed; give a folder"):
        wan().encode_all(["a digit"], tmp_path / "file")


def test_a_model_without_text_encoders_writes_nothing(tmp_path):
    images = DiTFamily(tiny_dit())
    images.encode_all(["7"], tmp_path / "none")
    assert not (tmp_path / "none").exists() and images.text_modules() == []


class Watching:
    """A monitor with open prompts."""

    open_prompts, open_copies = ("anything", Prompt("something", negative="dark")), 2

    def metrics(self, media, prompts):
        return {}

    def modes(self, media):
        return 1.0


def test_every_prompt_of_a_run_is_named():
    real = RealSamples(("real",), torch.zeros(1, 2))
    pairs = PairSamples(("pair",), torch.zeros(1, 2), torch.zeros(1, 2))
    named = every_prompt((Prompt("a"), Prompt("b")), real, pairs, Watching(), "blurry")
    assert list(map(str, named)) == ["a", "b", "real", "pair", "anything [negative: blurry]", "something [negative: dark]"]
    assert every_prompt((Prompt("a"),), None, None, None, None) == (Prompt("a"),)


def test_after_the_pass_a_run_needs_no_text_encoder(tmp_path):
    """Not for real samples, the probe's open prompts, guidance or the empty text; the folder lies in the run's."""
    fam, seen = counted(wan())
    encode_all, done = fam.encode_all, []
    fam.encode_all = lambda *args: (encode_all(*args), done.append(list(seen)))[0]
    real = RealSamples(("a three", "a four"), torch.randn(2, *fam.latent_shape))
    run = train(
        dmd2(Common(steps=2, batch=2, critic_updates=1, guidance=2.0), iterations=1, gan=0.01),
        fam,
        out=tmp_path / "run",
        prompts=TEXTS[:2],
        real=real,
        monitor=Watching(),
        negative_prompt="blurry",
        options=OPTIONS,
    )
    (before,) = done
    assert seen == before and set(seen) == {"", "blurry", "dark", "anything", "something", "a three", "a four", *TEXTS[:2]} and len(seen) == len(set(seen))
    assert len(list((run.out / "prompts").iterdir())) == 1


def test_killed_and_resumed_it_ends_the_same_and_encodes_once(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_cache, "SHARD_TEXTS", 2)
    whole = train(RECIPE, wan(), out=tmp_path / "whole", prompts=PROMPTS, options=OPTIONS).out
    cut_off = {"out": tmp_path / "cut", "prompts": PROMPTS, "options": OPTIONS}
    fam, first = counted(wan())
    encode = fam.encode_text

    def dies(text):
        if len(first) == 5:
            raise KeyboardInterrupt
        return encode(text)

    fam.encode_text = dies
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, fam, **cut_off)
    fam, second = counted(wan())
    with interrupted_before(2):
        train(RECIPE, fam, **cut_off)
    assert len(first) == 5 and set(second) | set(first[:4]) == {"", "blurry", *TEXTS} and len(second) == 3, "the file in progress is lost, no more"
    fam, third = counted(wan())
    same(whole, train(RECIPE, fam, **cut_off).out)
    assert third == []


def test_two_runs_share_a_folder(tmp_path):
    shared = replace(OPTIONS, prompt_cache=tmp_path / "shared")
    one = train(RECIPE, wan(), out=tmp_path / "one", prompts=PROMPTS, options=OPTIONS)
    fam, seen = counted(wan())
    two = train(RECIPE, fam, out=tmp_path / "two", prompts=PROMPTS, options=shared)
    assert len(seen) == 7 and not (two.out / "prompts").exists()
    fam, seen = counted(wan())
    three = train(RECIPE, fam, out=tmp_path / "three", prompts=PROMPTS, options=shared)
    assert seen == []
    same(one.out, two.out)
    same(one.out, three.out)
    records = [json.loads((run.out / "recipe.json").read_text()) for run in (one, two)]
    assert records[0] == records[1], "where texts are kept is not part of what makes a run this one"


def test_the_command_line_takes_the_folder(tmp_path, monkeypatch):
    from instep.cli.main import main

    given = []

    def stops(*args, options, **others):
        given.append(options.prompt_cache)
        raise Interrupted("a test")

    monkeypatch.setattr(command, "train", stops)
    assert main(["train", "dmd2", "--out", str(tmp_path / "run"), "--prompt-cache", str(tmp_path / "shared")]) == 130
    assert main(["train", "dmd2", "--out", str(tmp_path / "run")]) == 130
    assert given == [tmp_path / "shared", None]
