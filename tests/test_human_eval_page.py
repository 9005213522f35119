"""The human-evaluation server as it is run: blind, safe against other pages and bad input, losing no answer when it is killed; the page in a browser."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from human_eval_helpers import PROMPTS, sample_folder
from PIL import Image

from instep.cli.main import main
from instep.data.pairs import read_pairs
from instep.human_eval.store import Store

pytest.importorskip("fastapi")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL on Windows")
LEFT = {"visual_quality": "left", "text_alignment": "left", "motion": "equal", "overall": "left"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Server:
    """`instep human-eval` in a process of its own; the links are those it printed."""

    def __init__(self, *args: object, port: int = 0) -> None:
        self.args = [str(arg) for arg in args]
        self.start(port)

    def start(self, port: int) -> None:
        command = [sys.executable, "-m", "instep", "human-eval", *self.args, "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.said = ""
        while self.said.count("http://") < 2:
            line = self.process.stdout.readline()
            assert line, self.said
            self.said += line
        self.annotator, self.results = re.findall(r"http://\S+", self.said)
        self.port = urlsplit(self.annotator).port
        self.token = self.annotator.split("token=")[1]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.said += self.process.stdout.read()
        self.process.wait(20)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        self.said += self.process.stdout.read()
        return self.process.wait(20)

    def ask(self, path: str, body: object = None, *, cookie: str | None = None, raw: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request just as it is written here: nothing is normalised."""
        data = raw if raw is not None else json.dumps(body).encode() if body is not None else None
        sent = {"Host": f"127.0.0.1:{self.port}"} | ({"Cookie": cookie} if cookie else {})
        sent |= {"Content-Type": "application/json", "Content-Length": str(len(data))} if data is not None else {}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest("GET" if data is None else "POST", path, skip_host=True, skip_accept_encoding=True)
            for name, value in sent.items():
                connection.putheader(name, value)
            connection.endheaders(data)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def cookie(self, link: str | None = None) -> str:
        status, headers, _ = self.ask((link or self.annotator).split(str(self.port), 1)[1])
        assert status == 200
        return headers["set-cookie"].split(";")[0]

    def post(self, path: str, body: object, cookie: str | None = None) -> dict:
        status, _, data = self.ask(path, body, cookie=cookie or self.cookie())
        assert status == 200, data
        return json.loads(data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    return sample_folder(folder / "secret-ours", "red"), sample_folder(folder / "secret-theirs", "blue")


@pytest.fixture
def server(tmp_path, folders):
    started = Server(*folders, "--out", tmp_path / "human_eval.sqlite")
    yield started
    if started.process.poll() is None:
        started.kill()
    assert started.token not in started.said.split("results:")[1], "no secret is logged"


@pytest.fixture(scope="module")
def shared(tmp_path_factory, folders):
    """A server for tests that leave no answers."""
    started = Server(*folders, "--out", tmp_path_factory.mktemp("shared") / "human_eval.sqlite")
    cookie = started.cookie()
    started.post("/api/join", {"name": "Ana"}, cookie)
    yield started, cookie
    started.kill()
    assert "Traceback" not in started.said, started.said


def answer(server: Server, name: str, count: int, answers: dict[str, str] = LEFT) -> dict:
    state = server.post("/api/join", {"name": name})
    for i in range(count):
        body = {"name": name, "item": state["item"]["id"], "request": f"{name.encode().hex()[:20]}-request-{state['done']}-{i}", "answers": answers}
        state = server.post("/api/answer", body)
    return state


def test_a_killed_server_goes_on_where_it_was(server, tmp_path):
    assert answer(server, "Ana", 2)["done"] == 2
    cookie, link, port = server.cookie(), server.annotator, server.port
    for _ in range(2):
        server.kill()
        server.start(port)
        assert server.annotator == link, "open pages go on with the same link"
        state = server.post("/api/state", {"name": "Ana"}, cookie)
        last = {"name": "Ana", "item": state["item"]["id"], "request": f"after-kill-{state['done']}", "answers": LEFT}
        assert server.post("/api/answer", last, cookie)["done"] == state["done"] + 1
        assert server.post("/api/answer", last, cookie)["done"] == state["done"] + 1, "sent again, counted once"
    assert answer(server, "Bo", 6)["item"] is None
    store = Store(tmp_path / "human_eval.sqlite")
    assert store.progress() == [("Ana", 4, 6), ("Bo", 6, 6)] and len(store.votes()) == 40
    store.close()
    assert server.stop() == 0


def test_undo_and_conflicts(server):
    state = answer(server, "Ana", 1)
    undone = server.post("/api/undo", {"name": "Ana", "request": "undo-0001"})
    again = server.post("/api/undo", {"name": "Ana", "request": "undo-0001"})
    assert undone == again and undone["done"] == 0 and undone["item"]["before"] == LEFT and undone["item"]["id"] != state["item"]["id"]
    body = {"name": "Ana", "item": undone["item"]["id"], "request": "request-b", "answers": LEFT | {"overall": "equal"}}
    assert server.post("/api/answer", body)["done"] == 1
    status, _, data = server.ask("/api/answer", body | {"request": "request-c", "answers": LEFT}, cookie=server.cookie())
    assert status == 409 and b"undo it first" in data


def test_the_page_is_blind(server, tmp_path):
    """Nothing that is sent to annotators names a run, a file or a folder, in words, headers or images."""
    cookie = server.cookie()
    answers = [server.ask(path, cookie=cookie) for path in ("/", "/page.js", "/style.css")]
    state, shown = server.post("/api/join", {"name": "Ana"}, cookie), Counter()
    while state["item"]:
        answers.append((200, {}, json.dumps(state).encode()))
        for side in ("left", "right"):
            answers.append(server.ask(f"/media/{state['item'][side]['id']}", cookie=cookie))
            assert re.fullmatch(r"[0-9a-f]{16}", state["item"][side]["id"])
        with Image.open(io.BytesIO(answers[-2][2])) as sheet:
            colours = {colour for _, colour in sheet.convert("RGB").getcolors()}
        shown["red" if (255, 0, 0) in colours else "blue"] += 1
        body = {"name": "Ana", "item": state["item"]["id"], "request": f"request-{state['done']}", "answers": LEFT}
        state = server.post("/api/answer", body, cookie)
    assert shown == {"red": 3, "blue": 3}, "on the left as often"
    answers.append(server.ask("/media/none", cookie=cookie))
    for _, headers, body in answers:
        text = (str(headers).encode() + body).lower()
        for name in (b"secret", b"ours", b"theirs", b"red-", b"blue-", str(tmp_path).encode().lower(), b".webp"):
            assert name not in text.replace(b"colours", b""), name
    assert server.ask("/results", cookie=cookie)[0] == 401, "annotators do not see the results"
    status, _, page = server.ask(server.results.split(str(server.port), 1)[1])
    assert status == 200 and b"A: secret-ours" in page and b"<svg" in page and b"Ana" in page
    assert server.ask("/api/state", {"name": "Ana"}, cookie=server.cookie(server.results))[0] == 401


def test_every_request_needs_the_token(shared):
    server, cookie = shared
    name, secret = cookie.split("=", 1)
    for path in ("/", "/page.js", "/style.css", "/media/0", "/results", "/api/state", "/nothing", "/docs", "/openapi.json"):
        for wrong in (None, f"{name}=", f"{name}=x", f"{name}={secret}x", f"other={secret}", "é=ü"):
            assert server.ask(path, cookie=wrong)[0] == 401, (path, wrong)
        assert server.ask(f"{path}?token=wrong")[0] == 401
    assert server.ask("/api/state", {"name": "Ana"})[0] == 401
    assert server.ask(f"/api/state?token={secret}", {"name": "Ana"})[0] == 401, "a link cannot post"
    assert server.ask("/?token=%ff%fe")[0] == 401
    status, headers, _ = server.ask(f"/?token={secret}")
    assert status == 200 and all(part in headers["set-cookie"] for part in ("HttpOnly", "SameSite=Strict", "Path=/"))
    assert "set-cookie" not in server.ask("/", cookie=f"junk; a=b; {cookie}")[1]
    tokens = next(Path(server.args[3]).parent.glob("*.tokens"))
    assert stat.S_IMODE(tokens.stat().st_mode) == 0o600


def test_foreign_hosts_and_origins_are_refused(shared):
    server, cookie = shared
    here, body = f"127.0.0.1:{server.port}", {"name": "Ana"}
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", f"localhost.evil:{server.port}", "", "192.168.0.2", "127.0.0.1:x"):
        assert server.ask("/", cookie=cookie, Host=host)[0] == 421, host
    assert server.ask("/", cookie=cookie, Host=f"localhost:{server.port}")[0] == 200
    assert server.ask("/api/state", body, cookie=cookie, Origin=f"http://{here}")[0] == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"https://{here}", f"http://localhost:{server.port}"):
        assert server.ask("/api/state", body, cookie=cookie, Origin=origin)[0] == 403, origin
    for site in ("cross-site", "same-site"):
        assert server.ask("/api/state", body, cookie=cookie, Sec_Fetch_Site=site)[0] == 403
        assert server.ask("/page.js", cookie=cookie, Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors")[0] == 403
    assert server.ask("/", cookie=cookie, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as twice:
        twice.sendall(f"GET / HTTP/1.1\r\nHost: {here}\r\nHost: evil.example\r\nCookie: {cookie}\r\nConnection: close\r\n\r\n".encode())
        assert b" 400 " in twice.recv(100)


def test_it_listens_on_this_machine_alone(shared):
    server, _ = shared
    elsewhere = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in [a for a in elsewhere if not a.startswith("127.")]:
        with pytest.raises(OSError):
            socket.create_connection((address, server.port), timeout=2).close()
    with contextlib.suppress(FileNotFoundError):
        held = Path("/proc/net/tcp").read_text().splitlines()
        assert [line.split()[1].split(":")[0] for line in held if f":{server.port:04X} 00000000:0000 0A" in line] == ["0100007F"]


def test_no_path_leads_out(shared):
    server, cookie = shared
    for path in (
        "/media/../../../../etc/passwd",
        "/media/..%2f..%2fetc%2fpasswd",
        "/media/%2e%2e/page.js",
        "/media//etc/passwd",
        "/../pyproject.toml",
        "/page.js/../server.py",
        "/media/",
        "/media/%00",
        "/media/" + "0" * 16,
        "/media/" + "a" * 5000,
        "//etc/passwd",
        "/server.py",
        "/index.html",
    ):
        status, _, data = server.ask(path, cookie=cookie)
        assert status == 404 and b"root:" not in data and b"instep" not in data, (path, status)


def test_large_bodies_are_refused(shared):
    server, cookie = shared
    large = json.dumps({"name": "x" * 20000}).encode()
    assert server.ask("/api/join", raw=large, cookie=cookie)[0] == 413
    assert server.ask("/api/join", raw=b"{}", cookie=cookie, Content_Length="999999999999")[0] == 413
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as chunked:
        head = f"POST /api/join HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nCookie: {cookie}\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunked.sendall(head.encode())
        answer = b""
        with contextlib.suppress(OSError):
            for _ in range(40):
                chunked.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        with contextlib.suppress(OSError):
            answer = chunked.recv(100)
        assert b" 413 " in answer
    assert server.ask("/", cookie=cookie)[0] == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"name": 3}',
        b'{"name": ""}',
        b'{"name": "a", "more": 1}',
        b'{"name": "\\ud800"}',
        b'{"name": "a\\u0000b"}',
        b'{"name": ' + b"[" * 8000 + b"]" * 7000 + b"}",
        b'{"name": ' + b"9" * 9000 + b"}",
        b'{"name": "' + b"x" * 3000 + b'"}',
        b'{"name": NaN}',
        b'{"name": "nobody"}',
    ],
)
def test_malformed_input_is_a_clear_refusal(shared, raw):
    server, cookie = shared
    status, headers, data = server.ask("/api/state", raw=raw, cookie=cookie)
    assert 400 <= status < 500 and headers["content-type"] == "application/json" and json.loads(data)["error"], (status, data)


