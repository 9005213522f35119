"""Access control of the human-evaluation server: checks every request and its size before the application handles it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

LARGEST_BODY = 16 * 1024
LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass(frozen=True)
class Tokens:
    """One secret for the annotators, and one for those who see the results, which name the runs."""

    annotator: str
    results: str

    def allowed(self, path: str) -> dict[str, str]:
        """Names of cookies and the secrets that open `path`. The names differ from store to store, because cookies are not separated by port."""
        of = {"annotator": self.annotator, "results": self.results}
        open_to = ("results",) if path == "/results" else ("annotator", "results") if path == "/style.css" else ("annotator",)
        return {f"instep_{role}_{hashlib.sha256(of[role].encode()).hexdigest()[:8]}": of[role] for role in open_to}


def tokens_of(store: Path) -> Tokens:
    """The secrets of a store, kept beside it and readable by its owner alone, so that open pages outlive a restart of the server."""
    path = store.with_name(f"{store.name}.tokens")
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if all(isinstance(found[role], str) and len(found[role]) >= 32 for role in ("annotator", "results")):
                return Tokens(found["annotator"], found["results"])
        except (ValueError, KeyError, TypeError):
            pass
        raise ValueError(f"store: {path} is damaged; remove it, and give everybody the new links") from None
    made = Tokens(secrets.token_urlsafe(32), secrets.token_urlsafe(32))
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({"annotator": made.annotator, "results": made.results}, file)
        file.flush()
        os.fsync(file.fileno())
    return made


class Refused(Exception):
    """A rejected request, with its status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Guard:
    """ASGI application around another: host, origin, token and size of every request; safe headers on every answer."""

    def __init__(self, app: App, tokens: Tokens) -> None:
        self.app, self.tokens = app, tokens

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        cookie: str | None = None

        async def answered(message: Message) -> None:
            if message["type"] == "http.response.start":
                held = {name for name, _ in message.setdefault("headers", [])}
                extra = [(name, value) for name, value in HEADERS.items() if name.encode() not in held]
                if b"cache-control" not in held:
                    extra.append(("cache-control", "no-store"))
                if cookie and message["status"] < 400:
                    extra.append(("set-cookie", cookie))
                message["headers"] = [*message["headers"], *((name.encode(), value.encode()) for name, value in extra)]
            await send(message)

        try:
            cookie = self.check(scope)
            body = await read_body(scope, receive)
        except Refused as refused:
            text = json.dumps({"error": refused.reason}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode()), (b"connection", b"close")]
            await answered({"type": "http.response.start", "status": refused.status, "headers": headers})
            return await send({"type": "http.response.body", "body": text})
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, answered)

    def check(self, scope: Message) -> str | None:
        """Raises Refused unless the request comes from this machine's own page with a token; returns the cookie to set if the token was in the link."""
        headers: dict[str, str] = {}
        for raw, value in scope["headers"]:
            name = raw.decode("latin-1")
            if name in headers and name in ("host", "origin"):
                raise Refused(400, f"{name}: given twice")
            headers[name] = f"{headers[name]}; {value.decode('latin-1')}" if name in headers else value.decode("latin-1")
        host = headers.get("host", "")
        if not LOOPBACK.fullmatch(host):  # a foreign name that leads here is how a web page reaches servers of this machine (DNS rebinding)
            raise Refused(421, "host: this server answers to 127.0.0.1 and localhost alone")
        if "origin" in headers and headers["origin"].lower() != f"http://{host.lower()}":
            raise Refused(403, "origin: requests come from this server's own page alone")
        site, navigates = headers.get("sec-fetch-site", "none"), scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if site not in ("same-origin", "none") and not navigates:
            raise Refused(403, "origin: requests come from this server's own page alone")
        allowed = self.tokens.allowed(scope["path"])
        if scope["method"] == "GET" and scope["query_string"]:
            for token in parse_qs(scope["query_string"].decode("latin-1")).get("token", [])[:1]:
                for name, secret in allowed.items():
                    if _equal(token, secret):
                        return f"{name}={secret}; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000"
        cookies = dict(part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";"))
        if not any(name in cookies and _equal(cookies[name], secret) for name, secret in allowed.items()):
            raise Refused(401, "token: missing or wrong; open the whole link that the command printed")
        return None


async def read_body(scope: Message, receive: Receive) -> bytes:
    """Returns the whole body. Raises Refused as soon as it exceeds the limit, whatever its declared length."""
    claimed = dict(scope["headers"]).get(b"content-length", b"0")
    if not claimed.isdigit() or len(claimed) > 9 or int(claimed) > LARGEST_BODY:
        raise Refused(413, f"body: at most {LARGEST_BODY} bytes are taken")
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "body: it ended early")
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY:
            raise Refused(413, f"body: at most {LARGEST_BODY} bytes are taken")
        if not message.get("more_body", False):
            return body


def _equal(given: str, secret: str) -> bool:
    return secrets.compare_digest(given.encode("utf-8", "surrogatepass"), secret.encode())
