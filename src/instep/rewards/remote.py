"""Any HTTP endpoint as a reward: a POST of prompts and media as JSON, answered by scores."""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import os
import ssl
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

from instep.rewards.base import RewardError
from instep.rewards.samples import BatchFailed, Sample, count, finite, isolated, png, positive, samples_of, span, tail

ANSWER_LIMIT = 1 << 20  # bytes; a score takes about 20
# statuses that are about the address or the caller: no smaller batch would help
NOT_THE_SAMPLES = (401, 403, 404, 405, 407, 429)


@dataclass(frozen=True)
class HttpReward:
    """POSTs {"prompts": [...], "media": [...]} to `url`, which answers {"scores": [...]}, one finite number a sample, in the same order.

    Each of `media` is the base64 of a PNG for an image, a list of such, one a frame, for a video. A batch goes out `batch` samples at a time,
    `workers` requests at once, because a remote reward mostly waits.

    Tried again `retries` times, after `backoff`, twice, four times ... as many seconds: no connection, no complete answer within `timeout` seconds, a
    status of 5xx. Not tried again: 4xx. A request that fails because of its samples is then split in halves, so that the error names the sample. No redirect
    is followed. `token` names an environment variable that holds a bearer token; the token is in no name, file or message.
    """

    url: str
    timeout: float = 60.0
    retries: int = 3
    backoff: float = 0.5
    batch: int = 8
    workers: int = 4
    token: str | None = None
    differentiable = False
    space: ClassVar[Literal["pixel", "latent"]] = "pixel"

    def __post_init__(self) -> None:
        positive(timeout=self.timeout, batch=self.batch, workers=self.workers)
        count(retries=self.retries, batch=self.batch, workers=self.workers)
        if self.backoff < 0:
            raise ValueError(f"backoff: {self.backoff} is not allowed; it is 0 or more seconds")
        if self.token is not None:
            secret_of(self.token)
        check_address(self.url, secret=self.token is not None)

    @property
    def name(self) -> str:
        """The address; time-outs and batch sizes are not part of the name."""
        return self.url

    def score(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] of media [B, 3, H, W] or [B, 3, F, H, W] in [0, 1]."""
        samples = samples_of(media, prompts)
        parts = [samples[start : start + self.batch] for start in range(0, len(samples), self.batch)]
        pool = ThreadPoolExecutor(min(self.workers, max(1, len(parts))))
        try:
            done = list(pool.map(lambda part: isolated(self.name, self._attempt, part, self.retries), parts))
        finally:
            pool.shutdown(cancel_futures=True)
        return torch.tensor([score for part in done for score in part], device=media.device)

    def _attempt(self, samples: Sequence[Sample], retries: int) -> list[float]:
        body = json.dumps({"prompts": [sample.prompt for sample in samples], "media": [_encoded(sample) for sample in samples]}).encode()
        for tried in range(retries + 1):
            if tried:
                time.sleep(self.backoff * 2 ** (tried - 1))
            try:
                return finite(self.name, samples, self._scores(self._post(body, samples)), "the server answered")
            except _Again as failure:
                if tried < retries:
                    continue
                times = f", {retries + 1} times" if retries else ""
                if failure.of_the_samples:
                    raise BatchFailed(f"{failure}{times}") from None
                raise RewardError(
                    f"reward {self.name!r} cannot be asked about {span(samples)}: {failure}{times}; start the server, or give it more time (timeout), "
                    "more tries (retries) or fewer samples at once (batch, workers)"
                ) from None
        raise AssertionError("unreachable")

    def _post(self, body: bytes, samples: Sequence[Sample]) -> bytes:
        """Returns the answer to one request. Raises _Again for transient errors, BatchFailed if the samples may be the cause, RewardError otherwise."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {secret_of(self.token)}"
        deadline = time.monotonic() + self.timeout
        try:
            with opener(self.url).open(urllib.request.Request(self.url, body, headers, method="POST"), timeout=self.timeout) as answer:
                return self._read(answer, deadline, samples)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, samples) from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise RewardError(f"reward {self.name!r}: the server's certificate is not valid ({reason.verify_message}); see to it") from None
            if isinstance(reason, TimeoutError):
                raise _Again(f"no complete answer within {self.timeout:g} seconds") from None
            raise _Again(f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)) from None

    def _read(self, answer: Any, deadline: float, samples: Sequence[Sample]) -> bytes:
        got = bytearray()
        while part := answer.read1(65536):
            got += part
            if len(got) > ANSWER_LIMIT:
                raise RewardError(f"reward {self.name!r}: the answer about {span(samples)} is longer than {ANSWER_LIMIT} bytes; it holds scores alone")
            # the socket's own limit begins anew with every byte
            if time.monotonic() > deadline:
                raise TimeoutError
        return bytes(got)

    def _refused(self, error: urllib.error.HTTPError, samples: Sequence[Sample]) -> Exception:
        status = f"status {error.code} ({http.client.responses.get(error.code, 'unknown')})"
        if 300 <= error.code < 400:
            where = error.headers.get("Location", "nowhere")
            return RewardError(
                f"reward {self.name!r}: the server answered {status} to {where!r}, and no redirect is followed; give that address if it is right"
            )
        try:
            body = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            body = ""
        body = body.replace(secret_of(self.token), "***") if self.token is not None else body
        text = f"the server answered {status}" + (f": {tail(body)}" if body.strip() else "")
        if error.code >= 500:
            return _Again(text, of_the_samples=True)
        if error.code in NOT_THE_SAMPLES:
            fix = {401: "set the token", 403: "set the token", 429: "send less at once (workers, batch)"}.get(error.code, "check the address")
            return RewardError(f"reward {self.name!r} cannot be asked about {span(samples)}: {text}; {fix}")
        return BatchFailed(text)

    def _scores(self, answer: bytes) -> list[object]:
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError):
            raise BatchFailed(
                f'the server answered {tail(answer.decode("utf-8", "replace"), 1, 80)!r}, which is no JSON; it answers {{"scores": [...]}}'
            ) from None
        if not isinstance(found, dict) or not isinstance(found.get("scores"), list):
            raise BatchFailed(f'the server answered {tail(json.dumps(found), 1, 80)!r} without a list of scores; it answers {{"scores": [...]}}')
        return list(found["scores"])


