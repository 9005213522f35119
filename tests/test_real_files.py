"""A user's own images and videos: which files, how they are read, and the cache of their latents."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
import shlex
import tarfile
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import instep.data.media as media
import instep.data.shards as shards
from instep.cli.main import main
from instep.core.ranks import Ranks
from instep.core.size import Size
from instep.data.clips import read_clip
from instep.data.latent_cache import real_samples
from instep.data.media import fitted, read_media
from instep.data.real_files import RealFile, real_files

IMAGE, VIDEO = Size(8, 12, 1), Size(8, 12, 3)


@dataclass
class Encoder:
    """Latents are block means of the pixels. `fails_at`: the call that is interrupted."""

    size: Size = VIDEO
    takes_first_frame: bool = False
    device: torch.device = torch.device("cpu")
    scale: float = 1.0
    fails_at: int | None = None
    calls: list[int] = field(default_factory=list)

    def encode_media(self, media: Tensor) -> Tensor:
        self.calls.append(len(media))
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        frames = media if media.ndim == 4 else media.transpose(1, 2).flatten(0, 1)
        small = torch.nn.functional.avg_pool2d(frames, 4) * self.scale
        return small if media.ndim == 4 else small.unflatten(0, (len(media), -1)).transpose(1, 2)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def animation(path, greys: list[int], milliseconds: list[int], size=(12, 8)) -> None:
    first, *others = [Image.new("RGB", size, (grey, grey, grey)) for grey in greys]
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0, **({"lossless": True} if path.suffix == ".webp" else {}))


def greys_of(clip: Tensor) -> list[int]:
    assert clip.shape[0] == 3 and bool((clip == clip[:, :, :1, :1]).all())
    return (clip[0, :, 0, 0] * 255).round().int().tolist()


def test_aspect_is_kept_and_the_middle_is_cut_out(tmp_path):
    """24 x 48 for 8 x 12: the middle 36 columns, then a third."""
    pixels = noise(24, 48)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    want = Image.fromarray(pixels[:, 6:42]).resize((12, 8), Image.Resampling.LANCZOS)
    got = read_clip(tmp_path / "a.png", IMAGE, 16)
    assert got.shape == (3, 1, 8, 12)
    assert torch.equal((got[:, 0] * 255).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(np.array(want)))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a viewer rotates by 270 degrees
    Image.fromarray(pixels).rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(read_clip(tmp_path / "turned.png", IMAGE, 16), got)
    Image.new("L", (12, 8), 100).save(tmp_path / "grey.png")
    assert greys_of(read_clip(tmp_path / "grey.png", IMAGE, 16)) == [100]
    assert torch.equal(read_media(tmp_path / "turned.png")[:, 0], torch.from_numpy(pixels).permute(2, 0, 1) / 255), "pairs and first frames are read alike"


@pytest.mark.parametrize("suffix", [".webp", ".png", ".gif"])
def test_frames_stand_until_the_next_one(tmp_path, suffix):
    """Shown from 0, 100, 400 and 500 ms on."""
    animation(path := tmp_path / f"a{suffix}", [10, 60, 120, 200], [100, 300, 100, 100])
    read = lambda fps, frames: greys_of(read_clip(path, Size(8, 12, frames), fps))  # noqa: E731
    assert read(10, 6) == [10, 60, 60, 60, 120, 200]
    assert read(8, 5) == [10, 60, 60, 120, 200] and read(20, 4) == [10, 10, 60, 60]
    with pytest.raises(ValueError, match=r"real: .* gives 6 frames at 10 a second and the model takes 7; take it out"):
        read(10, 7)


def test_files_that_cannot_be_read(tmp_path):
    Image.new("RGB", (12, 8)).save(tmp_path / "still.png")
    with pytest.raises(ValueError, match="is an image and the model makes videos of 3 frames"):
        read_clip(tmp_path / "still.png", VIDEO, 16)
    (tmp_path / "torn.png").write_bytes((tmp_path / "still.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="real: .*torn.png cannot be read"):
        read_clip(tmp_path / "torn.png", IMAGE, 16)
    # a header that claims a picture of 100000 x 100000
    data = bytearray((tmp_path / "still.png").read_bytes())
    data[16:24] = (100000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(ValueError, match="real: .*bomb.png is too large"):
        read_clip(tmp_path / "bomb.png", IMAGE, 16)


def test_folders_and_indices(tmp_path):
    (tmp_path / "data" / "b").mkdir(parents=True)
    for name in ("z.png", "b/a.png"):
        Image.new("RGB", (12, 8)).save(tmp_path / "data" / name)
        (tmp_path / "data" / name).with_suffix(".txt").write_text(f"a  picture\n of {name}\n")
    want = [RealFile(tmp_path / "data" / name, f"a picture of {name}") for name in ("b/a.png", "z.png")]
    assert real_files(tmp_path / "data") == want
    rows = [{"file_name": f"data/{name}", "caption": f"a picture of {name}"} for name in ("b/a.png", "z.png")]
    (tmp_path / "index.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert real_files(tmp_path / "index.jsonl") == want
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "index.parquet")
    assert real_files(tmp_path / "index.parquet") == want
    for text, message in (
        ('{"caption": "a"}', r"real: .*bad.jsonl, row 1: file or file_name or path or video or image is None"),
        ('{"file": "no.png", "prompt": "a"}', r"real: .*row 1: .*no.png does not exist"),
        ('{"file": "data/z.png", "prompt": " "}', r"real: .*row 1: its caption is empty"),
        ("{", r"real: .*bad.jsonl"),
        ("", "real: .*bad.jsonl is empty"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            real_files(tmp_path / "bad.jsonl")
    (tmp_path / "data" / "z.txt").unlink()
    with pytest.raises(ValueError, match="real: .*z.png has no caption; write it into z.txt beside it"):
        real_files(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "empty", "holds no image or video"), (tmp_path / "a.csv", "is not allowed; give a folder")):
        with pytest.raises(ValueError, match=f"real: .* {message}"):
            real_files(path)


@pytest.fixture
def videos(tmp_path):
    """20 videos of three frames."""
    for i in range(20):
        animation(tmp_path / f"{i:02d}.webp", [10 * i, 10 * i + 3, 10 * i + 6], [63, 63, 63])
    return [RealFile(tmp_path / f"{i:02d}.webp", f"grey {i}") for i in range(20)]


def test_an_interrupted_cache_goes_on_and_is_mapped(videos, tmp_path):
    whole = real_samples(videos, Encoder(), tmp_path / "whole")
    assert [prompt.text for prompt in whole.prompts] == [f"grey {i}" for i in range(20)] and whole.latents.shape == (20, 3, 3, 2, 3)
    torch.testing.assert_close(whole.latents[:, 0, :, 0, 0], torch.tensor([[10.0 * i, 10 * i + 3, 10 * i + 6] for i in range(20)]) / 255)
    # a kill in the third batch
    with pytest.raises(KeyboardInterrupt):
        real_samples(videos, Encoder(fails_at=4), tmp_path / "cut")
    assert (tmp_path / "cut" / "latents.done").read_bytes() == b"\1\1\0"
    again, third = Encoder(), Encoder()
    resumed = real_samples(videos, again, tmp_path / "cut")
    assert again.calls == [1, 4] and torch.equal(resumed.latents, whole.latents), "the probe, and the last four"
    real_samples(videos, third, tmp_path / "cut")
    assert third.calls == [1]
    # any reader of safetensors opens it; the tensor of a run is the file
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "cut" / "latents.safetensors")["latents"], whole.latents)
    with open("/proc/self/maps") as maps:
        assert any("cut/latents.safetensors" in line for line in maps)
    resumed.latents[0] = 7.0
    assert float(real_samples(videos, Encoder(), tmp_path / "cut").latents[0].max()) < 1, "a run cannot change the cache"


class Of(Ranks):
    """A rank whose peers run before or after it in the same process."""

    def of_first(self, make):
        return make()

    def agree(self, error):
        if error is not None:
            raise error


def test_ranks_encode_their_share(videos, tmp_path):
    whole = real_samples(videos, Encoder(), tmp_path / "whole")
    for rank, (calls, done) in enumerate((([1, 8, 4], b"\1\0\1"), ([1, 8], b"\1\1\1"))):
        encoder = Encoder()
        # the file itself says what is left: another rank, or another number of them, takes its share of that
        shares = Of(rank, 2) if rank == 0 else Of(0, 1)
        found = real_samples(videos, encoder, tmp_path / "shared", ranks=shares)
        assert encoder.calls == calls and (tmp_path / "shared" / "latents.done").read_bytes() == done
    assert torch.equal(found.latents, whole.latents)


def tar(path, entries) -> None:
    """A tar of (name, bytes, or the target of a link)."""
    with tarfile.open(path, "w") as archive:
        for name, data in entries:
            entry = tarfile.TarInfo(name)
            if isinstance(data, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, data
                archive.addfile(entry)
            else:
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


def test_shards_give_what_their_files_give(videos, tmp_path):
    """As WebDataset packs them: the files of a sample follow each other and share their name up to its first dot."""
    (tmp_path / "shards").mkdir()
    for shard, rows in enumerate((range(8), range(8, 20))):
        entries = []
        for i in rows:
            caption = (f"{i:06d}.txt", f" grey  {i}\n".encode()) if i % 2 else (f"{i:06d}.json", json.dumps({"caption": f"grey {i}", "width": 12}).encode())
            entries += [(f"{i:06d}.webp", videos[i].path.read_bytes()), caption, (f"{i:06d}.cls", b"7")]
        tar(tmp_path / "shards" / f"{shard:05d}.tar", entries)
    found = real_files(tmp_path / "shards")
    assert [file.prompt for file in found] == [file.prompt for file in videos] and len(real_files(tmp_path / "shards" / "00001.tar")) == 12
    whole = real_samples(videos, Encoder(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        real_samples(found, Encoder(fails_at=3), tmp_path / "cut")
    again = Encoder()
    assert torch.equal(real_samples(found, again, tmp_path / "cut").latents, whole.latents) and again.calls == [1, 8, 4]
    assert not list((tmp_path / "shards").glob("*.webp")), "nothing is unpacked"
    with pytest.raises(ValueError, match="real: .*cache|real: .*cut holds the latents of others"):
        real_samples(list(reversed(found)), Encoder(), tmp_path / "cut")
    with pytest.raises(ValueError, match=r"real: .*00000.tar: 000000.webp lies in a shard, and an image-to-video model reads its first frame from a file"):
        real_samples(found, Encoder(takes_first_frame=True), tmp_path / "first")


def test_shards_that_are_refused(videos, tmp_path, monkeypatch):
    data = videos[0].path.read_bytes()
    monkeypatch.setattr(shards, "MOST_BYTES", len(data))
    monkeypatch.setattr(shards, "MOST_CAPTION", 100)
    for entries, message in (
        ([("a.webp", "/etc/passwd"), ("a.txt", b"a")], "a.webp is a link or a special file, and none is followed"),
        ([("a.webp", data + b"x")], rf"a.webp has {len(data) + 1:,} bytes, more than {len(data):,}; reduce it"),
        ([("a.webp", data), ("a.txt", b"a" * 101)], "a.txt has 101 bytes, more than 100"),
        ([("a.webp", data), ("a.png", data), ("a.txt", b"a")], "a.webp and a.png are two media of one sample"),
        ([("a.webp", data), ("b.txt", b"a")], "a.webp has no caption; write it into a .txt of the same name"),
        ([("a.webp", data), ("a.txt", b" ")], "a.webp: its caption is empty"),
        ([("a.webp", data), ("a.txt", b"\xff")], "a.webp: its caption is not UTF-8"),
        ([("a.webp", data), ("a.json", b"{")], "a.webp: its .json cannot be read"),
        ([("a.cls", b"7")], "holds no image or video"),
    ):
        tar(tmp_path / "bad.tar", entries)
        with pytest.raises(ValueError, match=f"real: .*bad.tar:? {message}"):
            real_files(tmp_path / "bad.tar")
    tar(tmp_path / "good.tar", [("a.txt", b"a"), ("d/a.webp", data), ("d/a.txt", b"b")])
    assert [file.prompt for file in real_files(tmp_path / "good.tar")] == ["b"], "a folder belongs to the name"
    (tmp_path / "bad.tar").write_bytes((tmp_path / "good.tar").read_bytes()[: 512 * 3 + 40])
    with pytest.raises(ValueError, match="real: .*bad.tar(: d/a.webp is cut off| cannot be read as an uncompressed tar)"):
        real_files(tmp_path / "bad.tar")
    (tmp_path / "bad.tar").write_bytes(gzip.compress((tmp_path / "good.tar").read_bytes()))
    with pytest.raises(ValueError, match="real: .*bad.tar cannot be read as an uncompressed tar"):
        real_files(tmp_path / "bad.tar")
    with pytest.raises(ValueError, match=r"real: .* holds both shards \(bad.tar\) and media"):
        real_files(tmp_path)


def test_a_cache_of_something_else_is_refused(videos, tmp_path):
    real_samples(videos[:2], Encoder(), tmp_path / "cache")
    for files, encoder, fps, what in (
        (videos[:3], Encoder(), 16.0, "files, count"),
        ([videos[0], RealFile(videos[1].path, "another")], Encoder(), 16.0, "files"),
        (videos[:2], Encoder(), 8.0, "fps"),
        (videos[:2], Encoder(scale=2.0), 16.0, "encoder"),
        (videos[:2], Encoder(Size(8, 12, 2)), 16.0, "size, shape"),
    ):
        with pytest.raises(ValueError, match=rf"real: .*cache holds the latents of others \(their {what}.* differ\)"):
            real_samples(files, encoder, tmp_path / "cache", fps)
    with pytest.raises(ValueError, match="real_fps: 0 is not allowed"):
        real_samples(videos, Encoder(), tmp_path / "other", 0)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda cache: (cache / "latents.done").unlink(), "latents.done of .* is damaged or gone"),
        (lambda cache: (cache / "latents.done").write_bytes(b"\1\1"), "latents.done of .* is damaged or gone"),
        (lambda cache: (cache / "latents.done").write_bytes(b"\1\7\1"), "latents.done of .* is damaged or gone"),
        (lambda cache: (cache / "latents.safetensors").unlink(), "latents.safetensors of .* is damaged or gone"),
        (lambda cache: os.truncate(cache / "latents.safetensors", 500), "latents.safetensors of .* is damaged or gone"),
        (lambda cache: (cache / "latents.safetensors").write_bytes(bytes(2 * 2**10)), "latents.safetensors of .* is damaged or gone"),
        (lambda cache: [file.unlink() for file in cache.glob("latents.[ds]*")], "latents.safetensors and latents.done of .* are damaged or gone"),
    ],
)
def test_a_damaged_cache_is_made_anew(videos, tmp_path, capsys, harm, said):
    whole, encoder = real_samples(videos, Encoder(), tmp_path / "cache").latents, Encoder()
    kept = whole.clone()
    harm(tmp_path / "cache")
    assert torch.equal(real_samples(videos, encoder, tmp_path / "cache").latents, kept) and encoder.calls == [1, 8, 8, 4]
    assert re.search(f"real samples: {said}; all are encoded again", capsys.readouterr().out)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["latents.done", "latents.json", "latents.safetensors"]


def test_a_kill_before_the_record_and_the_files_of_others(videos, tmp_path):
    real_samples(videos, Encoder(), tmp_path / "cache")
    (tmp_path / "cache" / "latents.json").unlink()
    encoder = Encoder()
    real_samples(videos, encoder, tmp_path / "cache")
    assert encoder.calls == [1, 8, 8, 4], "what was begun without a record is begun again"
    for text in ("{", "[1]", '{"encoder": "x"}', '{"encoder": ["x"]}', '{"files": 3}'):
        (tmp_path / "cache" / "latents.json").write_text(text)
        with pytest.raises(ValueError, match="real: .*latents.json (is not the record|is damaged|holds a list).*; choose another folder, or remove"):
            real_samples(videos, Encoder(), tmp_path / "cache")
        assert (tmp_path / "cache" / "latents.json").read_text() == text
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "latents.safetensors").write_bytes(b"of the user")
    with pytest.raises(ValueError, match="real: .*mine/latents.safetensors is no cache of real samples .*; choose another folder"):
        real_samples(videos, Encoder(), tmp_path / "mine")
    assert (tmp_path / "mine" / "latents.safetensors").read_bytes() == b"of the user"
    (tmp_path / "flat").write_text("")
    with pytest.raises(ValueError, match="real_cache: .*flat cannot be a folder"):
        real_samples(videos, Encoder(), tmp_path / "flat")


def test_first_frames_are_the_files_own(videos, tmp_path):
    found = real_samples([videos[0], RealFile(videos[1].path, "b [image: x.png]")], Encoder(takes_first_frame=True), tmp_path / "cache")
    assert [str(prompt.image) for prompt in found.prompts] == [str(videos[0].path), "x.png"]


def test_a_run_on_a_folder_of_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for i in range(3):
        Image.fromarray(noise(20, 16, i)).save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text(str(i))
    line = shlex.split("train dm-align-pair --model digits --steps 2 --batch 2 --distil 0 --iterations 1 --no-evaluate --out run --threads 1 --real data")
    assert main(line) == 0
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["real"] and (tmp_path / "run" / "real" / "latents.safetensors").is_file()
    assert main(line) == 0, "the same command finds its cache"
    assert main(["train", "dm-align-group", "--model", "digits", "--real", "data"]) == 2
    assert "real: dm-align-group uses no real samples" in capsys.readouterr().err


class Largest(TorchDispatchMode):
    """The most elements that any operation made room for."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(made) if isinstance(x, Tensor))])
        return made


