"""Video files, made here with real codecs: which way up, when each frame is shown, its colour, what is refused, and how much is decoded."""

from __future__ import annotations

import functools
import io
import struct
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_real_files import tar
from tiny import tiny_wan_pipeline

import instep.data.clips as clips
import instep.data.media as media
from instep.core.size import Size
from instep.data.animation import save_animation
from instep.data.clips import read_clip
from instep.data.latent_cache import real_samples
from instep.data.media import pair_samples, read_media
from instep.data.pairs import PreferencePair
from instep.data.real_files import real_files
from instep.data.video_file import save_video
from instep.models.wan import WanFamily

BEGIN = [0, 3, 10, 11, 20, 26]  # thirtieths of a second at which the frames of a video of variable rate begin
GREYS = [10, 50, 90, 130, 170, 210]


def stills(greys, height=32, width=48) -> torch.Tensor:
    return torch.tensor(greys, dtype=torch.uint8)[:, None, None, None].expand(-1, height, width, 3)


def encoded(frames, form="mp4", codec="libx264", begin=None, g="12", **tags) -> bytes:
    """Frames (arrays [H, W, 3], or PyAV's own) at 30 a second, or shown from `begin` thirtieths on; none is made from a later one, so that each is decoded when
    it is shown. Every `g`th stands alone."""
    frames = [frame if isinstance(frame, av.VideoFrame) else av.VideoFrame.from_ndarray(np.array(frame), format="rgb24") for frame in frames]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=30, options={"bf": "0", "crf": "4", "g": g})
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = frames[0].height, frames[0].width, "yuv420p", 2_000_000
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for i, frame in enumerate(frames):
            frame.pts, frame.time_base = i if begin is None else begin[i], Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def seen(found: torch.Tensor, greys=GREYS) -> list[int]:
    """The grey of each frame of [3, F, H, W]; a codec is off by a few."""
    levels = (found * 255).mean((0, 2, 3))
    near = [min(greys, key=lambda grey: abs(grey - float(level))) for level in levels]
    assert max(abs(grey - float(level)) for grey, level in zip(near, levels, strict=True)) < 4
    return near


