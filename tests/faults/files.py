"""Kinds 1, 5, 6 and 9 without a model: files of other people, outputs that exist or cannot be written, and readers that are bounded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from faults.sandbox import Fault, Outcome, call, command, holds, swapped
from instep.core.files import append_text, write_bytes
from instep.core.json_files import read_object
from instep.core.tensor_file import read_tensors
from instep.data import media
from instep.data.prompt import load_prompts
from instep.export.rules import RECORD, check_target, keep_others
from instep.human_eval.frames import read as read_frames
from instep.models.folder import settings_in
from instep.report.page import MARK, is_report
from instep.rewards.external import command as command_reward

Make = Callable[[Path], object]


def text(name: str, content: str | bytes) -> Make:
    """Writes a file of the sandbox, and the folders above it."""

    def make(folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def sparse(name: str, size: int) -> Make:
    """A file of `size` bytes that takes no room on the disk."""

    def make(folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as handle:
            handle.truncate(size)

    return make


def line(make: tuple[Make, ...], words: str, pattern: str, folder: Path, *, status: int = 2, writes: tuple[str, ...] = ()) -> Outcome:
    for each in make:
        each(folder)
    return command(words.split(), pattern, folder, status=status, writes=writes)


def reads(make: tuple[Make, ...], do: Callable[[Path], object], pattern: str, folder: Path) -> Outcome:
    for each in make:
        each(folder)
    return call(lambda: do(folder), pattern, folder)


def texts(make: Make, name: str, expected: list[str], folder: Path) -> Outcome:
    make(folder)
    return holds(lambda: [p.text for p in load_prompts(folder / name)] == expected, f"read as {expected}", "read as something else")


def picture(name: str, width: int, height: int) -> Make:
    """A black PNG, small on the disk."""

    def make(folder: Path) -> None:
        from PIL import Image

        Image.new("1", (width, height)).save(folder / name)

    return make


RUN = text("run/recipe.json", json.dumps({"instep": "1", "recipe": "dmd2", "model": "x", "levels": [1.0], "seed": 0, "config": {"stages": []}}))
EXPORT = text(f"to/{RECORD}", "{}")
MINE = text("mine.html", "<html>my thesis</html>")

# made, the command line, what the message begins with
BEFORE = (
    ((), "sample moving-digits --out samples.avi", "out: samples.avi has the ending '.avi', which is not allowed; allowed: .webp, .gif, .png"),
    ((), "sample moving-digits --out samples", "out: samples has the ending ''"),
    ((text("file", ""),), "sample moving-digits --out file/samples.webp", "out: file/samples.webp cannot be written"),
    ((text("file", ""),), "sample moving-digits --each file/each", "each: file/each cannot be written"),
    ((RUN, text("file", "")), "report run --out file/page.html", "out: file/page.html cannot be written"),
    ((RUN, text("file", "")), "export run --to file/student", "out: file/student cannot be written"),
    ((RUN,), f"export run --to {'x' * 240}", "out: the name .* is not allowed for a new folder"),
    ((text("file", ""),), "pairs export s.sqlite file/pairs.jsonl", "out: file/pairs.jsonl cannot be written"),
    ((), "pairs export s.sqlite pairs.csv", "pairs: 'pairs.csv' ends in '.csv'"),
    ((text("file", ""), text("p.jsonl", "{}")), "pairs fit p.jsonl file/liked", "out: file/liked cannot be written"),
    ((), "train dmd2 --prompts nowhere.txt", "prompts: nowhere.txt is not a file that exists"),
    ((), "train dmd2 --model nowhere --prompts p.txt", "model: 'nowhere' is not|prompts: p.txt"),
    ((), "train refl --reward nothing:at_all", "reward: 'nothing:at_all' cannot be imported"),
    ((), "train dm-align-pair --pairs nowhere.jsonl", "pairs: .*nowhere.jsonl"),
    ((), "human-eval only-one", "samples: 1 folder given; name two"),
    ((), "eval --prompts p.txt --reward brightness", "dirs: none was given"),
)
# made, the command line or the call, the message
OTHERS = (
    (text("p.txt", b"\xff\xfea\x00"), "p.txt", "p.txt, line 1 is not UTF-8"),
    (text("p.txt", " \n\n"), "p.txt", "p.txt is empty"),
    (text("p.csv", "caption,seed\na cat,1\n"), "p.csv", 'p.csv has the columns caption, seed; its first line names a column "prompt"'),
    (text("p.csv", "prompt\n"), "p.csv", "p.csv has no row below its header"),
    (text("p.json", '{"a": 1}'), "p.json", "p.json holds no list with items"),
    (text("p.json", '["a cat",'), "p.json", "p.json is no JSON"),
    (text("p.json", '["a cat", 3]'), "p.json", "p.json, line 2 is not of the form"),
    (text("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n'), "p.jsonl", "p.jsonl, line 2 holds 3"),
    (text("p.jsonl", '{"prompt": "a"}\nnonsense\n'), "p.jsonl", "p.jsonl, line 2 is not of the form"),
    (text("p.txt", "a [image: b] [image: c]\n"), "p.txt", "p.txt, line 1: "),
)
READ = (
    (text("p.txt", '{"prompt": "a cat"}\n{"prompt": "a dog"}\n'), "p.txt", ["a cat", "a dog"], "JSON lines in a .txt"),
    (text("p.csv", 'prompt,negative\n"a cat, asleep",blurry\na dog,\n'), "p.csv", ["a cat, asleep", "a dog"], "a CSV with a header and a quoted comma"),
    (text("p.json", '["a cat", {"prompt": "a dog"}]'), "p.json", ["a cat", "a dog"], "a JSON list"),
    (text("p.txt", b"\xef\xbb\xbfa cat\r\na dog\r\n"), "p.txt", ["a cat", "a dog"], "a byte-order mark and Windows line ends"),
)
DAMAGED = (
    ((text("run/recipe.json", ""),), "export run --to new", "dir: run/recipe.json is damaged .it is empty.; restore it"),
    ((text("run/recipe.json", '{"instep": "1'),), "export run --to new", "dir: run/recipe.json is damaged .Unterminated string"),
    ((text("run/recipe.json", "[1]"),), "report run", "dir: run/recipe.json holds a list, not an object"),
    ((text("m/model_index.json", "{"),), "recipes --model m", "model: m/model_index.json is damaged"),
    ((text("m/model_index.json", b"\xff\xfe"),), "recipes --model m", "model: m/model_index.json is damaged .*utf-8"),
    ((text("m/model_index.json", '{"_class_name": "LattePipeline"}'),), "sample m --prompts x", "model: it is a LattePipeline, which no family knows yet"),
)
EXISTS = (
    ((RUN, MINE), "report run --out mine.html", "out: mine.html exists and was not written by instep"),
    ((RUN, MINE), "report run --out mine.html --overwrite", "out: mine.html exists and was not written by instep"),
    ((RUN, text("page.html", f"<html>{MARK}")), "report run --out page.html", "out: page.html exists; give --overwrite"),
    ((RUN, text("mine/thesis.txt", "x")), "export run --to mine", "out: mine exists and was not written by instep"),
    ((RUN, text("to/thesis.txt", "x")), "export run --to to --overwrite", "out: to exists and was not written by instep"),
    ((RUN, EXPORT), "export run --to to", "out: to exists; give --overwrite"),
    ((text("s.webp", "x"),), "sample moving-digits --out s.webp", "out: s.webp exists; choose another name"),
    ((text("each/mine", "x"),), "sample moving-digits --each each", "each: each exists; choose another name"),
    ((text("p.jsonl", "x"),), "pairs export s.sqlite p.jsonl", "out: p.jsonl exists; choose another name"),
    ((text("p.jsonl", "x"), text("in.jsonl", "{}")), "pairs import in.jsonl p.jsonl", "out: p.jsonl exists; choose another name"),
    ((text("liked/mine", "x"), text("p.jsonl", "{}")), "pairs fit p.jsonl liked", "out: liked exists; choose another name"),
    ((text("lab/mine", "x"),), "lab dmd2 --out lab --iterations 1", "out: lab exists; choose another name"),
    ((text("p.txt", "a\nb\nc\nd"), text("e.json", "x")), "eval m --prompts p.txt --out e.json --reward compressible", "out: e.json exists"),
    ((text("run", "x"),), "train dmd2 --out run --iterations 1", "out: .*run is (a file|not a folder)"),
)


def bomb(folder: Path) -> object:
    return list(read_tensors(folder / "x.safetensors"))


def deep(folder: Path) -> object:
    return read_object(folder / "x.json", "dir", "restore it")


def kept(folder: Path) -> Outcome:
    """A user's own file in an earlier export, and one that the earlier export wrote."""
    for name, content in ((f"old/{RECORD}", json.dumps({"files": [RECORD, "stale"]})), ("old/stale", ""), ("old/thesis.txt", "x"), (f"new/{RECORD}", "{}")):
        text(name, content)(folder)
    check_target(folder / "old", overwrite=True)
    keep_others(folder / "old", folder / "new")
    names = sorted(path.name for path in (folder / "new").iterdir())
    return holds(lambda: names == [RECORD, "thesis.txt"], "the user's file stays, what instep wrote goes", f"the new export has {names}")


