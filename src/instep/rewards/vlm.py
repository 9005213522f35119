"""A vision-language model as a pairwise ranker of videos, through any OpenAI-compatible endpoint (Diffusion-APO, Appendix C), or in this process
(`vlm_local.py`).

The model gets both videos as numbered frames and answers with one of four labels: the first or the second is less distorted; or both are equally distorted,
and the first or the second moves more. Both orders are compared, and answers that disagree are a tie.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from instep.rewards.ranker import both_ways
from instep.rewards.remote import check_address, opener

Domain = Literal["human", "other"]
DomainChoice = Literal["human", "other", "prompt"]  # prompt: for each prompt the one that `domain_of` finds

# the four options for each domain, in the words of the appendix
OPTIONS: dict[Domain, tuple[str, str, str, str]] = {
    "human": (
        "Video 1 has a lower degree of visual distortion.",
        "Video 2 has a lower degree of visual distortion.",
        "Both videos have similar degrees of distortion, but Video 1 features larger camera movement or richer human actions.",
        "Both videos have similar degrees of distortion, but Video 2 features larger camera movement or richer human actions.",
    ),
    "other": (
        "Video 1 has a lower degree of visual distortion/anomalies.",
        "Video 2 has a lower degree of visual distortion/anomalies.",
        "Both videos have similar degrees of distortion, but Video 1 features larger/better camera movement.",
        "Both videos have similar degrees of distortion, but Video 2 features larger/better camera movement.",
    ),
}

# whole words of a prompt that name people or their hands; words that as often mean something else (couple, family, model, face) are left out
PEOPLE = frozenset(
    """
    person persons people human humans man men woman women boy boys girl girls child children kid kids baby babies toddler toddlers teenager teenagers
    adult adults lady ladies gentleman gentlemen guy guys crowd crowds mother mothers father fathers mom dad daughter daughters sister sisters brother
    brothers grandmother grandfather husband wife bride groom friend friends dancer dancers singer singers musician musicians pianist guitarist actor actors
    actress actresses athlete athletes runner runners swimmer swimmers skier skiers surfer surfers cyclist cyclists skateboarder skateboarders hiker hikers
    climber climbers boxer boxers gymnast gymnasts astronaut astronauts chef chefs cook cooks waiter waitress doctor doctors nurse nurses surgeon surgeons
    teacher teachers student students scientist scientists soldier soldiers worker workers farmer farmers fisherman fishermen policeman policemen
    policewoman fireman firefighter firefighters businessman businesswoman businesspeople painter painters photographer photographers tourist tourists
    pedestrian pedestrians hand hands finger fingers
    """.split()  # noqa: SIM905
)


def domain_of(prompt: str) -> Domain:
    """`human` where a prompt names people (a whole word is one of `PEOPLE`, whatever its case), else `other`."""
    return "other" if PEOPLE.isdisjoint(re.findall(r"[^\W\d_]+", prompt.casefold())) else "human"


def check_domain(domain: str) -> None:
    """ValueError for what is no `DomainChoice`."""
    if domain not in get_args(DomainChoice):
        raise ValueError(f"domain: {domain!r} is not allowed; human (people are in it), other, or prompt (human where the prompt names people)")


def instructions(domain: Domain) -> str:
    """The appendix's prompt of a domain, with its four options at the end."""
    if domain not in OPTIONS:
        raise ValueError(f"domain: {domain!r} is not allowed; human (people are in it), or other")
    text = (files("instep.rewards") / f"prompt_{domain}.txt").read_text(encoding="utf-8")
    return text.rstrip() + "\n\n" + "\n".join(f"{i}. {option}" for i, option in enumerate(OPTIONS[domain], 1))


def label_of(answer: str, domain: Domain) -> int:
    """The label 1 to 4 of an answer that is exactly one of the options: its number, its sentence, or both; ValueError for anything else."""
    text = " ".join(answer.split())
    found = re.fullmatch(r"\(?([1-4])\)?[.):]?(?: (.*))?", text)
    number, sentence = (int(found[1]), found[2]) if found else (None, text)
    plain = [option.rstrip(".").lower() for option in OPTIONS[domain]]
    if sentence:
        named = plain.index(sentence.rstrip(".").lower()) + 1 if sentence.rstrip(".").lower() in plain else None
        if named is None or number not in (None, named):
            raise ValueError(f"{answer!r} is none of the four options")
        return named
    if number is None:
        raise ValueError(f"{answer!r} is none of the four options")
    return number


def question(first: Tensor, second: Tensor, domain: Domain, frames: int) -> list[dict[str, Any]]:
    """The appendix's question about two videos [3, (F,) H, W], as parts of a message: each video's frames, `frames` at most, and the domain's prompt."""
    return [*_shown(1, first, frames), *_shown(2, second, frames), {"type": "text", "text": instructions(domain)}]