def test_a_large_image_is_reduced_before_it_is_repeated(tmp_path, monkeypatch):
    Image.fromarray(noise(240, 240)).save(tmp_path / "a.png")
    size = Size(24, 24, 30)
    plain = fitted(read_media(tmp_path / "a.png", 30), size, "a")
    for shape in (size, None):
        with Largest() as seen:
            got = read_media(tmp_path / "a.png", 30, shape)
        assert got.shape[1] == 30 and seen.most == 3 * 240 * 240, "one frame of the source"
        torch.testing.assert_close(fitted(got, size, "a"), plain)
    # two frames of which one stands for many: what is kept at the source's size is bounded with its repetitions
    animation(tmp_path / "b.png", [10, 60], [300, 100], size=(12, 8))
    assert greys_of(read_media(tmp_path / "b.png", 4)) == [10, 10, 10, 60]
    monkeypatch.setattr(media, "MOST_PIXELS", 3 * 96)
    with pytest.raises(ValueError, match="media: .*b.png holds 384 pixels in all its frames, more than 288; reduce or shorten it"):
        read_media(tmp_path / "b.png", 4)
    assert read_media(tmp_path / "b.png", 4, Size(4, 6, 4)).shape == (3, 4, 4, 6)


# what each recipe with real or preferred samples is asked for, and the scalar of the log that they decide
SERVED = {
    "dollar": ("--iterations 1 --fit 0 --weight 0", "objective/consistency"),
    "dmd2": ("--iterations 2 --gan 0.01", "force/gan/norm"),
    "dm-align-pair": ("--iterations 1 --distil 0", "force/pair/norm"),
    "sft-after": ("--iterations 1 --distil 0", "objective/sft"),
    "pso-offline": ("--iterations 1 --distil 0", "grad/student"),
}


