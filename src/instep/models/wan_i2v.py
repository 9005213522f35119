"""Wan image-to-video of one transformer without an image encoder, through diffusers' own modules: the first frame is given.

The transformer sees the noisy latents, a mask of what is known and the latents of the known video (the first frame, then grey), joined along channels:
[B, z + 4 + z, f, h, w]. All its outputs are velocities of the whole video, so levels, paths and terms are those of text-to-video.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.data.first_frame import read_first_frame
from instep.data.prompt import Prompt, as_prompts, negatives_of, texts_of
from instep.diffusion.prediction import Condition
from instep.diffusion.transfer import to_device, to_match
from instep.models.borrow import compute_dtype, visiting
from instep.models.family import ComfyUI, Task
from instep.models.pipeline_family import has_part
from instep.models.preset import Preset
from instep.models.prompt_cache import Encoded
from instep.models.wan import WAN21_DMD, WanCondition, WanFamily
from instep.models.wan_vae import normalise

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

# of the latents of first frames so many bytes are kept, in the computer's own memory: the oldest are made again
KEPT_BYTES = 2**28


WAN_I2V = Preset(
    source="model card of Wan-AI/Wan2.1-I2V-14B-480P-Diffusers; defaults of diffusers' WanImageToVideoPipeline",
    guidance=5.0,
    sampler_steps=50,
    distillation=replace(
        WAN21_DMD,
        source="Self-Forcing-Plus (github.com/GoatWu/Self-Forcing-Plus), configs/self_forcing_14b_i2v_dmd.yaml: Wan 2.1 I2V 14B by DMD in 4 steps",
        ema=None,
    ),
    micro_batch=1,
)


@torch.no_grad()
def known_latents(vae: AutoencoderKLWan, first_frames: Tensor, frames: int) -> Tensor:
    """What `WanImageToVideoPipeline` joins to the noisy latents for first frames [B, 3, H, W] in [0, 1]: [B, k + z, f, h, w], k the temporal stride.

    First the mask (1 where a latent frame is known, one channel for each of the frames it stands for), then the normalised latents of the first frame
    followed by grey frames.
    """
    stride, (n, _, height, width) = vae.config.scale_factor_temporal, first_frames.shape
    video = torch.cat([first_frames[:, :, None] * 2 - 1, first_frames.new_zeros(n, 3, frames - 1, height, width)], 2)
    latents = normalise(vae, vae.encode(video.to(compute_dtype(vae))).latent_dist.mode().to(video.dtype))
    mask = latents.new_zeros(n, stride, *latents.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], 1)


@dataclass(frozen=True, kw_only=True)
class WanImageCondition(WanCondition):
    """Text, and what is known of the video, [B, k + z, f, h, w] (see `known_latents`).

    The unconditional prompt has no first frame of its own: stacked on rows that have one it takes theirs, as the stock pipeline guides away from another
    text of the same first frame.
    """

    first_frame: Tensor | None = None
    # what the unconditional prompt takes from the rows it is stacked on
    GIVEN: ClassVar[tuple[str, ...]] = ("first_frame",)

    def stack(self, other: Self) -> Self:
        """Both batches, one after the other; `other` without first frames gets those of as many last rows."""
        lacks = [name for name in self.GIVEN if getattr(self, name) is not None and getattr(other, name) is None]
        other = replace(other, **{name: getattr(self, name)[len(self) - len(other) :] for name in lacks})
        return super().stack(other)


class WanImageFamily(WanFamily):
    """A `WanImageToVideoPipeline` seen as a family; a prompt names its first frame, a file (see `data/prompt.py`).

    A subclass may give other names of first frames a meaning (`first_frame`, `first_frame_key`).
    """

    pipeline_class = "WanImageToVideoPipeline"
    divides_tokens = False
    task: Task = "image-to-video"
    takes_first_frame = True
    comfyui: ComfyUI | None = None
    preset = WAN_I2V
    condition: ClassVar[type[WanImageCondition]] = WanImageCondition
    # whether an image encoder reads the first frame too
    has_image_encoder = False

    def __init__(self, pipe: Any, size: Size | Sequence[int] | None = None, name: str = "", source: str = "") -> None:
        super().__init__(pipe, size, name, source)
        self._first_frames: dict[tuple[str, Size], Encoded] = {}

    @classmethod
    def accepts(cls, parts: Mapping[str, Any]) -> bool:
        return super().accepts(parts) and has_part(parts, "image_encoder") == cls.has_image_encoder

    def check_pipeline(self, pipe: Any) -> None:
        """Raises ValueError for a variant that is conditioned otherwise."""
        super().check_pipeline(pipe)
        config, z = pipe.transformer.config, pipe.vae.config.z_dim
        if (config.image_dim is not None) != self.has_image_encoder:
            raise ValueError(
                f"pipeline: image_dim {config.image_dim} of its transformer does not fit {type(self).__name__}; a transformer with an image_dim (Wan 2.1 I2V) "
                "needs the pipeline's image_encoder and image_processor: copy or download the whole folder again"
            )
        expected = z + self.known_channels(pipe)
        if (config.in_channels, config.out_channels) != (expected, z):
            raise ValueError(
                f"pipeline: a transformer of {config.in_channels} channels in, {config.out_channels} out does not fit its VAE; {expected} and {z} do"
            )

    def known_channels(self, pipe: Any) -> int:
        """How many channels of what is known join the noisy latents."""
        return pipe.vae.config.z_dim + pipe.vae_scale_factor_temporal

    def first_frame(self, prompt: Prompt, size: Size) -> Tensor:
        """The prompt's first frame [3, H, W] in [0, 1] at `size`; ValueError for a prompt without one, or one that cannot be read."""
        return read_first_frame(prompt, size)

    def first_frame_key(self, prompt: Prompt) -> str:
        """What the prompt's first frame depends on: prompts of one key share it."""
        return str(prompt.image)

    def check_prompts(self, prompts: Sequence[Prompt | str]) -> None:
        """ValueError for the first prompt without a first frame, or with one that cannot be read; every file is read once."""
        seen: dict[str, Prompt] = {}
        for prompt in as_prompts(prompts):
            seen.setdefault(self.first_frame_key(prompt), prompt)
        for prompt in seen.values():
            self.first_frame(prompt, self.size)

    def encode(self, prompts: Sequence[Prompt | str]) -> WanImageCondition:
        """Text and first frames; ValueError for a prompt that names none."""
        return self._joined(self.condition_of(self.encoded(texts_of(prompts))), self._known(as_prompts(prompts)))

    def unconditional(self, prompts: Sequence[Prompt | str]) -> WanImageCondition:
        """The negative prompts, without first frames: stacked on rows that have one they take theirs."""
        return self._joined(self.condition_of(self.encoded(negatives_of(prompts))), {})

    def blank(self, n: int) -> tuple[WanImageCondition, WanImageCondition]:
        """Texts, and what is known of the videos."""
        texts, _ = super().blank(n)
        known = {name: torch.zeros(n, *shape, device=self.device) for name, shape in self.known_shapes().items()}
        return self._joined(texts, known), self._joined(texts, {})

    def known_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of `encode_first_frame`."""
        return {"first_frame": (self.known_channels(self.pipe), *self.latent_shape[1:])}

    def _joined(self, texts: WanCondition, known: Encoded) -> WanImageCondition:
        return self.condition(text=texts.text, bias=texts.bias, **known)

    def _known(self, prompts: Sequence[Prompt]) -> Encoded:
        """One row a prompt; each first frame is encoded alone, so that what it is does not depend on its neighbours."""
        found: dict[tuple[str, Size], Encoded] = {}
        for key, prompt in {self._kept_as(prompt): prompt for prompt in prompts}.items():
            known = self._first_frames.pop(key, None)
            found[key] = {name: value.cpu() for name, value in self.encode_first_frame(prompt).items()} if known is None else known
        kept = self._first_frames | found
        first = next(iter(found.values()))
        room = KEPT_BYTES // sum(value.nbytes for value in first.values())
        self._first_frames = {key: kept[key] for key in list(kept)[max(0, len(kept) - room) :]}
        return {name: to_device(torch.stack([found[self._kept_as(prompt)][name] for prompt in prompts]), self.device) for name in first}

    def _kept_as(self, prompt: Prompt) -> tuple[str, Size]:
        """What the latents of a first frame depend on; families at several sizes share those that are kept."""
        return self.first_frame_key(prompt), self.size

    @torch.no_grad()
    def encode_first_frame(self, prompt: Prompt) -> Encoded:
        """What the transformer is given of the prompt's first frame: tensors by the names of the condition's fields, without a batch axis."""
        first_frame = to_device(self.first_frame(prompt, self.size), self.device)
        with visiting(self.vaes, self.device):
            return {"first_frame": known_latents(self.pipe.vae, first_frame[None], self.size.frames)[0]}

    def forward(self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert isinstance(cond, WanImageCondition) and cond.first_frame is not None, "a first frame is needed; an unconditional prompt is stacked on one"
        return super().forward(module, torch.cat([x_t, to_match(cond.first_frame, x_t)], 1), t, cond)

    def call_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        (prompt,) = prompts
        return {"image": self.first_frame(prompt, self.size)[None]}
