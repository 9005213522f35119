"""Rewards without a gradient: known answers, real programs and a real server that fail in every way, the command line, a run."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from serving import served

from instep.bundled import digits
from instep.bundled.worlds import class_digits
from instep.cli.main import main
from instep.cli.rewards import load_reward
from instep.recipes.after import rl_after
from instep.recipes.common import Common
from instep.recipes.refl import refl
from instep.rewards.base import FunctionReward, RewardError, checked_scores
from instep.rewards.external import CommandReward, command
from instep.rewards.frames import SampledFrames
from instep.rewards.jpeg import JPEG
from instep.rewards.motion import DynamicDegree
from instep.rewards.remote import HttpReward
from instep.rewards.samples import evenly_spaced
from instep.rewards.several import several
from instep.training.options import RunOptions
from instep.training.run import train

DOCS = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
COMMAND_IN_DOCS, SERVER_IN_DOCS = (code.split("```")[0] for code in DOCS.split("```python\n")[1:3])


def levels(n: int = 4, shape: tuple[int, ...] = (3, 8, 8)) -> torch.Tensor:
    """Constant media [n, ...] of grey 0, 1/n, 2/n ... in whole 8-bit steps; sample i has 8-bit level 20 i."""
    return (torch.arange(n) * 20 / 255).reshape(-1, *[1] * len(shape)).expand(n, *shape).contiguous()


def names(n: int) -> list[str]:
    return [f"prompt {i}" for i in range(n)]


# JPEG


def pillow_kilobytes(image: torch.Tensor) -> float:
    """DDPO's own lines: [3, H, W] in [0, 1]."""
    buffer = io.BytesIO()
    Image.fromarray((image * 255).round().clamp(0, 255).to(torch.uint8).numpy().transpose(1, 2, 0)).save(buffer, format="JPEG", quality=95)
    return len(buffer.getvalue()) / 1000


def test_jpeg_is_pillows_size_and_grows_with_noise():
    noise = torch.rand(3, 32, 32)
    media = torch.stack([0.5 + strength * (noise - 0.5) for strength in (0.0, 0.1, 0.3, 1.0)])
    size = JPEG("large").score(media, names(4))
    torch.testing.assert_close(size, torch.tensor([pillow_kilobytes(image) for image in media]))
    assert (size[1:] > size[:-1] + 0.1).all() and 0.5 < size[0] < 1
    torch.testing.assert_close(JPEG().score(media, names(4)), -size)


def test_jpeg_of_a_video_is_the_mean_over_all_or_some_frames():
    video = torch.rand(1, 3, 5, 16, 16) * torch.linspace(0, 1, 5).reshape(1, 1, 5, 1, 1)
    each = torch.tensor([pillow_kilobytes(frame) for frame in video[0].unbind(1)])
    torch.testing.assert_close(JPEG("large").score(video, ["a"]), each.mean()[None])
    torch.testing.assert_close(JPEG("large", frames=3).score(video, ["a"]), each[[0, 2, 4]].mean()[None])
    with pytest.raises(ValueError, match="has no frames to take 3 of"):
        JPEG(frames=3).score(video[:, :, 0], ["a"])
    with pytest.raises(ValueError, match="frames: 9 is not allowed for a video of 5; use 1 to 5"):
        JPEG(frames=9).score(video, ["a"])
    with pytest.raises(ValueError, match=r"media: shape \(1, 16, 16\) is not allowed"):
        JPEG().score(video[:, 0, 0], ["a"])
    video[0, 1, 2, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="media: sample 0 of the batch has values that are not finite"):
        JPEG().score(video, ["a"])
    with pytest.raises(ValueError, match="prefer: 'big'"):
        JPEG("big")  # type: ignore[arg-type]


# motion