class _Again(Exception):
    """A transient error. `of_the_samples`: if it persists, the samples may be the cause."""

    def __init__(self, text: str, *, of_the_samples: bool = False) -> None:
        super().__init__(text)
        self.of_the_samples = of_the_samples


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: object) -> None:  # type: ignore[override]
        """None: urllib raises the redirect as an error. Followed, a POST would become a GET without media, and the token could go to another host."""


def _encoded(sample: Sample) -> str | list[str]:
    frames = [base64.b64encode(png(frame)).decode("ascii") for frame in sample.frames]
    return frames if sample.video else frames[0]


def check_address(url: str, *, secret: bool) -> None:
    """Raises ValueError for an invalid address or one with a password; a warning where samples, or a `secret`, travel unencrypted."""
    parts = _parts(url)
    if parts.scheme == "http" and not _here(parts.hostname or ""):
        what = "samples and the token" if secret else "samples"
        warnings.warn(f"reward {url!r}: {what} travel unencrypted to {parts.hostname}; use https if there is one", stacklevel=4)


def secret_of(variable: str) -> str:
    """The token that an environment variable holds. ValueError, which does not show it, if there is none or no header can hold it."""
    secret = os.environ.get(variable, "").strip()
    if not secret:
        raise ValueError(f"token: the environment variable {variable!r} is not set; it holds the bearer token, and `token` is its name")
    if not (secret.isascii() and secret.isprintable()):
        raise ValueError(f"token: the environment variable {variable!r} holds line breaks or other characters that no header may have; set it again")
    return secret


def opener(url: str) -> urllib.request.OpenerDirector:
    """Follows no redirect; a proxy of the environment is for other machines."""
    direct = [urllib.request.ProxyHandler({})] if _here(_parts(url).hostname or "") else []
    return urllib.request.build_opener(_NoRedirect, *direct)


def _parts(url: str) -> Any:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - read for its error
    except ValueError as error:
        raise ValueError(f"url: {url!r} cannot be read ({error})") from None
    if "@" in parts.netloc:
        raise ValueError(f"url: the address of {parts.hostname!r} holds a name or password, and addresses are written into logs; use token")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url: {url!r} is not allowed; write https://host/path or http://127.0.0.1:8000/path")
    return parts


def _here(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
