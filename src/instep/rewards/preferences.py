"""A reward learned from people's preferences, from the pairs of a file to a folder on disk and back: `instep pairs fit`, `--reward preferences:FOLDER`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from instep.core.files import atomic_dir, write_json
from instep.core.outputs import check_output
from instep.core.statistics import Interval, wilson
from instep.core.version import __version__
from instep.data.pairs import PreferencePair
from instep.data.prompt import Prompt
from instep.rewards.bradley_terry import Fitted, LearnedReward, RewardHead, fit
from instep.rewards.features import Features, FeaturesOf, image_text_features

RECORD = "preferences.json"
Shown = tuple[Path, str]  # a media file and its prompt


@dataclass(frozen=True)
class Learned:
    """A head fitted to pairs, its features, and the number of its pairs and prompts and their share of ties."""

    fitted: Fitted
    features: Features
    pairs: int
    prompts: int
    ties: float

    @property
    def accuracy(self) -> Interval:
        """Share of the held-out preferences that are ordered right, with a 95 % interval (Wilson's, as if those of one prompt always agreed)."""
        return wilson(self.fitted.accuracy * self.fitted.answers, self.fitted.answers)


@torch.no_grad()
def read_features(
    pairs: Sequence[PreferencePair], features: Features, watch: Callable[[list[Shown]], Iterable[Shown]] = iter, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Features of the chosen and of the rejected media, [N, D] each on the CPU; every file is read once. `watch` yields the items and shows the progress."""
    # rewards get the text alone, even if a prompt names a first frame
    texts = _texts(pairs)
    sides = [[(file, text) for file, text in zip(files, texts, strict=True)] for files in ([p.chosen for p in pairs], [p.rejected for p in pairs])]
    todo = list(dict.fromkeys(shown for both in zip(*sides, strict=True) for shown in both))
    rows = {shown: features(features.read(shown[0]).to(device), [shown[1]])[0].cpu() for shown in watch(todo)}
    first, second = (torch.stack([rows[shown] for shown in side]) for side in sides)
    return first, second


def learn(
    pairs: Sequence[PreferencePair],
    features: Features,
    watch: Callable[[list[Shown]], Iterable[Shown]] = iter,
    *,
    hidden: int = 0,
    steps: int = 300,
    decay: float = 1.0,
    heldout: float = 0.2,
    seed: int = 0,
    device: str = "cpu",
) -> Learned:
    """Fits a head to pairs, including ties; a share of the prompts, with all their pairs, is held out (`bradley_terry.fit`)."""
    prompts, outcome = prompts_and_outcomes(pairs)
    if not bool(outcome.any()):
        raise ValueError(f"pairs: all {len(pairs)} of them are ties; give some with a preferred sample")
    first, second = read_features(pairs, features, watch, device)
    fitted = fit(first, second, outcome, hidden=hidden, steps=steps, decay=decay, heldout=heldout, seed=seed, groups=prompts)
    return Learned(fitted, features, len(pairs), len(set(prompts)), float((outcome == 0).float().mean()))


def _texts(pairs: Sequence[PreferencePair]) -> list[str]:
    """The prompt texts of pairs; their prompts are stored in the written form."""
    return [Prompt.parse(pair.prompt).text for pair in pairs]


def prompts_and_outcomes(pairs: Sequence[PreferencePair]) -> tuple[list[str], Tensor]:
    """The prompt text of each pair, by which pairs are held out, and its outcome [N]: 1, or 0 for a tie. ValueError for pairs of one prompt alone."""
    prompts = _texts(pairs)
    if len(set(prompts)) < 2:
        raise ValueError(f"pairs: {len(pairs)} of {len(set(prompts))} prompt are too few; it takes two prompts, one of them to measure on")
    return prompts, torch.tensor([0.0 if pair.tie else 1.0 for pair in pairs])


def save(learned: Learned, out: Path) -> None:
    """`reward_head.safetensors`, `reward_head.json` and `preferences.json` in a new folder, which appears complete or not at all."""
    check_output("out", out)
    fitted, features, accuracy = learned.fitted, learned.features, learned.accuracy
    with atomic_dir(out, "folder") as temporary:
        fitted.head.save(temporary)
        write_json(
            temporary / RECORD,
            {
                "instep": __version__,
                "features": {"given": features.given, "frames": features.frames, "name": features.name},
                "pairs": learned.pairs,
                "prompts": learned.prompts,
                "ties": learned.ties,
                "trained_on": fitted.pairs,
                "held_out": fitted.heldout,
                "accuracy": accuracy.value,
                "interval": [accuracy.low, accuracy.high],
                "log_prob": fitted.log_prob,
                "coin": fitted.coin,
            },
        )


def load_preferences(folder: Path, features_of: FeaturesOf = image_text_features) -> LearnedReward:
    """Loads the reward of such a folder. Its name contains the digest of the head's files and the features; their network must be the one of the fit.
    `features_of` builds the features named in the folder.
    """
    from safetensors import SafetensorError

    try:
        about = json.loads((folder / RECORD).read_text(encoding="utf-8"))["features"]
        given, frames, name = str(about["given"]), int(about["frames"]), str(about["name"])
        head = RewardHead.load(folder).requires_grad_(False)
        digest = hashlib.sha256(b"".join((folder / f"reward_head.{suffix}").read_bytes() for suffix in ("json", "safetensors"))).hexdigest()[:16]
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"preferences: {folder} is not a folder that `instep pairs fit` wrote ({type(error).__name__}: {reason})") from error
    features = features_of(given, frames)
    if head.width != features.width:
        raise ValueError(f"preferences: the head of {folder} reads {head.width} features and {given} gives {features.width}; fit it again")
    if name != features.name:
        raise ValueError(f"preferences: {folder} was fitted on {name}, and {given} is now {features.name}; give that back, or fit it again")
    return LearnedReward(head, features, f"preferences {digest} of {name}")