class Watched:
    """A container that counts the frames it decodes; `timeless`: they have no timestamps."""

    def __init__(self, container, timeless=False):
        self.container, self.timeless, self.decoded, self.closed = container, timeless, 0, False

    def __getattr__(self, name):
        return getattr(self.container, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True
        self.container.close()

    def decode(self, stream):
        for frame in self.container.decode(stream):
            self.decoded += 1
            if self.timeless:
                frame.pts, frame.duration = None, 0
            yield frame


@pytest.fixture
def watch(monkeypatch):
    opened, plain = [], av.open

    def start(**how):
        monkeypatch.setattr(av, "open", lambda *args, **named: opened.append(Watched(plain(*args, **named), **how)) or opened[-1])
        return opened

    return start


MATRICES = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", MATRICES)
def test_a_video_is_turned_as_its_header_says(tmp_path, degrees, mirrored):
    """By so many degrees clockwise, after it is mirrored: four quarters of another grey say which way up a frame is."""
    picture = torch.tensor([[40, 90], [140, 200]], dtype=torch.uint8).repeat_interleave(16, 0).repeat_interleave(24, 1)
    save_video(tmp_path / "a.mp4", picture[None, :, :, None].expand(2, -1, -1, 3), 8)
    stored = read_media(tmp_path / "a.mp4")
    assert stored.shape == (3, 2, 32, 48) and abs(float(stored[0, 0, 4, 4]) * 255 - 40) < 3
    a, b, c, d = MATRICES[degrees]
    a, b = (-a, -b) if mirrored else (a, b)
    data = (tmp_path / "a.mp4").read_bytes()
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 32 << 16, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(data[:at] + matrix + data[at + 36 :])
    want = torch.rot90(stored.flip(3) if mirrored else stored, -degrees // 90, (2, 3))
    assert torch.equal(read_media(tmp_path / "a.mp4"), want)
    assert torch.equal(read_clip(tmp_path / "a.mp4", Size(*want.shape[2:], 2), 8), want)
    if not mirrored:  # what PyAV itself makes of the header
        with av.open(str(tmp_path / "a.mp4")) as container:
            assert (next(container.decode(video=0)).rotation + degrees) % 360 == 0


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.mkv", "libx264"), ("a.avi", "mpeg4")])
def test_frames_of_a_variable_rate_stand_until_the_next_one(tmp_path, name, codec):
    """A .webm and an .mkv hold whole milliseconds, an .avi thirtieths."""
    form = {"mkv": "matroska"}.get(name[2:], name[2:])
    (tmp_path / name).write_bytes(encoded(stills(GREYS), form, codec, BEGIN))
    for rate in (5, 8, 10, 15, 24, 30, 60):
        count = 27 * rate // 30
        middles = [Fraction(2 * k + 1, 2 * rate) for k in range(count)]
        want = [GREYS[sum(Fraction(begin, 30) <= middle for begin in BEGIN) - 1] for middle in middles]
        assert seen(read_clip(tmp_path / name, Size(32, 48, count), rate)) == want, rate
    with pytest.raises(ValueError, match=r"real: .* gives 27 frames at 30 a second and the model takes 28"):
        read_clip(tmp_path / name, Size(32, 48, 28), 30)


def test_half_the_rate_is_every_second_frame(tmp_path):
    """The middles are then the beginnings of frames, which whole milliseconds put on either side of them."""
    greys = list(range(0, 240, 10))
    (tmp_path / "a.webm").write_bytes(encoded(stills(greys), "webm", "libvpx-vp9"))
    assert seen(read_clip(tmp_path / "a.webm", Size(32, 48, 11), 15), greys) == greys[1:22:2]
    # the same times, in whole milliseconds, of an animation
    first, *others = [Image.new("RGB", (48, 32), (grey, grey, grey)) for grey in greys]
    times = [round(1000 * i / 30) for i in range(len(greys) + 1)]
    first.save(tmp_path / "a.webp", save_all=True, append_images=others, duration=np.diff(times).tolist(), lossless=True)
    assert seen(read_clip(tmp_path / "a.webp", Size(32, 48, 11), 15), greys) == greys[1:22:2]


def test_without_timestamps_the_average_rate_counts(tmp_path, watch):
    (tmp_path / "a.avi").write_bytes(encoded(stills(GREYS), "avi", "mpeg4"))
    want = seen(read_clip(tmp_path / "a.avi", Size(32, 48, 4), 20))
    watch(timeless=True)
    assert seen(read_clip(tmp_path / "a.avi", Size(32, 48, 4), 20)) == want == [10, 90, 130, 210]
    with pytest.raises(ValueError, match="gives 6 frames at 30 a second and the model takes 7"):
        read_clip(tmp_path / "a.avi", Size(32, 48, 7), 30)


def test_no_more_is_decoded_than_is_needed(tmp_path, monkeypatch, watch):
    greys = list(range(0, 250, 10))
    (tmp_path / "a.mp4").write_bytes(encoded(stills(greys)))
    opened = watch()
    assert seen(read_clip(tmp_path / "a.mp4", Size(32, 48, 3), 10), greys) == [10, 40, 70]
    assert opened[-1].decoded == 9 and opened[-1].closed, "the one after the last says how long that stands"
    assert seen(read_media(tmp_path / "a.mp4", 3, Size(32, 48, 3)), greys) == [0, 10, 20]
    assert opened[-1].decoded == 3 and opened[-1].closed
    assert seen(read_media(tmp_path / "a.mp4"), greys) == greys and opened[-1].closed
    # only those that are shown are resized
    fitted, plain = [], clips._fitted
    monkeypatch.setattr(clips, "_fitted", lambda *args: fitted.append(args) or plain(*args))
    read_clip(tmp_path / "a.mp4", Size(32, 48, 3), 10)
    assert len(fitted) == 3
    # all frames together are bounded, and nothing more is decoded
    monkeypatch.setattr(media, "MOST_PIXELS", 5 * 32 * 48)
    with pytest.raises(ValueError, match=r"media: .*a.mp4 holds 9,216 pixels in all its frames, more than 7,680; reduce or shorten it"):
        read_media(tmp_path / "a.mp4")
    assert opened[-1].decoded == 6 and opened[-1].closed


@pytest.mark.parametrize(
    ("form", "codec", "tags"),
    [
        ("mp4", "libx264", {}),
        ("mp4", "libx264", {"colorspace": 1, "color_range": 1}),
        ("mp4", "libx264", {"colorspace": 5, "color_range": 1}),
        ("mp4", "libx264", {"colorspace": 1, "color_range": 2}),
        ("webm", "libvpx-vp9", {"colorspace": 1, "color_range": 2}),  # the codec above has pixel formats of its own for the full range
    ],
)
def test_colours_are_those_of_the_matrix_and_range_that_the_stream_states(tmp_path, form, codec, tags):
    """One colour, through the standards' own formulas."""
    luma, blue, red = 120, 110, 160
    plane = np.full((48, 48), luma, np.uint8)
    plane[32:40], plane[40:] = blue, red
    frame = av.VideoFrame.from_ndarray(plane, format="yuv420p")
    for name, value in tags.items():
        setattr(frame, name, value)
    (tmp_path / f"a.{form}").write_bytes(encoded([frame], form, codec, **tags))
    kr, kb = (0.2126, 0.0722) if tags.get("colorspace") == 1 else (0.299, 0.114)
    full = tags.get("color_range") == 2
    y, u, v = ((luma - 16) / 219, (blue - 128) / 224, (red - 128) / 224) if not full else (luma / 255, (blue - 128) / 255, (red - 128) / 255)
    r, b = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    want = torch.tensor([r, (y - kr * r - kb * b) / (1 - kr - kb), b])
    found = read_media(tmp_path / f"a.{form}")[:, 0].mean((1, 2))
    assert float((found - want).abs().max()) * 255 < 3


def test_files_that_cannot_be_read(tmp_path, watch):
    pixels = torch.randint(0, 256, (12, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise = functools.partial(encoded, pixels)
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    (tmp_path / "other.mp4").write_bytes(noise())
    playlist = b"ffconcat version 1.0\nfile other.mp4\n"
    opened = watch()
    for name, data, message in (
        ("torn.mp4", noise()[:5000], r"cannot be read as a video \(Invalid data .*\); make it again, or take it out"),
        ("torn.avi", noise("avi", "mpeg4")[:-3000], r"is cut off or damaged 0\.\d\d s after its beginning; make it again, or take it out"),
        ("torn.webm", noise("webm", "libvpx")[:-3000], r"gives \d+ frames at 30 a second and the model takes 12"),
        ("text.mp4", b"a video of a cat", "cannot be read as a video"),
        ("empty.mov", b"", "cannot be read as a video"),
        ("playlist.mp4", playlist, "cannot be read as a video"),
        ("stream.mp4", noise("mpegts", "mpeg4"), "cannot be read as a video"),
        ("unknown.webm", noise("webm", "libvpx").replace(b"V_VP8", b"V_XYZ"), "is in a format that PyAV has no codec for; convert it"),
        ("sound.mp4", sound.getvalue(), "has no video stream; take it out"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"^real: .*{name} {message}") as raised:
            read_clip(tmp_path / name, Size(32, 48, 12), 30)
        assert "\n" not in str(raised.value)
        if name != "torn.webm":
            with pytest.raises(ValueError, match=f"^media: .*{name} {message}"):
                read_media(tmp_path / name)
    assert all(container.closed for container in opened)
    with pytest.raises(ValueError, match=r"^real: .*gone.mp4 cannot be read as a video \(No such file or directory\)"):
        read_clip(tmp_path / "gone.mp4", Size(32, 48, 12), 30)


def test_a_huge_frame_is_refused(tmp_path, monkeypatch, watch):
    opened = watch()
    data = encoded(stills(GREYS, 256, 320), "webm", "libvpx")
    claims = data.replace(b"\xb0\x82\x01\x40\xba\x82\x01\x00", b"\xb0\x82\x3e\x80\xba\x82\x3e\x80")
    (tmp_path / "header.webm").write_bytes(claims)
    # a header of 16 x 16 before frames of 32 x 48
    data = encoded(stills(GREYS), "webm", "libvpx")
    (tmp_path / "frames.webm").write_bytes(data.replace(b"\xb0\x81\x30\xba\x81\x20", b"\xb0\x81\x10\xba\x81\x10"))
    for place, where, read in (
        (clips, "real", lambda path: read_clip(path, Size(32, 48, 3), 30)),
        (media, "media", lambda path: read_media(path, 3, Size(32, 48, 3))),
    ):
        with pytest.raises(ValueError, match=rf"^{where}: .*header.webm is 16000 x 16000, more than {place.MOST_PIXELS:,} pixels; reduce it"):
            read(tmp_path / "header.webm")
        assert opened[-1].decoded == 0, "none is decoded"
        assert read(tmp_path / "frames.webm").shape == (3, 3, 32, 48)
        monkeypatch.setattr(place, "MOST_PIXELS", 1000)
        with pytest.raises(ValueError, match=rf"^{where}: .*frames.webm is 32 x 48, more than 1,000 pixels; reduce it"):
            read(tmp_path / "frames.webm")
        assert opened[-1].decoded == 1


def test_a_video_that_changes_its_size(tmp_path):
    """Its last frame is four columns wider: that is resized as the others are, and refused where frames keep their own size."""
    data = encoded(stills(GREYS), "webm", "libvpx", g="1")
    at = data.rindex(b"\x9d\x01\x2a\x30\x00") + 3
    (tmp_path / "a.webm").write_bytes(data[:at] + b"\x34" + data[at + 1 :])
    assert read_clip(tmp_path / "a.webm", Size(32, 48, 6), 30).shape == (3, 6, 32, 48)
    assert read_media(tmp_path / "a.webm", 5, Size(32, 48, 5)).shape == (3, 5, 32, 48)
    with pytest.raises(ValueError, match=r"media: .*a.webm changes its size after 5 frames; cut or convert it"):
        read_media(tmp_path / "a.webm")


def test_without_a_codec_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    fix = r"needs a codec; install it \(pip install 'instep\[video\]'\)"
    for where, read in (("real", lambda: read_clip(tmp_path / "a.mp4", Size(32, 48, 3), 8)), ("media", lambda: read_media(tmp_path / "a.mp4"))):
        with pytest.raises(ValueError, match=rf"^{where}: .*a.mp4 {fix}, or save it as an animated .webp, which needs none$"):
            read()
    with pytest.raises(ValueError, match=rf"^out: an .mp4 file {fix}$"):
        save_video(tmp_path / "a.mp4", stills(GREYS), 8)


def moving(folder, seed: int) -> None:
    """Nine frames of 32 x 32, as .mp4 and as an animation without loss."""
    coarse = torch.rand(1, 3, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    frames = torch.nn.functional.interpolate(coarse, (9, 32, 32), mode="trilinear", align_corners=True)[0].mul(255).to(torch.uint8).permute(1, 2, 3, 0)
    for kind, save in (("mp4", save_video), ("webp", save_animation)):
        (folder / kind).mkdir(exist_ok=True)
        save(folder / kind / f"{seed}.{kind}", frames, 16)
        (folder / kind / f"{seed}.txt").write_text(f"clip {seed}")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Rows that differ by what a codec loses, which is far less than they differ from each other."""
    off, apart = (one - other).square().mean().sqrt(), (one - other.roll(1, 0)).square().mean().sqrt()
    return one.shape == other.shape and bool(0 < off < 0.25 * apart)


def test_real_videos_are_the_same_frames_without_loss(tmp_path):
    """What `--real` makes of a folder of .mp4 files, a shard of them and a folder of animations."""
    for seed in range(3):
        moving(tmp_path, seed)
    tar(tmp_path / "shard.tar", [(path.name, path.read_bytes()) for path in sorted((tmp_path / "mp4").iterdir())])
    family = WanFamily(tiny_wan_pipeline(), Size(32, 32, 9))
    made = {name: real_samples(real_files(tmp_path / name), family, tmp_path / "cache" / name, 16) for name in ("mp4", "shard.tar", "webp")}
    assert [str(prompt) for prompt in made["mp4"].prompts] == ["clip 0", "clip 1", "clip 2"]
    assert torch.equal(made["mp4"].latents, made["shard.tar"].latents) and same(made["mp4"].latents, made["webp"].latents)


def test_pairs_of_videos_are_those_of_the_same_frames_without_loss(tmp_path):
    for seed in range(4):
        moving(tmp_path, seed)
    family = WanFamily(tiny_wan_pipeline(), Size(32, 32, 9))
    pairs = {
        kind: pair_samples([PreferencePair(f"{i}", tmp_path / kind / f"{i}.{kind}", tmp_path / kind / f"{i + 1}.{kind}") for i in (0, 2)], family)
        for kind in ("mp4", "webp")
    }
    assert same(pairs["mp4"].chosen, pairs["webp"].chosen) and same(pairs["mp4"].rejected, pairs["webp"].rejected)