def test_answers_that_are_none(shared):
    server, cookie = shared
    item = server.post("/api/state", {"name": "Ana"}, cookie)["item"]["id"]
    good = {"name": "Ana", "item": item, "request": "request-1", "answers": LEFT}
    for change in (
        {"item": "../../etc"},
        {"item": "0" * 16},
        {"item": item + "\n"},
        {"item": None},
        {"request": "short"},
        {"request": "x'; DROP TABLE answer; --"},
        {"answers": {}},
        {"answers": LEFT | {"overall": "best"}},
        {"answers": LEFT | {"x": "left"}},
        {"answers": LEFT | {"overall": 1}},
        {"answers": [1]},
        {"name": "Nobody"},
        {"answers": LEFT | {"\ud800": "left"}},
    ):
        status, _, data = server.ask("/api/answer", good | change, cookie=cookie)
        assert status == 422 and json.loads(data)["error"], (change, status, data)
    assert server.post("/api/state", {"name": "Ana"}, cookie)["done"] == 0
    for method_path in ("/api/answer", "/api/join"):
        assert server.ask(method_path, cookie=cookie)[0] == 405


def test_headers_keep_a_page_to_itself(shared):
    server, cookie = shared
    for path in ("/", "/page.js", "/api/none", "/media/none"):
        _, headers, _ = server.ask(path, cookie=cookie)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer" and headers["cache-control"] == "no-store"
    page = Path(main.__code__.co_filename).parents[1] / "human_eval" / "page"
    for file in page.iterdir():
        assert not re.search(r"https?://|//[a-z]+\.", file.read_text(encoding="utf-8")), f"{file.name} asks another machine"


