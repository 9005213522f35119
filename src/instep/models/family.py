"""What the library asks of a model family: one file a family implements it, and nothing outside `models/` knows more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path as FilePath
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.data.prompt import Prompt
from instep.diffusion.guidance import GuidanceRule
from instep.diffusion.path import Path
from instep.diffusion.prediction import Condition, PredictionType
from instep.models.preset import Preset
from instep.models.styles import Style

Task = Literal["text-to-image", "text-to-video", "image-to-video", "class-to-image"]


class ComfyUI(Protocol):
    """How ComfyUI runs a family's models."""

    def parameter(self, key: str) -> str:
        """The name that ComfyUI's loader reads for a parameter of the denoiser; ValueError for one that it has no name for."""
        ...

    def obstacle(self, pipe: Any) -> str | None:
        """None if ComfyUI can run the pipeline's model, else the reason why it cannot."""
        ...

    def shift(self, levels: Sequence[float]) -> tuple[float, float]:
        """The timestep shift at which ComfyUI's second level is ours, and the largest difference of all levels at that shift."""
        ...

    def workflow(self, levels: Sequence[float], size: Size, prompt: str, model: str, loras: Sequence[tuple[str, float]], seed: int) -> dict[str, Any]:
        """A graph of stock nodes in ComfyUI's API format; `model` and `loras` are file names, these with their strengths."""
        ...