def shifting(vx: float, vy: float, seed: int = 0, frames: int = 9, n: int = 48) -> torch.Tensor:
    """A smooth periodic texture that moves (vx, vy) pixels a frame, exactly (phases in the frequency domain): [3, frames, n, n]."""
    k = torch.fft.fftfreq(n) * n
    spectrum = torch.fft.fft2(torch.randn(n, n, generator=torch.Generator().manual_seed(seed))) * torch.exp(-(k[:, None] ** 2 + k[None] ** 2) / 36)
    phase = -2j * math.pi * (k[:, None] * vy + k[None] * vx) / n
    video = torch.stack([torch.fft.ifft2(spectrum * torch.exp(phase * i)).real for i in range(frames)])
    low, high = video[0].min(), video[0].max()
    return ((video - low) / (high - low)).clamp(0, 1).expand(3, -1, -1, -1)


def test_motion_is_the_speed_of_a_translation():
    """In pixels right within a fifth from half a pixel a frame to five, monotone from 0, in every direction."""
    speeds = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0)
    media = torch.stack([shifting(v * math.cos(angle), v * math.sin(angle), seed) for seed, angle in enumerate((0.0, 1.0, 2.5, 4.0)) for v in speeds])
    found = DynamicDegree().score(media, names(len(media))).reshape(4, -1) * math.hypot(48, 48)
    assert (found[:, 0] == 0).all() and (found[:, 1:] > found[:, :-1] + 0.1).all()
    torch.testing.assert_close(found[:, 2:], torch.tensor(speeds[2:]).expand(4, -1), rtol=0.2, atol=0)


def test_motion_is_a_fraction_of_the_diagonal():
    small, large = shifting(1, 1), shifting(4, 4, n=192)
    torch.testing.assert_close(DynamicDegree().score(small[None], ["a"]), DynamicDegree().score(large[None], ["a"]), rtol=0.2, atol=0)
    wide = large[:, :, :96]
    assert float(DynamicDegree().score(wide[None], ["a"])) * math.hypot(96, 192) == pytest.approx(math.hypot(4, 4), rel=0.2)


def test_motion_of_real_moving_digits():
    """They travel 8 or 16 pixels over 8 steps."""
    prompts = ["a seven standing still", "a two moving left slowly", "a seven moving up fast"] * 4
    media = digits.render("train", [digits.parse(prompt) for prompt in prompts], 0)
    found = DynamicDegree().score(media, prompts).reshape(4, 3) * math.hypot(48, 48)
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 2.0]).expand(4, -1), rtol=0.05, atol=1e-6)


def test_noise_and_flicker_count_as_motion_as_the_docs_say():
    """What the reward is hacked with, in pixels of 48."""
    pixels = lambda video: float(DynamicDegree().score(video, ["a"])) * math.hypot(48, 48)  # noqa: E731
    assert pixels(torch.rand(1, 3, 9, 48, 48)) == pytest.approx(4, abs=0.5)
    flicker = lambda low: pixels(shifting(0, 0)[None] * torch.tensor([1.0, low] * 4 + [1.0]).reshape(1, 1, 9, 1, 1))  # noqa: E731
    assert flicker(0.9) == pytest.approx(0.4, abs=0.1) and flicker(0.8) == pytest.approx(5, abs=0.5)


def test_motion_needs_frames_and_is_quick():
    for shape in ((2, 3, 48, 48), (2, 3, 1, 48, 48), (2, 1, 9, 48, 48), (2, 3, 9, 6, 48)):
        with pytest.raises(ValueError, match=r"has no motion to be seen; give videos \[B, 3, F, H, W\]"):
            DynamicDegree().score(torch.rand(shape), names(2))
    video, times = torch.rand(1, 3, 9, 48, 48), []
    for _ in range(20):
        start = time.thread_time()
        DynamicDegree().score(video, ["a"])
        times.append(time.thread_time() - start)
    assert min(times) < 0.03, "7 ms on one idle core"


# some frames


def test_evenly_spaced_frames():
    assert evenly_spaced(9, 3) == [0, 4, 8] and evenly_spaced(9, 1) == [4] and evenly_spaced(9, 9) == list(range(9)) and evenly_spaced(10, 4) == [0, 3, 6, 9]
    assert all(evenly_spaced(f, k) == sorted(set(evenly_spaced(f, k))) for f in range(1, 30) for k in range(1, f + 1))