def animation(folder: Path) -> Outcome:
    """Ten frames of 12 x 12 where 1,000 pixels are allowed; no frame is decoded."""
    from PIL import Image

    frames = [Image.new("RGB", (12, 12), (20 * i, 0, 0)) for i in range(10)]
    frames[0].save(folder / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    with swapped(media, "MOST_PIXELS", 1000):
        return call(lambda: media._images(folder / "x.webp"), "it holds 1,440 pixels in all its frames, more than 1,000", folder)


def full_disk(folder: Path) -> Outcome:
    os.symlink("/dev/full", folder / "log.jsonl")
    return call(lambda: append_text(folder / "log.jsonl", "{}\n"), "the disk is full: a row of .*was not written", folder, OSError)


def limited(folder: Path) -> Outcome:
    """RLIMIT_FSIZE of 1 kB: a write ends in the middle, and the file that was there before is whole."""
    import resource
    import signal

    (folder / "x").write_bytes(b"before")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        return call(lambda: write_bytes(folder / "x", b"y" * 5000), "was not written and what was there before is unchanged; raise the limit", folder, OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


BOUNDED = (
    (
        (sparse("p.txt", 300_000_000),),
        lambda f: load_prompts(f / "p.txt"),
        "prompts: .* has 300 MB, and at most 256 MB are read",
        "a file of prompts of 300 MB",
    ),
    (
        (text("p.txt", "x" * 100_000),),
        lambda f: load_prompts(f / "p.txt"),
        "line 1 holds a prompt of more than 20000 characters",
        "a prompt of 100,000 characters",
    ),
    ((sparse("r/recipe.json", 100_000_000),), lambda f: read_object(f / "r/recipe.json", "dir", "restore it"), "has 100 MB", "a recipe.json of 100 MB"),
    ((sparse("m/model_index.json", 100_000_000),), lambda f: settings_in(f / "m"), "has 100 MB", "a model_index.json of 100 MB"),
    ((text("x.json", "[" * 200_000),), deep, "is damaged", "JSON of 200,000 nested lists"),
    (
        (text("x.safetensors", (2**60).to_bytes(8, "little") + b"{}"),),
        bomb,
        "claims 1,152,921,504,606,846,976 bytes",
        "a safetensors header claiming 2^60 bytes",
    ),
    ((picture("x.png", 17_000, 15_000),), lambda f: media._images(f / "x.png"), "decompression bomb|pixels", "a PNG of 17,000 x 15,000 among pairs"),
    ((picture("x.png", 17_000, 15_000),), lambda f: read_frames(f / "x.png"), "decompression bomb|pixels", "the same PNG for the human-evaluation page"),
)

FAULTS = (
    *(
        Fault(1, f"instep {words}" if len(words) < 120 else "instep export run --to NAME OF 240 BYTES", "refused at once", partial(line, make, words, found))
        for make, words, found in BEFORE
    ),
    *(
        Fault(
            5, f"prompts: {name} of {found!r}", "the file and the line are named", partial(reads, (make,), lambda f, name=name: load_prompts(f / name), found)
        )
        for make, name, found in OTHERS
    ),
    *(Fault(5, f"prompts: {what}", f"read as {expected}", partial(texts, make, name, expected)) for make, name, expected, what in READ),
    *(Fault(5, f"instep {words}: {found}", "the damaged file is named", partial(line, make, words, found)) for make, words, found in DAMAGED),
    *(Fault(6, f"instep {words}", "refused; every file stays as it was", partial(line, make, words, found)) for make, words, found in EXISTS),
    Fault(6, "a user's file in an export that is replaced", "it stays", kept),
    Fault(
        6,
        "instep report over a page of instep's with --overwrite",
        "it is one of instep's",
        lambda f: (text("p.html", MARK)(f), holds(lambda: is_report(f / "p.html"), "known as a report", "not known"))[1],
    ),
    *(Fault(9, what, "refused before memory is taken", partial(reads, make, do, found)) for make, do, found, what in BOUNDED),
    Fault(9, "an animation whose frames are too many for its size", "refused from its header", animation),
    Fault(9, "a full disk (/dev/full) under the log", "one line: what was not written, what to do", full_disk),
    Fault(9, "a limit on the size of files (RLIMIT_FSIZE)", "the earlier file is whole", limited),
    Fault(
        7,
        "--reward 'command:python score.py | head'",
        "refused: no shell runs",
        lambda f: call(lambda: command_reward("python score.py | head"), "holds '|', which only a shell understands", f),
    ),
)