class Family(Protocol):
    """A pretrained diffusers pipeline as training, sampling, planning and export see it. Latents x are [B, C, (F,) H, W], media [B, 3, (F,) H, W] in [0, 1].

    name, source: for records. size: height, width and frames of its samples (1 frame: images). pipe: the diffusers pipeline, or None for a network that no
    stock pipeline samples; its students are exported as transformer and scheduler. shift: the timestep shift of the model's own sampler.

    denoisers: the pipeline's component names of the network's parts, one, or one an expert. boundary: None for one network; of two experts the level in (0, 1)
    at and above which the first one predicts. takes_first_frame: samples begin with a given image, which prompts carry.

    guidance_rule: how the pipeline guides; None: w of u + w (c - u).

    passes_generator: whether the pipeline's call hands `generator=` on to the scheduler, which re-noises with it. even_sigmas: whether it gives the scheduler
    the levels 1, (n - 1) / n, ..., 1 / n to shift, instead of their number. micro_batch: the most rows that go through the network or the VAE at once; None:
    all. comfyui: how ComfyUI runs the models; None: no workflow is made. comfyui_reads_lora: whether ComfyUI has names for all that a LoRA file of this family
    holds. styles: the adapters that the pipeline carried, which are merged into the networks. variant: that of the files it was loaded from, if they had a word
    in their names. divides_tokens: whether several processes may compute a sample together (`models/context.py`).
    """

    name: str
    source: str
    size: Size
    pipe: Any
    path: Path
    prediction_type: PredictionType
    latent_shape: tuple[int, ...]
    shift: float
    preset: Preset
    task: Task
    lora_targets: tuple[str, ...]
    denoisers: tuple[str, ...]
    boundary: float | None
    takes_first_frame: bool
    guidance_rule: GuidanceRule | None
    passes_generator: bool
    even_sigmas: bool
    comfyui: ComfyUI | None
    comfyui_reads_lora: bool
    micro_batch: int | None
    divides_tokens: bool
    styles: tuple[Style, ...]
    variant: str | None

    @property
    def device(self) -> torch.device:
        """Where the network computes, and with it samples and conditions are."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        ...

    def placed(
        self, device: torch.device | str, dtype: torch.dtype | None = None, micro_batch: int | None = None, *, offload: bool = False, decodes: bool = True
    ) -> Self:
        """The same family with its network and VAE on `device`, the network in `dtype` (None: as it is); this one, and what was lent to it, stay as they are.

        micro_batch: the most rows that go through the network or the VAE at once. offload: network and VAE stay in host memory and come to `device`, which is
        the family's all the same, when they are used. decodes: whether the VAE comes along; a teacher beside a student decodes nothing.
        """
        ...

    def at(self, size: Size) -> Self:
        """The same family at another size, around the same pipeline; ValueError for a size that the model cannot draw."""
        ...

    def with_pipe(self, pipe: Any, size: Size) -> Self:
        """The same kind of family around another pipeline."""
        ...

    def smallest(self) -> Size:
        """A size of a few tokens: whether two samplers agree does not depend on the size, but what asking costs does."""
        ...

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for the first prompt that the model cannot take: without the first frame it needs, or with one that it has no use for."""
        ...

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Encodes prompts with the frozen text encoders, one row a prompt."""
        ...

    def unconditional(self, prompts: Sequence[Prompt]) -> Condition:
        """Encodes what guidance leads away from, one row a prompt: its negative prompt, the empty text where it has none."""
        ...

    def blank(self, n: int) -> tuple[Condition, Condition]:
        """For planning: conditions of the shapes that `encode` and `unconditional` give for n prompts of the longest text. Their values mean nothing."""
        ...

    def encode_all(self, prompts: Sequence[Prompt], folder: FilePath, device: torch.device | str | None = None) -> None:
        """Encodes each text of the prompts, negative prompts and the empty text included, that `folder` lacks, and writes it there. From then on `encode` and
        `unconditional` look texts up there, and the text encoders are needed for other texts alone. They are on `device` meanwhile. A model without text
        encoders has nothing to encode.
        """
        ...

    def text_modules(self) -> Sequence[nn.Module]:
        """The text encoders; none for a model that takes no text."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Latents to media: differentiable and *not* clamped (a clamped decode has no gradient where it saturates)."""
        ...

    def encode_media(self, media: Tensor) -> Tensor:
        """Media [B, 3, (F,) H, W] in [0, 1] to latents [B, C, (F,) H, W]; ValueError where the model cannot."""
        ...

    @property
    def pretrained(self) -> nn.Module:
        """The pretrained network itself, in eval mode: the teacher's, and under LoRA that of every role."""
        ...

    def new_backbone(self, trained: Sequence[str] | None = None) -> nn.Module:
        """A copy of the pretrained network for a role of its own, in eval mode; parts that are not in `trained` (None: all are) share its weights."""
        ...

    def parts(self, network: nn.Module) -> dict[str, nn.Module]:
        """The parts of a network by their component names (`denoisers`)."""
        ...

    def join(self, parts: Mapping[str, nn.Module]) -> nn.Module:
        """The network made of these parts: the inverse of `parts`."""
        ...

    def pipeline(self, parts: Mapping[str, nn.Module], **others: Any) -> Any:
        """A stock diffusers pipeline around `parts` themselves, and `others` in place of further components; nothing is copied."""
        ...

    def prepare(self, module: nn.Module, current: Callable[[], Condition | None]) -> None:
        """Called once on each backbone; `current` gives the condition of the running call, also during recomputation.

        It gives None while the module runs outside a role, for instance in the caller's own pipeline.
        """
        ...

    def forward(self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Raw network output in `prediction_type`; x_t in the dtype that the network computes in, levels t [B] in [0, 1] on the host."""
        ...

    def time_embedders(self, module: nn.Module) -> Sequence[nn.Module]:
        """The submodules whose outputs, [B, width] or one a token, [B, N, width], are the time embedding (one, or one a block); a role adds its own
        embeddings to each output.

        The last linear layer in each makes its output: an export folds guidance scales into that layer's bias.
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
        """A context in which the blocks of these numbers (0-based) pass their input on unchanged (skip-layer guidance); `skipped` is one.

        Raises ValueError for a number that is no block's.
        """
        ...

    def called_apart(self, module: nn.Module) -> Sequence[nn.Module]:
        """Submodules of blocks that the network calls outside of their block too: where processes divide a network, each keeps these whole."""
        ...

    def lora_keys(self, part: str, layer: str) -> tuple[str, str]:
        """The names that the tensors A [r, in] and B [out, r] of a part's layer have in a LoRA file; ValueError for a layer without a name there."""
        ...

    def usual(self) -> tuple[int, float]:
        """Steps and guidance that the pipeline's call takes unless they are given."""
        ...

    def guidance_arguments(self, guidance: float) -> dict[str, float]:
        """The arguments of the pipeline's call that guide by w of u + w (c - u), the scale itself first (by the `guidance_rule`); 1: no guidance."""
        ...

    def stock_latents(self, x: Tensor) -> Tensor:
        """Our latents x [B, C, (F,) H, W] in the layout that the pipeline steps, and draws the noise of later steps in."""
        ...

    def own_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `stock_latents`."""
        ...

    def first_noise(self, n: int, rng: torch.Generator) -> Tensor:
        """Our noise [n, C, (F,) H, W] of the numbers that the pipeline draws for its first latents, on the device of `rng`."""
        ...

    def stock_sample(
        self, pipe: Any, prompts: Sequence[Prompt], *, steps: int, guidance: float, output: Literal["media", "latent"], guidance_2: float | None = None
    ) -> Tensor:
        """Samples of the stock pipeline at this family's size: media [B, 3, (F,) H, W] in [0, 1], or latents as the pipeline steps them."""
        ...

    def calls(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        """The prompts of each call of the stock pipeline: all at once, or one by one where a call takes one first frame."""
        ...


def _identity(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def shown_tokens(block: nn.Module, show: Callable[[Any, tuple, Any], None]) -> nn.Module:
    """An identity beside a block that returns more than image tokens: `show`, a forward hook of the block, calls `block.tokens` with those alone.

    A copy of a module brings its hook along, and one is enough.
    """
    found: Any = block
    if not hasattr(found, "tokens"):
        found.tokens = nn.Identity()
        found.register_forward_hook(show)
    return found.tokens


@contextmanager
def skipped(blocks: Sequence[nn.Module], numbers: Sequence[int], pass_on: Callable[..., Any] = _identity) -> Iterator[None]:
    """A context in which `blocks[i].forward` is `pass_on` (by default, its first argument) for every i in `numbers`; ValueError for a number out of range."""
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