def test_sampled_frames_keep_the_gradient_and_see_what_they_say():
    seen = []

    def bright(media, prompts):
        seen.append((tuple(media.shape), list(prompts)))
        return media.flatten(1).mean(1)

    video = torch.rand(2, 3, 9, 4, 4).requires_grad_()
    inner = FunctionReward(bright, name="bright", differentiable=True)
    images, clip = SampledFrames(inner, 3), SampledFrames(inner, 3, "video")
    expected = video[:, :, [0, 4, 8]].mean((1, 2, 3, 4))
    for reward in (images, clip):
        scores = reward.score(video, ["a", "b"])
        torch.testing.assert_close(scores, expected)
        (gradient,) = torch.autograd.grad(scores.sum(), video)
        assert (gradient[:, :, [0, 4, 8]] > 0).all() and (gradient[:, :, [1, 2, 3, 5, 6, 7]] == 0).all() and reward.differentiable
    assert seen == [((6, 3, 4, 4), ["a"] * 3 + ["b"] * 3), ((2, 3, 3, 4, 4), ["a", "b"])]
    assert images.name == "bright, 3 frames" and clip.name == "bright, 3 frames as a video" and not SampledFrames(JPEG(), 2).differentiable
    per_sample = SampledFrames(FunctionReward(lambda media, prompts: [float(p == "b") for p in prompts]), 4)
    assert per_sample.score(video, ["a", "b"]).tolist() == [0, 1], "frames of one sample stay with its prompt"
    with pytest.raises(ValueError, match="has no frames; videos are"):
        images.score(video[:, :, 0], ["a", "b"])
    with pytest.raises(ValueError, match="several rewards together are not allowed here"):
        SampledFrames(several((inner, 1.0)), 3)
    with pytest.raises(ValueError, match="looks at latents"):
        SampledFrames(FunctionReward(bright, space="latent"), 3)
    with pytest.raises(ValueError, match="k: 0"):
        SampledFrames(inner, 0)


# commands


def script(tmp_path: Path, code: str, **options: float) -> CommandReward:
    """A program that has read its samples; level(sample) is what levels() made."""
    file = tmp_path / "score.py"
    file.write_text(
        "import json, os, sys, time\nfrom PIL import Image\nsamples = [json.loads(line) for line in sys.stdin]\n"
        "level = lambda sample: Image.open(sample['files'][0]).getpixel((0, 0))[0]\n" + code
    )
    return command(f"{shlex.quote(sys.executable)} {shlex.quote(str(file))}", **options)  # type: ignore[arg-type]


def test_a_command_gets_every_pixel_and_its_prompt(tmp_path):
    code = "for s in samples: print(level(s) + 1000 * int(s['prompt'].split()[1]) + 1e6 * len(s['files']))"
    assert script(tmp_path, code).score(levels(), names(4)).tolist() == [1e6 + 1020 * i for i in range(4)]
    assert script(tmp_path, "print(json.dumps([s['index'] / 2 for s in samples]))").score(levels(), names(4)).tolist() == [0, 0.5, 1, 1.5]
    video = torch.stack([levels(), levels().flip(0)]).movedim(2, 1)
    code = "for s in samples: print(sum(20**i * Image.open(f).getpixel((0, 0))[0] / 20 for i, f in enumerate(s['files'])))"
    assert script(tmp_path, code).score(video, ["a", "b"]).tolist() == [20 + 800 + 24000, 3 + 40 + 400], "frames in order, equal ones too"
    still = levels(1, (3, 3, 8, 8))
    assert script(tmp_path, "print(len(samples[0]['files']))").score(still, ["a"]).tolist() == [3]


