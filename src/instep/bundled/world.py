"""What a bundled world offers to the command line, which hands it on to the generic rooms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from instep.bundled.presets import MINIATURE, preset_of
from instep.core.quiet import quiet
from instep.core.size import Size
from instep.data.prompt import Prompt
from instep.data.samples import PairSamples, RealSamples
from instep.diffusion.guidance import GuidanceByLevel
from instep.metrics.columns import Column
from instep.metrics.compare import Generate, Kind, Row
from instep.models.family import Family
from instep.models.preset import Preset
from instep.rewards.base import Reward
from instep.rewards.features import Features
from instep.training.probe import Monitor, Probe

if TYPE_CHECKING:
    from diffusers import WanPipeline

EvalSize = Literal["quick", "full"]


class Ready(Protocol):
    """A bundled world with its networks loaded: everything that a recipe may need."""

    @property
    def family(self) -> Any: ...

    @property
    def prompts(self) -> tuple[Prompt, ...]: ...

    @property
    def reward(self) -> Reward: ...

    @property
    def monitor(self) -> Monitor: ...

    @property
    def classifiers(self) -> tuple[Any, ...]:
        """The training and the monitor classifier."""
        ...

    def known_teacher(self, probe: Probe, guidance: float | GuidanceByLevel) -> Mapping[str, float] | None:
        """The teacher's metrics on a probe that ship with the package; None for any other probe, and where none ship."""
        ...

    def real(self) -> RealSamples:
        """Real samples of the training split."""
        ...

    def pairs(self) -> PairSamples:
        """Labelled pairs of the training split."""
        ...


class Evaluation(Protocol):
    """How samples of a world are measured: on which prompts, by which classifiers, and what the metrics are called."""

    @property
    def columns(self) -> tuple[Column, ...]: ...

    @property
    def accuracies(self) -> Mapping[str, Mapping[str, float]]:
        """Of each classifier, on real samples."""
        ...

    @property
    def notice(self) -> str | None:
        """What a reader of the metrics must know, such as a held-out classifier that is not installed; None: nothing."""
        ...

    def complete(self, row: Row) -> bool:
        """Whether a row that was kept has all that would be measured now."""
        ...

    def prompts(self, size: EvalSize, seed: int, negative: str | None = None) -> Any:
        """The prompts of an evaluation, `negative` the negative prompt of all; the other members take them."""
        ...

    def protocol(self, eval_set: Any) -> str:
        """The name of what is measured; only rows of one protocol can be compared."""
        ...

    def fingerprint(self, eval_set: Any) -> bytes:
        """Of everything but the model that a row depends on: prompts, classifiers and the version of the protocol."""
        ...

    def row(self, name: str, kind: Kind, generate: Generate, eval_set: Any, *, steps: int, guidance: float = 1.0) -> Row:
        """Generates a sample for every prompt and measures them."""
        ...

    def real_row(self, eval_set: Any, through: Callable[[Tensor], Tensor] | None = None) -> Row:
        """Real samples, measured as if they had been generated, or `through` a VAE first."""
        ...


def as_miniature(family: Family, preset: Preset = MINIATURE) -> Family:
    """Gives a family a bundled model's preset in place of that of the full-size model."""
    family.preset = preset
    return family


@dataclass(frozen=True)
class World:
    """A bundled model by name. Nothing is loaded until one of its functions is called.

    ready: the model with prompts, reward, monitor, real samples and pairs. load: the family alone, at a size (None: its own). pipeline: the stock pipeline,
    None where no stock pipeline samples the model. shown: the prompts that `instep sample` draws. features: what a learned reward reads, of the training or
    the monitor classifier. evaluation: None for a world that `instep eval` does not measure. adopt: the family of an export of a run on this
    world, which reads prompts as the world does. rewards: by their names on the command line, those beside the reward of `ready`.
    """

    name: str
    folder: Path
    size: Size
    ready: Callable[[], Ready]
    load: Callable[[Size | None], Family]
    pipeline: Callable[[], Any] | None
    shown: Sequence[Prompt]
    features: Callable[[Literal["training", "monitor"]], Features]
    evaluation: Evaluation | None
    adopt: Callable[[Family], Family] = as_miniature
    rewards: Mapping[str, Callable[[], Reward]] = field(default_factory=dict)

    @property
    def preset(self) -> Preset:
        """What the model is sampled with and, where it is for recipes, what they begin from."""
        return preset_of(self.name)


@torch.no_grad()
def encoded(family: Family, media: Tensor) -> Tensor:
    """Latents of media [N, 3, F, H, W], a few at a time."""
    return torch.cat([family.encode_media(part) for part in media.split(32)])


def text_to_video_pipeline(folder: Path) -> WanPipeline:
    """The stock pipeline of a bundled folder, in float32."""
    from diffusers import WanPipeline

    with quiet():
        return WanPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
