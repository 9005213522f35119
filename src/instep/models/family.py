"""What the library asks of a model family: one file a family implements it, nothing outside `models/` knows more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from instep.core.size import VideoSize
from instep.data.prompt import Prompt
from instep.diffusion.path import Path
from instep.diffusion.prediction import Condition, PredictionType


class Family(Protocol):
    """A pretrained pipeline seen through what training needs. Latents x [B, C, (F,) H, W]; media [B, 3, (F,) H, W] in [0, 1].

    `pipe` is the diffusers pipeline, or None for a network that no stock pipeline samples: its students are exported as transformer and scheduler.
    """

    name: str
    source: str
    size: VideoSize
    pipe: Any
    path: Path
    prediction_type: PredictionType
    latent_shape: tuple[int, ...]
    shift: float
    lora_targets: tuple[str, ...]

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Frozen text encoders, one row a prompt."""
        ...

    def unconditional(self, prompts: Sequence[Prompt]) -> Condition:
        """What guidance leads away from, one row a prompt: its negative prompt, the empty text where it has none."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Latents to media: differentiable and *not* clamped (a clamped decode has no gradient where it saturates)."""
        ...

    @property
    def pretrained(self) -> nn.Module:
        """The pretrained network itself, in eval mode: the teacher's, and under LoRA everybody's."""
        ...

    def new_backbone(self) -> nn.Module:
        """A copy of the pretrained network for a role of its own, in eval mode."""
        ...

    def prepare(self, module: nn.Module, current: Callable[[], Condition | None]) -> None:
        """Called once on each backbone; `current` gives the condition of the running call, also during recomputation.

        It gives None while the module runs outside a role, for instance in the caller's own pipeline.
        """
        ...

    def forward(self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Raw network output in `prediction_type`; t in [0, 1]."""
        ...

    def time_embedders(self, module: nn.Module) -> Sequence[nn.Module]:
        """The submodules whose outputs [B, width] are the time embedding (one, or one a block): what a role is told besides is added to each.

        Each is diffusers' `TimestepEmbedding`, whose last layer is `linear_2`: an export folds guidance scales into its bias.
        """
        ...

    def time_width(self, module: nn.Module) -> int:
        """Width of the time embedding."""
        ...

    def feature_block(self, module: nn.Module) -> nn.Module:
        """The submodule whose output, one tensor [B, N, width] of tokens, a discriminator head reads; it runs once a forward."""
        ...

    def feature_width(self, module: nn.Module) -> int:
        """Width of those tokens."""
        ...

    def skip(self, module: nn.Module, blocks: Sequence[int]) -> AbstractContextManager[None]:
        """A context in which the blocks of these numbers (0-based) pass on what they are given (skip-layer guidance); `skipped` is one.

        ValueError for a number that is no block's.
        """
        ...

    def pipeline(self, module: nn.Module) -> Any:
        """A diffusers pipeline around `module` as its denoiser."""
        ...


class Encodes(Family, Protocol):
    """A family that also turns media into latents: what training on people's own videos needs."""

    def encode_media(self, media: Tensor) -> Tensor:
        """Media [B, 3, (F,) H, W] in [0, 1] to latents [B, C, (F,) H, W]."""
        ...


class ImageToVideo(Encodes, Protocol):
    """A family whose prompts name the first frame of a video (`data/prompt.py`)."""

    def first_frame(self, prompt: Prompt, size: VideoSize) -> Tensor:
        """The prompt's first frame [3, H, W] in [0, 1] at `size`; ValueError for a prompt without one, or one that cannot be read."""
        ...

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """ValueError for the first prompt without a first frame, or with one that cannot be read."""
        ...


def _identity(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


@contextmanager
def skipped(blocks: Sequence[nn.Module], numbers: Sequence[int], pass_on: Callable[..., Any] = _identity) -> Iterator[None]:
    """Inside, `blocks[i].forward` is `pass_on` (by default, its first argument) for every i in `numbers`; ValueError for a number out of range."""
    chosen = block_numbers(numbers, len(blocks))
    for i in chosen:
        blocks[i].forward = pass_on  # type: ignore[method-assign]
    try:
        yield
    finally:
        for i in chosen:
            del blocks[i].forward


def block_numbers(numbers: Sequence[int], count: int) -> tuple[int, ...]:
    """The numbers, each once; ValueError unless all are blocks of a network that has `count` of them and one is left."""
    wrong = [i for i in numbers if not 0 <= i < count]
    chosen = tuple(dict.fromkeys(numbers))
    if wrong or len(chosen) == count:
        what = f"block {wrong[0]}" if wrong else "skipping every block"
        raise ValueError(f"skip_blocks: {what} is not allowed; this network has {count} blocks, 0 to {count - 1}, of which at least one stays")
    return chosen
