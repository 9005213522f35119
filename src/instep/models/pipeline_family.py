"""What the families of diffusers pipelines share; each family's own file overrides what differs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from instep.core.progress import Progress
from instep.core.quiet import quiet
from instep.core.rows import joined
from instep.core.size import Size, as_size
from instep.data.prompt import Prompt, negatives_of, texts_of
from instep.diffusion.guidance import GuidanceRule
from instep.diffusion.path import Path, RectifiedFlow
from instep.diffusion.prediction import Condition, PredictionType
from instep.models.borrow import borrowed, borrowed_pipeline, cast, compute_dtype, visiting
from instep.models.family import ComfyUI
from instep.models.loading import load_network, networks_in
from instep.models.preset import Preset
from instep.models.prompt_cache import Encoded, PromptCache, encoder_identity
from instep.models.stock_calls import StockCalls
from instep.models.styles import Style, styles_of
from instep.models.vae_norm import quicken_norms


def has_part(parts: Mapping[str, Any], name: str) -> bool:
    """Whether a model_index.json, or a pipeline's components, have the part: diffusers writes an absent one as [None, None]."""
    part = parts.get(name)
    return part is not None and not (isinstance(part, list | tuple) and part[0] is None)


def check_flow(scheduler: Any) -> None:
    """Raises ValueError for a scheduler that is none of the rectified flow: at its levels, the network's output is another thing."""
    config = getattr(scheduler, "config", {})
    flow = type(scheduler).__name__.startswith("FlowMatch") or (config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction")
    if not flow:
        raise ValueError(
            f"scheduler: a {type(scheduler).__name__} is not allowed, since this model predicts the velocity of a rectified flow; take the published model's "
            "own scheduler folder (a FlowMatchEulerDiscreteScheduler, or a UniPCMultistepScheduler with use_flow_sigmas)"
        )


class PipelineFamily(StockCalls):
    """A diffusers pipeline with a VAE and text encoders, seen as a family (see `models/family.py`).

    A family sets the class attributes, and implements `fit_size`, `native_size`, `smallest`, `encode_text`, `condition_of` its tensors,
    the media conversions and the network's members.
    """

    pipeline_class: ClassVar[str]
    path: Path = RectifiedFlow()
    prediction_type: PredictionType = "velocity"
    denoisers: tuple[str, ...] = ("transformer",)
    boundary: float | None = None
    guidance_rule: GuidanceRule | None = None
    passes_generator = False
    even_sigmas = False
    comfyui: ComfyUI | None = None
    comfyui_reads_lora = False
    micro_batch: int | None = None
    divides_tokens: bool = False
    styles: tuple[Style, ...] = ()
    variant: str | None = None
    _device: torch.device | None = None
    preset: Preset
    lora_targets: tuple[str, ...]
    # parts that are loaded in float32 whatever the rest is
    wide_parts: ClassVar[tuple[str, ...]] = ("vae",)
    shift: float = 1.0
    # tokens that a text is cut or padded to
    text_length: int = 0

    # whether a scheduler of the rectified flow is the model's own
    flow_scheduler: ClassVar[bool] = True

    def __init__(self, pipe: Any, size: Size | Sequence[int] | None = None, name: str = "", source: str = "") -> None:
        """`size` None: the model's own. `source`: where the pipeline was loaded from, for the run's record. Raises ValueError for a variant of the model or a
        size that does not fit, naming it. The pipeline is borrowed: it stays as it is (`models/borrow.py`).
        """
        if self.flow_scheduler:
            check_flow(pipe.scheduler)
        self.check_pipeline(pipe)
        self.pipe, self.name, self.source = borrowed_pipeline(pipe), name or type(self).__name__.removesuffix("Family").lower(), source
        quicken_norms(self.pipe.vae)
        self.styles = styles_of(pipe)
        self.prompt_cache = PromptCache()
        self.size = self.native_size() if size is None else as_size(size)
        self.latent_shape = self.fit_size(self.size)
        self._network = self.join({part: getattr(self.pipe, part) for part in self.denoisers})

    @classmethod
    def accepts(cls, parts: Mapping[str, Any]) -> bool:
        """Whether a pipeline of this class with these parts (as model_index.json lists them, or the components) is this family's."""
        return True

    @classmethod
    def load(cls, folder: FilePath, size: Size | None = None, name: str = "", dtype: torch.dtype = torch.float32, variant: str | None = None) -> Self:
        """Loads a diffusers folder offline, from safetensors only: networks and text encoders in `dtype`, the VAE (`wide_parts`) in float32.

        Raises ValueError for a tensor that the folder lacks (`load_network`).
        """
        with quiet():
            import diffusers

            kind: Any = getattr(diffusers, cls.pipeline_class)
            parts = {part: load_network(folder, part, torch.float32 if part in cls.wide_parts else dtype, variant) for part in networks_in(folder)}
            pipe = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True, **parts)
        family = cls(pipe, size, name, str(folder))
        family.variant = variant
        return family

    @classmethod
    def preset_of(cls, denoiser: Mapping[str, Any]) -> Preset:
        """The published settings of the model whose denoiser has this configuration."""
        return cls.preset

    @classmethod
    def shift_of(cls, scheduler: Mapping[str, Any]) -> float:
        """The timestep shift of the model's own sampler, from its scheduler's configuration."""
        return cls.shift

    def check_pipeline(self, pipe: Any) -> None:
        """Raises ValueError for a variant of the pipeline that this family cannot run."""

    def native_size(self) -> Size:
        """The size that the model's card samples at."""
        raise NotImplementedError

    def fit_size(self, size: Size) -> tuple[int, ...]:
        """Shape of one sample's latents at `size`, [C, (F,) H, W]; ValueError for a size that the model cannot draw."""
        raise NotImplementedError

    def smallest(self) -> Size:
        raise NotImplementedError

    def at(self, size: Size) -> Self:
        other = copy.copy(self)
        other.size, other.latent_shape = size, self.fit_size(size)
        return other

    def with_pipe(self, pipe: Any, size: Size) -> Self:
        other = type(self)(pipe, size, self.name, self.source)
        other.micro_batch = self.micro_batch
        return other

    @property
    def device(self) -> torch.device:
        return self._device or next(self._network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self._network)

    def placed(
        self, device: torch.device | str, dtype: torch.dtype | None = None, micro_batch: int | None = None, *, offload: bool = False, decodes: bool = True
    ) -> Self:
        other = copy.copy(self)
        other.micro_batch, other._device = micro_batch, torch.device(device)
        if self.pipe is not None:
            other.pipe = borrowed_pipeline(self.pipe)
        parts = {name: borrowed(part) if self.pipe is None else getattr(other.pipe, name) for name, part in self.parts(self._network).items()}
        for part in parts.values():
            if dtype is not None and dtype != self.dtype:
                cast(part, dtype)
        for moving in (*parts.values(), *(other.vaes if decodes else ())):
            moving.to("cpu" if offload else device)
        other._network = other.join(parts)
        return other

    def decode(self, x: Tensor) -> Tensor:
        def decoded(rows: slice) -> Tensor:
            with visiting(self.vaes, x.device):
                return self.decode_rows(x[rows]).to(x.dtype)

        return joined(decoded, len(x), self.micro_batch)

    def encode_media(self, media: Tensor) -> Tensor:
        def encoded(rows: slice) -> Tensor:
            with visiting(self.vaes, media.device):
                return self.encode_rows(media[rows]).to(media.dtype)

        return joined(encoded, len(media), self.micro_batch)

    def decode_rows(self, x: Tensor) -> Tensor:
        """`decode` of as many rows as fit at once; the VAE's own dtype is allowed."""
        raise NotImplementedError

    def encode_rows(self, media: Tensor) -> Tensor:
        """`encode_media` of as many rows as fit at once; the VAE's own dtype is allowed."""
        raise NotImplementedError

    @property
    def vaes(self) -> list[nn.Module]:
        """The VAE, if the model has one."""
        return [] if self.pipe is None else [self.pipe.vae]

    @property
    def vae_dtype(self) -> torch.dtype:
        return compute_dtype(self.pipe.vae)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        if wrong := next((prompt for prompt in prompts if prompt.image is not None), None):
            raise ValueError(f"prompts: {str(wrong)!r} names a first frame, and {self.name} takes text alone; leave [image: ...] out, or choose another model")
        if not self.takes_negative_prompt and (wrong := next((prompt for prompt in prompts if prompt.negative is not None), None)):
            raise ValueError(f"prompts: {str(wrong)!r} has a negative prompt, and the pipeline of {self.name} takes none; leave [negative: ...] out")

    def encode_text(self, text: str) -> Encoded:
        """What the text encoders make of one text: tensors by name, without a batch axis, in the encoders' own dtype, on any device.

        Texts are encoded alone, so that what one is depends neither on its neighbours nor on their order. At the 226 to 512 tokens that the families pad to,
        one text is enough work for an accelerator.
        """
        raise NotImplementedError

    def condition_of(self, encoded: Sequence[Encoded]) -> Condition:
        """What the denoiser is conditioned on, of texts as `encode_text` makes them."""
        raise NotImplementedError

    def encode(self, prompts: Sequence[Prompt | str]) -> Condition:
        return self.condition_of(self.encoded(texts_of(prompts)))

    def unconditional(self, prompts: Sequence[Prompt | str]) -> Condition:
        return self.condition_of(self.encoded(negatives_of(prompts)))

    def blank(self, n: int) -> tuple[Condition, Condition]:
        raise NotImplementedError

    @torch.no_grad()
    def encoded(self, texts: Sequence[str]) -> list[Encoded]:
        """What `encode_text` returns for each, on the CPU: from memory, from the folder given to `encode_all`, or encoded now."""
        found = self.prompt_cache.find(texts)
        for text in texts:
            if text not in found:
                found[text] = self._encode_on_cpu(text)
                self.prompt_cache.keep(text, found[text])
        return [found[text] for text in texts]

    @torch.no_grad()
    def encode_all(self, prompts: Sequence[Prompt | str], folder: FilePath, device: torch.device | str | None = None) -> None:
        """Encodes each text that `folder` lacks and writes it there: texts, negative prompts and the empty text; from then on texts are looked up there.

        The encoders are on `device` meanwhile (None: where they are), and leave it again. Small models write too: the 154 texts of the bundled one take 2 s
        to encode, 8 ms to write and 4 ms to read (one CPU thread).

        Raises ValueError if `folder` is a file, and OSError if the disk is full.
        """
        if not self.text_modules():
            return
        self.prompt_cache.open(folder, self.text_identity())
        missing = self.prompt_cache.missing(["", *texts_of(prompts), *negatives_of(prompts)])
        if missing:
            with visiting(self.text_modules(), device or self.text_device), Progress("encoding texts", len(missing)) as bar:
                self.prompt_cache.fill(missing, self._encode_on_cpu, bar.step)

    def text_modules(self) -> list[nn.Module]:
        """The text encoders."""
        return [encoder for encoder in self._parts_named("text_encoder").values() if isinstance(encoder, nn.Module)]

    def text_identity(self) -> str:
        """A digest of all that an encoded text depends on besides the text (see `encoder_identity`)."""
        code = f"{type(self).encode_text.__module__}.{type(self).encode_text.__qualname__}"
        return encoder_identity(
            self._parts_named("text_encoder"), self._parts_named("tokenizer"), code=code, pipeline=self.pipeline_class, length=self.text_length
        )

    @property
    def text_device(self) -> torch.device:
        return next(self.text_modules()[0].parameters()).device

    def _parts_named(self, start: str) -> dict[str, Any]:
        return {} if self.pipe is None else {name: part for name, part in self.pipe.components.items() if name.startswith(start)}

    def _encode_on_cpu(self, text: str) -> Encoded:
        # copies: a row or a slice would keep the whole padded tensor
        return {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in self.encode_text(text).items()}

    @property
    def pretrained(self) -> nn.Module:
        return self._network

    def new_backbone(self, trained: Sequence[str] | None = None) -> nn.Module:
        chosen = self.denoisers if trained is None else trained
        return self.join({name: copy.deepcopy(part).eval() if name in chosen else borrowed(part) for name, part in self.parts(self._network).items()})

    def parts(self, network: nn.Module) -> dict[str, nn.Module]:
        (name,) = self.denoisers
        return {name: network}

    def join(self, parts: Mapping[str, nn.Module]) -> nn.Module:
        (name,) = self.denoisers
        return parts[name]

    def pipeline(self, parts: Mapping[str, nn.Module], **others: Any) -> Any:
        """Nothing is copied: the pipeline holds the parts, and this family's other components, themselves."""
        kind = type(self.pipe)
        components = {**self.pipe.components, **parts, **others}
        # what is configuration and not a component: Wan's expand_timesteps, boundary_ratio
        options = {key: self.pipe.config[key] for key in inspect.signature(kind).parameters if key not in components and key in self.pipe.config}
        return kind(**components, **options)

    def prepare(self, module: nn.Module, current: Callable[[], Condition | None]) -> None:
        """Nothing: text and its padding are arguments of the network's own forward."""

    def called_apart(self, module: nn.Module) -> Sequence[nn.Module]:
        """None."""
        return ()

    def lora_keys(self, part: str, layer: str) -> tuple[str, str]:
        """The names in stock diffusers' own LoRA files."""
        return f"{part}.{layer}.lora_A.weight", f"{part}.{layer}.lora_B.weight"
