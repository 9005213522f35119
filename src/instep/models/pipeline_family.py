"""What the families of diffusers pipelines share; each family's own file overrides what differs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path as FilePath
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from instep.core.quiet import quiet
from instep.core.size import Size, as_size
from instep.data.prompt import Prompt, as_prompts, negatives_of
from instep.diffusion.path import Path, RectifiedFlow
from instep.diffusion.prediction import Condition, PredictionType
from instep.models.adapters import plain_network
from instep.models.family import ComfyUI, Dimensions, Task
from instep.models.preset import Preset


def has_part(parts: Mapping[str, Any], name: str) -> bool:
    """Whether a model_index.json, or a pipeline's components, have the part: diffusers writes an absent one as [None, None]."""
    part = parts.get(name)
    return part is not None and not (isinstance(part, list | tuple) and part[0] is None)


class PipelineFamily:
    """A diffusers pipeline with a VAE and text encoders, seen as a family (see `models/family.py`).

    A family sets the class attributes, and implements `fit_size`, `native_size`, `smallest`, the text and media conversions and the network's members.
    """

    pipeline_class: ClassVar[str]
    path: Path = RectifiedFlow()
    prediction_type: PredictionType = "velocity"
    task: Task = "text-to-video"
    denoisers: tuple[str, ...] = ("transformer",)
    boundary: float | None = None
    takes_first_frame = False
    axes: tuple[int, ...] = (0, 1, 2, 3, 4)
    passes_generator = False
    comfyui: ComfyUI | None = None
    preset: Preset
    lora_targets: tuple[str, ...]
    shift: float = 1.0

    def __init__(self, pipe: Any, size: Size | Sequence[int] | None = None, name: str = "", source: str = "") -> None:
        """`size` None: the model's own. `source`: where the pipeline was loaded from, for the run's record. Raises ValueError for a variant of the model or a
        size that does not fit, naming it. The pipeline's networks are put into eval mode and frozen.
        """
        self.check_pipeline(pipe)
        self.pipe, self.name, self.source = pipe, name or type(self).__name__.removesuffix("Family").lower(), source
        self.size = self.native_size() if size is None else as_size(size)
        self.latent_shape = self.fit_size(self.size)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        self._network = self.join({part: getattr(pipe, part) for part in self.denoisers})

    @classmethod
    def accepts(cls, parts: Mapping[str, Any]) -> bool:
        """Whether a pipeline of this class with these parts (as model_index.json lists them, or the components) is this family's."""
        return True

    @classmethod
    def load(cls, folder: FilePath, size: Size | None = None, name: str = "") -> Self:
        """Loads a diffusers folder in float32, offline, from safetensors only."""
        with quiet():
            import diffusers

            kind: Any = getattr(diffusers, cls.pipeline_class)
            pipe = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
        return cls(pipe, size, name, str(folder))

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
        return type(self)(pipe, size, self.name, self.source)

    @property
    def device(self) -> torch.device:
        return next(self._network.parameters()).device

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        if wrong := next((prompt for prompt in prompts if prompt.image is not None), None):
            raise ValueError(f"prompts: {str(wrong)!r} names a first frame, and {self.name} takes text alone; leave [image: ...] out, or choose another model")

    @property
    def pretrained(self) -> nn.Module:
        return self._network

    def new_backbone(self, trained: Sequence[str] | None = None) -> nn.Module:
        chosen = self.denoisers if trained is None else trained
        return self.join({name: copy.deepcopy(part).eval() if name in chosen else plain_network(part) for name, part in self.parts(self._network).items()})

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

    def lora_key(self, part: str, layer: str) -> str:
        return f"{part}.{layer}"

    def usual(self) -> tuple[int, float]:
        defaults = inspect.signature(type(self.pipe).__call__).parameters
        return defaults["num_inference_steps"].default, defaults["guidance_scale"].default

    def calls(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        return [[prompt] for prompt in prompts] if self.takes_first_frame else [list(prompts)]

    @torch.no_grad()
    def stock_sample(
        self, pipe: Any, prompts: Sequence[Prompt], *, steps: int, guidance: float, output: Literal["media", "latent"], guidance_2: float | None = None
    ) -> Tensor:
        """With guidance (other than 1) the pipeline gets the negative prompts."""
        found, size = as_prompts(prompts), self.size
        call = partial(pipe, height=size.height, width=size.width, num_inference_steps=steps, guidance_scale=guidance)
        call = partial(call, output_type="pt" if output == "media" else "latent")
        if self.task != "text-to-image":
            call = partial(call, num_frames=size.frames)
        if guidance_2 is not None:
            call = partial(call, guidance_scale_2=guidance_2)
        guided = guidance != 1 and any(prompt.negative is not None for prompt in found)
        drawn = []
        for group in self.calls(found):
            given: dict[str, Any] = {"prompt": [prompt.text for prompt in group], "negative_prompt": negatives_of(group) if guided else None}
            drawn.append(self._output(call(**given, **self.call_inputs(group))))
        samples = torch.cat(drawn)
        return samples.transpose(1, 2) if output == "media" and samples.ndim == 5 else samples

    def call_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What a call of the pipeline takes of these prompts besides their texts."""
        return {}

    def _output(self, result: Any) -> Tensor:
        return result.images if self.task == "text-to-image" else result.frames

    def dimensions(self, network: nn.Module) -> Dimensions:
        vae = {} if self.pipe is None else self.pipe.vae.config
        return self.dimensions_of(next(iter(self.parts(network).values())), self.size, vae)

    @classmethod
    def dimensions_of(cls, denoiser: nn.Module, size: Size, vae: Mapping[str, Any]) -> Dimensions:
        """Of a denoiser, which may lie on the meta device, at `size`; `vae`: the VAE's configuration, for its compression.

        Raises ValueError where the passes and memory of the architecture were not counted.
        """
        raise ValueError(f"model: the passes and memory of a {type(denoiser).__name__} were not counted yet")
