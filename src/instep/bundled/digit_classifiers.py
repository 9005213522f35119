"""Three classifiers of 8 x 8 digits: one to train on, one to watch, one to report. As for moving digits they share nothing but their task:
other architecture, other seed, other scans (splits train, monitor and heldout).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.bundled.classifiers import FEATURES, ClassifierName, Residual
from instep.bundled.digits import WORDS
from instep.data.prompt import Prompt, texts_of

FOLDER = Path(__file__).parent / "assets" / "digits" / "classifiers"
Scale = Literal["log", "probability"]


class Trunk(nn.Module):
    """Grey images [B, 1, 8, 8] in [0, 1] to features [B, 64], and from there to ten logits."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Sequential(*layers)
        self.digit = nn.Linear(FEATURES, 10)

    def forward(self, grey: Tensor) -> Tensor:
        return self.digit(self.embed(grey))


class Convolutions(Trunk):
    """Three plain convolutions and a dense layer that sees where things are (training classifier)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, 1, 1),
            nn.GroupNorm(8, 32),
            nn.SiLU(),
            nn.Conv2d(32, 48, 3, 2, 1),
            nn.GroupNorm(8, 48),
            nn.SiLU(),
            nn.Conv2d(48, 64, 3, 1, 1),
            nn.GroupNorm(8, 64),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * 16, FEATURES),
            nn.SiLU(),
        )


class Dense(Trunk):
    """No convolution: three dense layers on the pixels (monitor classifier)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(64, 192),
            nn.LayerNorm(192),
            nn.SiLU(),
            nn.Linear(192, 192),
            nn.LayerNorm(192),
            nn.SiLU(),
            nn.Linear(192, FEATURES),
            nn.SiLU(),
        )


class Residuals(Trunk):
    """Residual blocks, pooled over the image (held-out classifier)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 24, 3, 1, 1),
            nn.GroupNorm(8, 24),
            nn.SiLU(),
            Residual(24, 48),
            Residual(48, 96),
            nn.Flatten(),
            nn.Linear(96 * 4, FEATURES),
            nn.SiLU(),
        )


ARCHITECTURES: dict[ClassifierName, type[Trunk]] = {"training": Convolutions, "monitor": Dense, "heldout": Residuals}


@dataclass(frozen=True)
class DigitClassifier:
    """A frozen classifier; its score is differentiable with respect to the pixels. `scale`: log p of the asked class (<= 0), or p itself."""

    name: str
    net: Trunk
    accuracy: float = float("nan")
    scale: Scale = "log"
    differentiable = True
    space: ClassVar[Literal["pixel", "latent"]] = "pixel"

    def __post_init__(self) -> None:
        self.net.eval().requires_grad_(False)

    def _grey(self, media: Tensor) -> Tensor:
        if media.ndim != 4 or media.shape[1:] != (3, 8, 8):
            raise ValueError(f"media: shape {tuple(media.shape)} is not allowed; this classifier reads [B, 3, 8, 8] in [0, 1]")
        return media.float().mean(1, keepdim=True)

    def logits(self, media: Tensor) -> Tensor:
        """[B, 10]."""
        return self.net(self._grey(media))

    def features(self, media: Tensor) -> Tensor:
        """Penultimate features [B, 64]."""
        return self.net.embed(self._grey(media))

    def asked(self, prompts: Sequence[Prompt | str]) -> Tensor:
        """What prompts ask for, in the space of `features` [B, 64]: their classes' rows of the last layer, less the mean of all."""
        weight = self.net.digit.weight
        return weight[_classes(prompts, weight.device)] - weight.mean(0)

    def score(self, media: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
        """log p (or p) of the prompts' classes, [B]; higher is better."""
        log_p = self.logits(media).log_softmax(1).gather(1, _classes(prompts, media.device)[:, None])[:, 0]
        return log_p if self.scale == "log" else log_p.exp()

    @torch.no_grad()
    def correct(self, media: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
        """Whether the most probable class is the asked one, [B] booleans."""
        return self.logits(media).argmax(1) == _classes(prompts, media.device)

    def metrics(self, media: Tensor, prompts: Sequence[Prompt | str]) -> dict[str, float]:
        """As a run's monitor: share of right classes and mean log-probability."""
        log_p = F.cross_entropy(self.logits(media), _classes(prompts, media.device))
        return {"monitor_both": float(self.correct(media, prompts).float().mean()), "monitor_score": -float(log_p)}


def _classes(prompts: Sequence[Prompt | str], device: torch.device) -> Tensor:
    texts = texts_of(prompts)
    rows = {str(i): i for i in range(10)} | {word: i for i, word in enumerate(WORDS)}
    unknown = [text for text in texts if text not in rows]
    if unknown:
        raise ValueError(f"prompts: {unknown[0]!r} is no digit; allowed: {', '.join(rows)}")
    return torch.tensor([rows[text] for text in texts], device=device)


def load_digit_classifier(name: ClassifierName, folder: Path = FOLDER, scale: Scale = "log") -> DigitClassifier:
    """A bundled classifier of digits, float32, frozen."""
    if name not in get_args(ClassifierName):
        raise ValueError(f"name: {name!r} is not allowed; use one of {', '.join(get_args(ClassifierName))}")
    net, accuracy = _load(name, Path(folder))
    return DigitClassifier(name if scale == "log" else f"{name}, {scale}", net, accuracy, scale)


@cache
def _load(name: ClassifierName, folder: Path) -> tuple[Trunk, float]:
    from safetensors.torch import load_file

    net = ARCHITECTURES[name]()
    net.load_state_dict({k: v.float() for k, v in load_file(folder / f"{name}.safetensors").items()})
    return net, json.loads((folder / f"{name}.json").read_text())["accuracy"]