def test_files_of_a_command_are_gone_when_it_ends(tmp_path):
    script(tmp_path, f"open({str(tmp_path / 'seen')!r}, 'w').write(samples[0]['files'][0]); print(1)").score(levels(1), ["a"])
    seen = Path((tmp_path / "seen").read_text())
    assert seen.name == "0000.png" and not seen.parent.parent.exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "print('good' if samples[0]['index'] else 'bad'); [print(1) for s in samples[1:]]",
            r"the command printed 'bad' for sample 0 .*'prompt 0'.*finite number",
        ),
        ("for s in samples: print('nan' if s['index'] == 2 else 1)", r"the command printed 'nan' for sample 2 of the batch \(prompt 'prompt 2'\)"),
        ("print([1, 2, None, 4])", r"begins like a JSON list and is none"),
        ("print('[1, 2, null, 4]')", r"the command printed 'None' for sample 2"),
        ("print('[1, true, 3, 4]')", r"the command printed 'True' for sample 1"),
        ("pass", r"sample 0 of the batch \(prompt 'prompt 0'\), scored alone: the command printed 0 scores for 1 samples"),
        (
            "for s in samples:\n  if level(s) != 60: print(1)",
            r"failed on sample 3 of the batch \(prompt 'prompt 3'\), scored alone: the command printed 0 scores",
        ),
        ("print('loading'); [print(1) for s in samples]", r"scored alone: the command printed 2 scores for 1 samples"),
        (
            "print('ah\\noh', file=sys.stderr); sys.exit(3)",
            r"sample 0 .* scored alone: the command ended with exit status 3 and wrote to standard error: ah / oh",
        ),
        (
            "for s in samples:\n  assert level(s) != 40, 'no forties'\n  print(1)",
            r"failed on sample 2 of the batch \(prompt 'prompt 2'\), scored alone: .*exit status 1.*AssertionError: no forties",
        ),
        ("os.kill(os.getpid(), 11)", r"the command ended with signal SIGSEGV and wrote nothing to standard error"),
    ],
)
def test_commands_that_fail_name_the_sample(tmp_path, code, message):
    with pytest.raises(RewardError, match=message) as error:
        checked_scores(script(tmp_path, code, retries=0), levels(), names(4))
    assert "\n" not in str(error.value) and "score.py" in str(error.value)


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path):
    pid = tmp_path / "pid"
    code = f"import subprocess; c = subprocess.Popen(['sleep', '60']); open({str(pid)!r}, 'w').write(str(c.pid)); "
    code += "print('busy', file=sys.stderr, flush=True); c.wait()"
    start = time.monotonic()
    with pytest.raises(
        RewardError, match=r"did not end within 1 seconds and wrote to standard error: busy, on samples 0 to 3 .*first prompt 'prompt 0'.*timeout"
    ):
        script(tmp_path, code, timeout=1, retries=0).score(levels(), names(4))
    assert time.monotonic() - start < 10
    child = int(pid.read_text())
    for _ in range(100):
        if not (state := Path(f"/proc/{child}/stat")).exists() or ") Z " in state.read_text():
            break
        time.sleep(0.02)
    else:
        pytest.fail("the child still runs")


def test_a_command_is_tried_again(tmp_path):
    code = f"n = open({str(tmp_path / 'n')!r}, 'a'); n.write('x'); n.flush(); ok = os.path.getsize(n.name) > 2\nassert ok\nfor s in samples: print(7)"
    assert script(tmp_path, code, retries=2).score(levels(), names(4)).tolist() == [7] * 4
    (tmp_path / "n").unlink()
    with pytest.raises(RewardError, match=r"exit status 1.*, 2 times$"):
        script(tmp_path, code, retries=1).score(levels(1), names(1))


def test_a_command_that_only_takes_small_batches_is_said_to(tmp_path):
    reward = script(tmp_path, "assert len(samples) < 3, 'too many'\nfor s in samples: print(level(s))", retries=0)
    with pytest.warns(UserWarning, match="failed on 4 samples at once and not on parts of them .*too many"):
        assert reward.score(levels(), names(4)).tolist() == [0, 20, 40, 60]


def test_commands_that_cannot_be_run():
    for text, message in (
        ("no-such-program-anywhere --x", "the program 'no-such-program-anywhere' of .* is not found or not executable; give its path"),
        ("", "it is empty"),
        ("python 'score.py", "cannot be read .No closing quotation.; close every quote"),
    ):
        with pytest.raises(ValueError, match=message):
            command(text)
    with pytest.raises(ValueError, match="timeout: 0 is not allowed"):
        CommandReward((sys.executable,), timeout=0)
    with pytest.raises(ValueError, match="retries: -1 is not allowed"):
        CommandReward((sys.executable,), retries=-1)