def test_videos_are_sent_in_ranges(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "v.mp4").write_bytes(b"\0\0\0\x18ftypisom" + name.encode() * 500)
        (tmp_path / name / "samples.jsonl").write_text('{"file": "v.mp4", "prompt": "a wave", "seed": 1}\n')
    server = Server(tmp_path / "one", tmp_path / "two", "--out", tmp_path / "v.sqlite", "--questions", "overall", "waves=Which waves look wet?")
    try:
        cookie = server.cookie()
        state = server.post("/api/join", {"name": "Ana"}, cookie)
        assert [q["label"] for q in state["questions"]] == ["Overall", "Which waves look wet?"] and state["item"]["left"]["kind"] == "video"
        status, headers, data = server.ask(f"/media/{state['item']['left']['id']}", cookie=cookie, Range="bytes=4-7")
        assert (status, data, headers["content-type"]) == (206, b"ftyp", "video/mp4")
        assert "content-disposition" not in headers and "1970" in headers["last-modified"]
    finally:
        server.kill()


def test_the_command_line(tmp_path, folders, capsys):
    def said(*args: object) -> str:
        assert main([str(arg) for arg in args]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return out + err

    store = tmp_path / "j.sqlite"
    assert "samples: 1 folder given; name two" in said("human-eval", folders[0])
    assert "samples: none were given" in said("human-eval", "--out", store)
    assert "is not a folder" in said("human-eval", tmp_path / "none", folders[0], "--port", 0)
    assert "port: 70000 is not allowed" in said("human-eval", *folders, "--port", 70000)
    assert "does not exist" in said("human-eval", "--report", store)
    assert "pairs: 'drop' cannot be done; allowed: export, import" in said("pairs", "drop")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot be had" in said("human-eval", *folders, "--port", taken.getsockname()[1], "--out", store)
    server = Server(*folders, "--out", store)
    answer(server, "Ana", 6)
    answer(server, "Bo", 6, LEFT | {"overall": "right"})
    server.kill()
    assert "was begun for other samples" in said("human-eval", *reversed(folders), "--out", store, "--port", 0)
    assert "was begun with 'pairs'" in said("human-eval", "--out", store, "--mode", "score", "--port", 0)
    assert main(["human-eval", "--report", str(store)]) == 0
    out = capsys.readouterr().out
    assert "A: secret-ours    B: secret-theirs" in out and "Ana 6 of 6, Bo 6 of 6" in out and "Text alignment" in out
    pairs = tmp_path / "pairs.jsonl"
    assert main(["pairs", "export", str(store), str(pairs), "--questions", "overall", "--each"]) == 0
    assert "12 pairs" in capsys.readouterr().out
    by_hand = {(vote.annotator, vote.prompt, vote.seed): vote.value for vote in Store(store).votes() if vote.question == "overall"}
    for pair in read_pairs(pairs):
        won = by_hand[pair.annotators[0], pair.prompt, pair.seed]
        assert pair.votes == (1, 0, 0) and pair.chosen.parent == folders[0 if won == "a" else 1] and pair.rejected.parent == folders[1 if won == "a" else 0]
        assert pair.chosen.stem.split("-")[1:] == [str(PROMPTS.index(pair.prompt)), str(pair.seed)]
    assert "exists; choose another name" in said("pairs", "export", store, pairs)
    assert "was not asked" in said("pairs", "export", store, tmp_path / "x.jsonl", "--questions", "beauty")


def test_hostile_text_stays_text(tmp_path):
    """Prompts, names and folders are words, on both pages."""
    bad = "<script>alert(1)</script>"
    a, b = sample_folder(tmp_path / "<img src=x>", "red", prompts=(bad,)), sample_folder(tmp_path / "b", "blue", prompts=(bad,))
    server = Server(a, b, "--out", tmp_path / "j.sqlite")
    try:
        answer(server, "<b onload=x>", 2)
        status, headers, page = server.ask(server.results.split(str(server.port), 1)[1])
        assert status == 200 and b"<script" not in page and b"<img" not in page and b"<b " not in page and b"&lt;b onload=x&gt;" in page
        assert headers["content-security-policy"].startswith("default-src 'none'")
        script = (Path(main.__code__.co_filename).parents[1] / "human_eval" / "page" / "page.js").read_text(encoding="utf-8")
        assert "innerHTML" not in script and "insertAdjacent" not in script and "eval" not in script
    finally:
        server.kill()


def test_a_store_that_cannot_be_written_keeps_the_answer_waiting(server, tmp_path):
    state = answer(server, "Ana", 0)
    holder = sqlite3.connect(tmp_path / "human_eval.sqlite", isolation_level=None)
    holder.execute("ALTER TABLE answer RENAME TO away")
    body = {"name": "Ana", "item": state["item"]["id"], "request": "request-1", "answers": LEFT}
    status, _, data = server.ask("/api/answer", body, cookie=server.cookie())
    assert status == 503 and b"nothing was kept" in data
    holder.execute("ALTER TABLE away RENAME TO answer")
    holder.close()
    assert server.post("/api/answer", body)["done"] == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: the page itself is not tried")
def test_two_annotators_in_a_browser(server, tmp_path):
    """By keyboard and by touch; one reloads midway, the server is killed and comes back, an answer given meanwhile arrives."""
    from browser import Browser, Tab

    def join(tab: Tab, name: str) -> None:
        tab.until("!document.getElementById('start').hidden")
        tab.tap("#name")
        tab.type(name)
        tab.key("Enter")
        ready(tab, 0)

    def ready(tab: Tab, done: int) -> None:
        tab.until(f"document.getElementById('count').textContent === '{done} of 6' && !document.getElementById('stage').classList.contains('loading')")

    def pressed(tab: Tab) -> list[str]:
        return tab.run("[...document.querySelectorAll('[aria-pressed=true]')].map((button) => button.dataset.value)")

    browser = Browser(str(CHROMIUM), tmp_path / "profile")
    try:
        ana, bo = browser.tab(server.annotator), browser.tab(server.annotator, 390, 844, phone=True, dark=True)
        join(ana, "Ana")
        join(bo, "Bo")
        assert ana.run("location.search") == "" and ana.run("document.cookie") == "", "the token is out of sight of scripts and history"
        for done in range(2):
            ready(ana, done)
            for key in ("ArrowLeft", "ArrowRight", "ArrowDown", "ArrowLeft", "Enter"):
                ana.key(key)
        ready(ana, 2)
        # a phone: what is tapped is large enough, nothing is wider than the screen
        assert bo.run("Math.min(...[...document.querySelectorAll('#item button:not([hidden])')].map((b) => b.getBoundingClientRect().height || 99))") >= 44
        assert bo.run("document.documentElement.scrollWidth <= innerWidth")
        for key in ("visual_quality", "text_alignment", "motion", "overall"):
            bo.tap(f"[data-key={key}] [data-value=right]")
        bo.tap("#next")
        ready(bo, 1)
        # half of an answer survives a reload
        ana.key("ArrowRight")
        ana.key("ArrowDown")
        ana.reload()
        ready(ana, 2)
        assert pressed(ana) == ["right", "equal"]
        for key in ("ArrowLeft", "ArrowLeft", "Enter"):
            ana.key(key)
        ready(ana, 3)
        # both sides play on one clock, and stop together
        ana.until("player.sheets.length === 2")
        ana.key(" ")
        at = "player.sheets.map((sheet) => sheet.ends.findIndex((end) => player.elapsed % player.length < end))"
        assert ana.run(at) == ana.run(at) and not ana.run("player.playing")
        ana.key("r")
        assert ana.run("player.playing && player.elapsed < 500")
        # killed: what is answered meanwhile is kept by the page, through a reload too, and arrives once
        before = len(browser.problems())
        server.kill()
        for key in ("visual_quality", "text_alignment", "motion", "overall"):
            bo.tap(f"[data-key={key}] [data-value=left]")
        bo.tap("#next")
        bo.until("!document.getElementById('trouble').hidden")
        for key in ("ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowLeft", "Enter"):
            ana.key(key)
        ana.until("!document.getElementById('trouble').hidden")
        server.start(server.port)
        ana.reload()
        ready(bo, 2)
        ready(ana, 4)
        ana.key("u")
        ready(ana, 3)
        assert pressed(ana) == ["left"] * 4, "undone answers are shown again"
        ana.key("Enter")
        for done in (4, 5):
            ready(ana, done)
            for key in ("ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowLeft", "Enter"):
                ana.key(key)
        ana.until("!document.getElementById('end').hidden")
        page = browser.tab(server.results)
        assert "secret-ours" in page.run("document.body.innerText") and page.run("document.querySelectorAll('.forest circle').length") == 4
        serious = [problem for problem in browser.problems()[:before] if "favicon" not in problem]
        assert not serious, serious
        assert not any("Content Security Policy" in problem or "exception" in problem.lower() for problem in browser.problems())
    finally:
        browser.close()
    time.sleep(0.1)
    store = Store(tmp_path / "human_eval.sqlite")
    assert store.progress() == [("Ana", 6, 6), ("Bo", 2, 6)]
    given = Counter((vote.annotator, vote.question) for vote in store.votes())
    assert given == {("Ana", q): 6 for q in LEFT} | {("Bo", q): 2 for q in LEFT}
    assert store._db.execute("SELECT count(*) FROM judgement").fetchone() == (9,), "the undone one is still there"
    store.close()


RECORD = """(async () => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 64;
  const pen = canvas.getContext("2d"), recorder = new MediaRecorder(canvas.captureStream(20), { mimeType: "video/webm" }), parts = [];
  recorder.ondataavailable = (event) => parts.push(event.data);
  recorder.start();
  for (let i = 0; i < 12; i++) {
    pen.fillStyle = i % 2 ? "COLOUR" : "white";
    pen.fillRect(0, 0, 64, 64);
    await new Promise((done) => setTimeout(done, 50));
  }
  await new Promise((done) => { recorder.onstop = done; recorder.stop(); });
  const bytes = new Uint8Array(await new Blob(parts).arrayBuffer());
  return btoa(String.fromCharCode(...bytes));
})()"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: the page itself is not tried")
def test_videos_play_stop_and_restart_together(tmp_path):
    from browser import Browser

    browser = Browser(str(CHROMIUM), tmp_path / "profile")
    server = None
    try:
        camera = browser.tab("data:text/html,<p>camera")
        for name, colour in (("one", "red"), ("two", "blue")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "v.webm").write_bytes(base64.b64decode(camera.run(RECORD.replace("COLOUR", colour))))
            (tmp_path / name / "samples.jsonl").write_text('{"file": "v.webm", "prompt": "a flicker", "seed": 1}\n')
        server = Server(tmp_path / "one", tmp_path / "two", "--out", tmp_path / "v.sqlite")
        tab = browser.tab(server.annotator)
        tab.until("!document.getElementById('start').hidden")
        tab.tap("#name")
        tab.type("Ana")
        tab.key("Enter")
        tab.until("player && player.videos.length === 2 && !document.getElementById('stage').classList.contains('loading')")
        tab.until("player.videos.every((video) => video.currentTime > 0.05)")
        tab.key(" ")
        assert tab.run("player.videos.every((video) => video.paused && !video.error)")
        tab.tap("#restart")
        tab.until("player.videos.every((video) => !video.paused)")
        # at the end of the longer one both begin again
        tab.run("player.restart = ((old) => () => { window.again = (window.again || 0) + 1; old.call(player); })(player.restart)")
        tab.until("window.again >= 2")
        assert not browser.problems()
    finally:
        browser.close()
        if server:
            server.kill()