class Endpoint(Protocol):
    """A chat model: the parts of one message, as the OpenAI interface writes them, to the answer's text. Raises OSError or ValueError on failure."""

    @property
    def name(self) -> str: ...

    def ask(self, content: Sequence[dict[str, Any]]) -> str: ...


@dataclass(frozen=True)
class OpenAIEndpoint:
    """`base_url`/chat/completions of any server with that interface (vLLM, llama.cpp, Ollama, or a hosted one), at temperature 0."""

    base_url: str
    model: str
    api_key: str | None = None
    timeout: float = 120.0
    max_tokens: int = 64

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url: {self.base_url!r} is not allowed; it begins with http:// or https://, for example http://localhost:8000/v1")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key: it holds line breaks or other characters that no header may have; give the key alone")
        check_address(self.base_url, secret=self.api_key is not None)

    def __repr__(self) -> str:
        return f"OpenAIEndpoint({self.base_url!r}, {self.model!r})"  # never the key

    @property
    def name(self) -> str:
        return self.model

    def ask(self, content: Sequence[dict[str, Any]]) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": list(content)}], "temperature": 0, "max_tokens": self.max_tokens}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {})
        request = urllib.request.Request(self.base_url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers)
        try:
            with opener(self.base_url).open(request, timeout=self.timeout) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            reply_text = error.read(300).decode(errors="replace")
            raise OSError(f"HTTP {error.code}: {reply_text.replace(self.api_key, '***') if self.api_key else reply_text}") from error
        except http.client.HTTPException as error:
            raise OSError(f"no complete answer ({type(error).__name__})") from error
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"the reply has no choices[0].message.content ({type(error).__name__})") from error


@dataclass(frozen=True)
class VisionLanguageRanker:
    """Asks a vision-language model which of two videos is better, in both orders (`ranker.Ranked` makes a reward of it).

    `domain`: the human-centric question or the other (the paper trains a ranker for each), or `prompt`: for each prompt the one of `domain_of`.
    `frames` images a video at most, evenly spaced (paper: 40).
    `retries`: number of retries of a failed call or an answer that is no option, `wait` seconds apart; then it raises ValueError with the sample's name.
    """

    endpoint: Endpoint
    domain: DomainChoice = "other"
    frames: int = 40
    retries: int = 2
    wait: float = 1.0

    def __post_init__(self) -> None:
        check_domain(self.domain)
        if self.frames < 1 or self.retries < 0:
            raise ValueError(f"frames, retries: {self.frames} and {self.retries} are not allowed; 1 or more frames, 0 or more retries")

    @property
    def name(self) -> str:
        domain = "a domain a prompt" if self.domain == "prompt" else self.domain
        return f"{self.endpoint.name} ({domain}, {self.frames} frames)"

    def compare(self, first: Tensor, second: Tensor, prompts: Sequence[str]) -> Tensor:
        return both_ways(self._in_order, first, second, prompts)

    def _in_order(self, first: Tensor, second: Tensor, prompts: Sequence[str]) -> Tensor:
        rows = enumerate(zip(first, second, prompts, strict=True))
        labels = [self.label(a, b, f"pair {i}, prompt {prompt!r}", prompt) for i, (a, b, prompt) in rows]
        return torch.tensor([1.0 if label in (1, 3) else -1.0 for label in labels])

    def label(self, first: Tensor, second: Tensor, sample: str = "this pair", prompt: str = "") -> int:
        """Label 1 to 4 of two videos [3, (F,) H, W] as they stand; ValueError, naming `sample`, where no attempt gave one.

        `prompt` decides the domain, where that is left to it, and nothing else.
        """
        domain = domain_of(prompt) if self.domain == "prompt" else self.domain
        content = question(first, second, domain, self.frames)
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.wait)
            try:
                return label_of(self.endpoint.ask(content), domain)
            except (OSError, ValueError) as error:
                last = error
        raise ValueError(f"ranker {self.name!r}: no label for {sample} after {self.retries + 1} attempts; the last: {last}") from last


def _shown(number: int, video: Tensor, frames: int) -> list[dict[str, Any]]:
    """A heading, which keeps the two apart, and the frames as PNG data."""
    media = video if video.ndim == 4 else video[:, None]
    picked = media[:, torch.linspace(0, media.shape[1] - 1, min(frames, media.shape[1])).round().long()]
    images = (picked.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 3, 0).cpu()
    urls = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + _png(image)}} for image in images]
    return [{"type": "text", "text": f"Video {number}:"}, *urls]


def _png(image: Tensor) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