def test_no_shell_reads_a_command(tmp_path):
    file = tmp_path / "argv.py"
    file.write_text("import sys, json; sys.stdin.read(); print(float(sys.argv[1:] == ['$HOME', ';', '*', 'a, b']))")
    assert command(f"{sys.executable} {file} $HOME ';' * 'a, b'").score(levels(1), ["a"]).tolist() == [1]


def test_the_command_of_the_docs_scores(tmp_path):
    (tmp_path / "score.py").write_text(COMMAND_IN_DOCS)
    torch.testing.assert_close(command(f"{sys.executable} {tmp_path / 'score.py'}").score(levels(), names(4)), levels().mean((1, 2, 3)))


# addresses


class Server:
    """A server in this process; `respond(asked, number of the request)` gives (status, body), or a body."""

    def __init__(self, respond):
        self.asked, self.headers, lock, outer = [], [], threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.asked.append(asked)
                    outer.headers.append(dict(self.headers))
                    number = len(outer.asked)
                answer = respond(asked, number)
                status, body, more = answer if isinstance(answer, tuple) else (200, answer, {})
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    for key, value in more.items():
                        self.send_header(key, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the caller waited no longer
                    pass

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/score"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve():
    yield from served(Server)


def level(media) -> int:
    """What levels() made."""
    return Image.open(io.BytesIO(base64.b64decode(media if isinstance(media, str) else media[0]))).getpixel((0, 0))[0]


def honest(asked, number):
    return {"scores": [level(media) for media in asked["media"]]}


def quick(url: str, **changes) -> HttpReward:
    return HttpReward(url, **{"timeout": 2.0, "retries": 2, "backoff": 0.01, **changes})


def test_an_address_gets_every_pixel_and_its_prompt_in_batches(serve):
    server = serve(honest)
    assert quick(server.url, batch=3).score(levels(8), names(8)).tolist() == [20 * i for i in range(8)]
    assert sorted((asked["prompts"] for asked in server.asked), key=lambda p: p[0]) == [names(8)[:3], names(8)[3:6], names(8)[6:]]
    video = levels(2, (3, 3, 8, 8))
    assert quick(server.url).score(video, ["a", "b"]).tolist() == [0, 20]
    assert [len(media) for media in server.asked[-1]["media"]] == [3, 3], "a list of frames, equal ones too"


def test_several_requests_wait_at_once(serve):
    together = threading.Barrier(4, timeout=5)

    def respond(asked, number):
        together.wait()  # none is answered before all four have come
        return honest(asked, number)

    assert quick(serve(respond).url, batch=1, workers=4, timeout=6.0).score(levels(4), names(4)).tolist() == [0, 20, 40, 60]


def test_two_failures_then_scores(serve):
    server = serve(lambda asked, number: (503, b"warming up", {}) if number <= 2 else honest(asked, number))
    start = time.monotonic()
    assert quick(server.url, backoff=0.1).score(levels(2), names(2)).tolist() == [0, 20]
    assert len(server.asked) == 3 and time.monotonic() - start > 0.1 + 0.2 - 0.01, "waits .1, then .2 seconds"


def test_a_server_error_that_stays_is_narrowed_down_to_its_sample(serve):
    server = serve(lambda asked, number: (500, b"Traceback\nValueError: no forties", {}) if 40 in map(level, asked["media"]) else honest(asked, number))
    message = r"failed on sample 2 of the batch \(prompt 'prompt 2'\), scored alone: .*status 500 \(.*\): Traceback / .*: no forties, 3 times"
    with pytest.raises(RewardError, match=message) as error:
        checked_scores(quick(server.url), levels(4), names(4))
    assert server.url in str(error.value)
    # the whole three times, the half with it once, itself three times, and the half without it once
    assert [len(asked["prompts"]) for asked in server.asked] == [4, 4, 4, 2, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("answer", "message", "requests"),
    [
        ((422, b"bad image", {}), r"sample 0 .*scored alone: the server answered status 422 \(.*\): bad image$", 3),
        (
            (404, b"nothing here", {}),
            r"cannot be asked about samples 0 to 3 .*: the server answered status 404 \(Not Found\): nothing here; check the address",
            1,
        ),
        ((401, b"who are you", {}), r"status 401 .*; set the token", 1),
        ((429, b"slow down", {}), r"status 429 .*; send less at once", 1),
        ({"scores": [1, 2, 3]}, r"sample 0 .*scored alone: the server answered 3 scores for 1 samples", 3),
        ({"scores": [1, 2, float("nan"), 4]}, r"the server answered 'nan' for sample 2 of the batch \(prompt 'prompt 2'\)", 1),
        ({"scores": [1, "x", 3, 4]}, r"the server answered 'x' for sample 1", 1),
        ({"scores": [1, 2, 3, [4]]}, r"the server answered '\[4\]' for sample 3", 1),
        ({"points": 3}, r"without a list of scores", 3),
        (b"<html>hello", r"'<html>hello', which is no JSON", 3),
        (b"[" * 100000, r"which is no JSON|without a list", 3),
        (b" " * (1 << 21), r"is longer than 1048576 bytes", 1),
    ],
)
def test_answers_that_are_wrong_are_not_asked_for_again(serve, answer, message, requests):
    server = serve(lambda asked, number: answer)
    with pytest.raises(RewardError, match=message):
        checked_scores(quick(server.url), levels(4), names(4))
    assert len(server.asked) == requests, "the whole, its first half, its first sample"


def test_a_server_that_hangs_or_drips_or_is_not_there(serve):
    hangs = serve(lambda asked, number: time.sleep(1) or honest(asked, number))
    message = (
        r"cannot be asked about samples 0 to 1 .*first prompt 'prompt 0'.*: no complete answer within 0.2 seconds, 2 times; start the server, or give it more"
    )
    with pytest.raises(RewardError, match=message):
        quick(hangs.url, timeout=0.2, retries=1).score(levels(2), names(2))
    assert len(hangs.asked) == 2
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip():
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                try:
                    for _ in range(100):
                        connection.sendall(b" ")
                        time.sleep(0.05)
                except OSError:
                    pass

        threading.Thread(target=drip, daemon=True).start()
        start = time.monotonic()
        with pytest.raises(RewardError, match="no complete answer within 0.3 seconds"):
            quick(f"http://127.0.0.1:{listening.getsockname()[1]}/", timeout=0.3, retries=0).score(levels(1), names(1))
        assert time.monotonic() - start < 2
        gone = listening.getsockname()[1]
    with pytest.raises(RewardError, match="ConnectionRefusedError.*, 3 times; start the server"):
        quick(f"http://127.0.0.1:{gone}/").score(levels(1), names(1))


def test_a_connection_that_is_dropped_is_tried_again(serve):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        accepted = []

        def drop():
            for _ in range(3):
                connection, _ = listening.accept()
                accepted.append(1)
                connection.close()

        threading.Thread(target=drop, daemon=True).start()
        with pytest.raises(RewardError, match="cannot be asked about sample 0 .*3 times"):
            quick(f"http://127.0.0.1:{listening.getsockname()[1]}/").score(levels(1), names(1))
        assert len(accepted) == 3


def test_no_redirect_is_followed(serve):
    other = serve(honest)
    for status in (301, 302, 303, 307, 308):
        server = serve(lambda asked, number, status=status: (status, b"", {"Location": other.url}))
        with pytest.raises(RewardError, match=f"answered status {status} .*no redirect is followed; give that address"):
            quick(server.url).score(levels(1), names(1))
        assert len(server.asked) == 1
    assert not other.asked


def test_a_token_is_sent_and_never_shown(serve, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    server = serve(lambda asked, number: honest(asked, number) if number == 1 else (403, b"s3cret is not allowed", {}))
    reward = quick(server.url, token="MY_TOKEN")
    assert reward.score(levels(2), names(2)).tolist() == [0, 20] and server.headers[0]["Authorization"] == "Bearer s3cret"
    with pytest.raises(RewardError, match=r"status 403 .*: \*\*\* is not allowed") as error:
        reward.score(levels(2), names(2))
    assert all("s3cret" not in text for text in (str(error.value), repr(reward), reward.name))
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(ValueError, match="token: the environment variable 'MY_TOKEN' is not set"):
        quick(server.url, token="MY_TOKEN")


def test_addresses_that_are_refused_or_warned_about(serve, monkeypatch):
    for url, message in (
        ("ftp://host/x", "write https://host/path"),
        ("http:///x", "write https://host/path"),
        ("http://host:port/x", "cannot be read"),
        ("http://user:password@host/x", "holds a name or password, and addresses are written into logs; use token"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            HttpReward(url)
        assert "password@" not in str(error.value)
    for wrong in ({"timeout": 0}, {"retries": -1}, {"batch": 0}, {"workers": 0}, {"backoff": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: .* is not allowed"):
            quick("http://localhost/x", **wrong)
    with pytest.warns(UserWarning, match="samples travel unencrypted to example.invalid; use https"):
        HttpReward("http://example.invalid/score")
    # a proxy of the environment is not asked about this machine
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert quick(serve(honest).url).score(levels(2), names(2)).tolist() == [0, 20]


def test_the_server_of_the_docs_answers(tmp_path):
    (tmp_path / "server.py").write_text(SERVER_IN_DOCS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(tmp_path / "server.py"), str(port)], stderr=subprocess.DEVNULL)
    try:
        reward = HttpReward(f"http://127.0.0.1:{port}/score", retries=7, backoff=0.1)  # while it starts
        for media in (levels(), levels(4, (3, 2, 8, 8))):
            torch.testing.assert_close(reward.score(media, names(4)), media.flatten(1).mean(1))
    finally:
        process.kill()
        process.wait()


# the command line and runs


def test_rewards_on_the_command_line(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    assert load_reward("compressible") == JPEG() and load_reward("incompressible") == JPEG("large") and load_reward("dynamic-degree") == DynamicDegree()
    assert load_reward("frames=4 compressible") == JPEG(frames=4)
    program = f"{sys.executable} score.py --scales '1,2' a\\,b --glob '*.x'"
    both = load_reward(f"0.5*compressible, 2 * timeout=3 retries=0 command:{program},dynamic-degree")
    assert both.weights == (0.5, 2.0, 1.0) and both.parts[0] == JPEG() and both.parts[2] == DynamicDegree()
    assert both.parts[1] == CommandReward((sys.executable, "score.py", "--scales", "1,2", "a,b", "--glob", "*.x"), timeout=3, retries=0)
    url = "http://127.0.0.1:80/score?x=1*2"
    assert load_reward(f"timeout=5 batch=2 workers=9 backoff=1 token=MY_TOKEN {url}") == HttpReward(url, 5, 3, 1, 2, 9, "MY_TOKEN")
    assert load_reward(f"clip=3 {url}") == SampledFrames(HttpReward(url), 3, "video")
    some = load_reward("frames=2 test_run:brightness")
    assert isinstance(some, SampledFrames) and some.name == "brightness, 2 frames"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "compressibel",
            "reward: 'compressibel' is not of the form module:function, .* none of clipscore, .*, dynamic-degree, ocr, module:function, command:",
        ),
        ("compressible,", "reward: '' is empty between commas"),
        ("", "reward: '' is empty"),
        ("nan*compressible", "reward: the weight 'nan' of 'compressible' is not allowed; it is a finite number"),
        ("timeout=3 compressible", "reward: 'timeout' is no setting of 'compressible'; it takes frames, clip"),
        ("frames=3 dynamic-degree", "reward: 'frames' is no setting of 'dynamic-degree'; it takes none"),
        ("frames=x compressible", "reward: frames=x of 'compressible' is not allowed; it is a whole number"),
        ("frames=0 compressible", "reward: frames: 0 is not allowed"),
        ("frames=2 clip=2 compressible", "reward: frames and clip of 'compressible' cannot go together"),
        ("frames=2 frames=2 compressible", "reward: frames is given twice"),
        ("command:", "reward: command: it is empty"),
        ("command:no-such-program-anywhere", "reward: command: the program 'no-such-program-anywhere'"),
        ("command:python 'a", "reward: .* has a quote that is not closed"),
        ("timeout=-1 http://localhost/x", "reward: timeout: -1.0 is not allowed; it is positive"),
        ("http:localhost", "reward: url: 'http:localhost' is not allowed"),
        ("token=NOT_SET_ANYWHERE https://host/x", "reward: token: the environment variable 'NOT_SET_ANYWHERE' is not set"),
    ],
)
def test_rewards_that_are_refused_before_any_work(capsys, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "dm-align-group", "--reward", text]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.match(f"error: {message}", err), err
    assert not list(tmp_path.iterdir())


NAMES = """
import os, sys
from instep.cli.rewards import load_reward
texts = ["compressible", "frames=4 incompressible", "dynamic-degree", f"timeout={sys.argv[1]} command:env python3 -c 'print(1, 2)'",
         f"batch={sys.argv[1]} token=MY_TOKEN https://host/score", "clip=3 http://localhost/x"]
print("\\n".join(load_reward(text).name for text in texts))
"""


def test_names_are_the_same_in_every_process_and_hold_settings_not_secrets():
    said = []
    for number in ("2", "3"):
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "MY_TOKEN": f"s3cret{number}", "PYTHONHASHSEED": number}
        said.append(subprocess.run([sys.executable, "-c", NAMES, number], env=env, capture_output=True, text=True, check=True).stdout.splitlines())
    assert (
        said[0]
        == said[1]
        == [
            "compressible",
            "incompressible, 4 frames",
            "dynamic-degree",
            "command:env python3 -c 'print(1, 2)'",
            "https://host/score",
            "http://localhost/x, 3 frames as a video",
        ]
    )


SHORT = Common(steps=2, batch=4, critic_updates=1, shift=1.0, guidance=1.5)


class Watched:
    """JPEG size that fails if it is asked for with a graph; `calls` counts."""

    name, differentiable, space, calls = "watched", False, "pixel", 0

    def score(self, media, prompts):
        assert not media.requires_grad
        self.calls += 1
        return JPEG().score(media, prompts)


@pytest.mark.parametrize("rl", ["grpo", "dpo"])
def test_a_run_on_a_black_box_asks_for_no_gradient(tmp_path, rl):
    images, reward = class_digits(), Watched()
    recipe = rl_after(SHORT, distil=0, iterations=2, group=2, rl=rl)
    run = train(recipe, images.family, out=tmp_path / "run", prompts=images.prompts, reward=reward, options=RunOptions(save_every=10, probe_every=50))
    last = json.loads((run.out / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and last["reward/train"] < -0.5 and last["grad/student"] > 0 and reward.calls >= 3
    assert all(v == v for v in last.values() if isinstance(v, float))


def test_a_black_box_is_refused_where_its_gradient_is_climbed(tmp_path):
    images = class_digits()
    with pytest.raises(ValueError, match="climbs its gradient and 'compressible' is not differentiable"):
        train(refl(SHORT, iterations=1), images.family, out=tmp_path / "run", prompts=images.prompts, reward=JPEG())
    with pytest.raises(ValueError, match="reward 'dynamic-degree' raised ValueError: media: shape .* has no motion to be seen"):
        train(rl_after(SHORT, distil=0, iterations=1, group=2, rl="grpo"), images.family, out=tmp_path / "run", prompts=images.prompts, reward=DynamicDegree())
    assert not (tmp_path / "run").exists()


def test_a_run_of_the_command_line_on_an_address_resumes_with_other_patience(tmp_path, serve, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server = serve(honest)
    line = shlex.split("train rl-after --model digits --steps 2 --batch 4 --group 2 --distil 0 --iterations 2 --rl grpo --no-evaluate --out run --threads 1")
    assert main([*line, "--reward", f"0.5*compressible,timeout=5 {server.url}"]) == 0
    identity = json.loads((tmp_path / "run" / "recipe.json").read_text())["reward"]
    assert identity == f"0.5 compressible + 1 {server.url}"
    rows = (tmp_path / "run" / "log.jsonl").read_text()
    assert "reward/train/1" in rows
    assert main([*line, "--reward", f"0.5*compressible,timeout=50 retries=9 {server.url}"]) == 0
    capsys.readouterr()
    assert main([*line, "--reward", f"0.5*incompressible,{server.url}"]) == 2
    assert "holds another run (its reward differ" in capsys.readouterr().err