def packed(path, model: str, grey: int) -> None:
    """A shard of three pictures, or two videos, around a grey."""
    entries = []
    if model == "digits":
        for i in range(3):
            buffer = io.BytesIO()
            Image.fromarray(np.clip(noise(20, 16, i) // 4 + grey, 0, 255).astype(np.uint8)).save(buffer, "PNG")
            entries += [(f"{i}.png", buffer.getvalue()), (f"{i}.json", json.dumps({"caption": str(i)}).encode())]
    else:
        for i, prompt in enumerate(("a seven moving left", "a two moving up")):
            animation(path.parent / "a.webp", [grey + 5 * f + i for f in range(9)], [63] * 9, size=(64, 64))
            entries += [(f"{i}.webp", (path.parent / "a.webp").read_bytes()), (f"{i}.txt", prompt.encode())]
    tar(path, entries)


@pytest.mark.parametrize(
    ("recipe", "model"),
    [
        pytest.param(recipe, model, marks=[] if (recipe, model) == ("dmd2", "digits") else [pytest.mark.slow])
        for recipe in SERVED
        for model in ("digits", "moving-digits")
    ],
)
def test_shards_serve_every_recipe_with_real_samples(tmp_path, monkeypatch, recipe, model):
    """From a tar to the loss of a run: consistency distillation, a discriminator, Pair, fine-tuning and PSO; other media give another one."""
    monkeypatch.chdir(tmp_path)
    options, key = SERVED[recipe]
    found = []
    for name, grey in (("dark", 0), ("bright", 150)):
        packed(tmp_path / f"{name}.tar", model, grey)
        line = f"train {recipe} {options} --model {model} --steps 2 --batch 2 --critic-updates 1 --no-evaluate --threads 1 --out {name} --real {name}.tar"
        assert main(shlex.split(line)) == 0
        assert json.loads((tmp_path / name / "real" / "latents.json").read_text())["count"] == (3 if model == "digits" else 2)
        row = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])
        found.append(next(value for name, value in row.items() if name.startswith(key)))
    assert all(map(math.isfinite, found)) and found[0] != found[1]
