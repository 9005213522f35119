"""What every family has to show, on tiny random pipelines against stock diffusers: the cases and the checks of `test_families.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from tiny import FRAMES, HEIGHT, WIDTH, tiny_cogvideox_pipeline, tiny_sd3_pipeline, tiny_wan22_pipeline, tiny_wan_pipeline
from tiny_families import (
    tiny_cogvideox15_pipeline,
    tiny_dit_pipeline,
    tiny_flux2_klein_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sdxl_pipeline,
    tiny_ti2v_image_pipeline,
    tiny_ti2v_pipeline,
    tiny_wan21_i2v_pipeline,
    tiny_wan22_i2v_pipeline,
    tiny_z_image_pipeline,
)
from torch import Tensor

from instep.core.size import Size
from instep.data.prompt import Prompt
from instep.diffusion.guidance import by_level, guided_by, halves, predict_guided, scale_at
from instep.models.backbone import Backbone
from instep.models.families import family_of
from instep.models.family import Family
from instep.models.role import Role
from instep.recipes.common import Common

TEXTS = ("a seven moving left fast", "a digit", "an eight", "a two standing still")
TWO_LORAS = ("lora.safetensors", "lora_2.safetensors")
VIDEO, IMAGE = Size(HEIGHT, WIDTH, FRAMES), Size(16, 16, 1)


@dataclass(frozen=True)
class Case:
    """A family on its tiny pipeline. `shift` gives the student's four levels, `levels` are those of teacher parity, `given` latent frames are known,
    `negative` is a negative prompt, None where the pipeline takes none. `slow`: a test file of its own covers the family in every run of the tests. `double`:
    whether the stock pipeline takes latents in double precision. `loras`: the files that it loads, none for one that loads no LoRA. `texts`: the prompts.
    `rounding`: how far stock samples may be off in float32, of the largest latent.
    """

    name: str
    make: Callable[[], Any]
    family: str
    size: Size
    shift: float = 5.0
    guidance: float = 4.0
    guidance_2: float | None = None
    levels: tuple[float, ...] = (0.95, 0.6, 0.2)
    given: int = 0
    negative: str | None = "blurry"
    slow: bool = False
    double: bool = True
    loras: tuple[str, ...] = ("lora.safetensors",)
    texts: tuple[str, ...] = TEXTS
    rounding: float = 1e-6

    def common(self, rank: int | None) -> Common:
        return Common(steps=4, shift=self.shift, batch=2, critic_updates=1, guidance=self.guidance, guidance_2=self.guidance_2, lora_rank=rank)


CASES = {
    case.name: case
    for case in (
        Case("Wan 2.1 T2V", tiny_wan_pipeline, "WanFamily", VIDEO, slow=True),
        Case("Wan 2.2 T2V A14B", tiny_wan22_pipeline, "Wan22Family", VIDEO, guidance_2=3.0, loras=TWO_LORAS, slow=True, rounding=2e-6),
        Case("Stable Diffusion 3", tiny_sd3_pipeline, "SD3Family", IMAGE, shift=3.0, slow=True),
        Case("Stable Diffusion 3.5", partial(tiny_sd3_pipeline, dual=True), "SD3Family", IMAGE, shift=3.0, slow=True),
        Case("CogVideoX", tiny_cogvideox_pipeline, "CogVideoXFamily", Size(32, 32, 9), shift=1.0, slow=True),
        Case("Wan 2.1 I2V", tiny_wan21_i2v_pipeline, "Wan21ImageFamily", VIDEO),
        Case("Wan 2.2 I2V A14B", tiny_wan22_i2v_pipeline, "Wan22ImageFamily", VIDEO, guidance_2=3.0, loras=TWO_LORAS),
        Case("Wan 2.2 TI2V-5B, text", tiny_ti2v_pipeline, "TI2VFamily", VIDEO),
        Case("Wan 2.2 TI2V-5B, image", tiny_ti2v_image_pipeline, "TI2VImageFamily", VIDEO, given=1),
        Case("SDXL", tiny_sdxl_pipeline, "SDXLFamily", IMAGE, shift=1.0),
        Case("Z-Image", tiny_z_image_pipeline, "ZImageFamily", IMAGE, shift=3.0, double=False),
        Case("CogVideoX 1.5", tiny_cogvideox15_pipeline, "CogVideoXFamily", Size(32, 32, 9), shift=1.0),
        Case("FLUX.2-klein", tiny_flux2_klein_pipeline, "Flux2KleinBaseFamily", IMAGE, negative=None),
        Case("DiT", tiny_dit_pipeline, "LatentDiTFamily", IMAGE, shift=1.0, negative=None, loras=(), texts=("7", "goldfish", "207", "0")),
        Case("FLUX.1-dev", tiny_flux_pipeline, "FluxFamily", IMAGE),
        Case("Qwen-Image", tiny_qwen_image_pipeline, "QwenImageFamily", Size(32, 32, 1), shift=3.0),
    )
}


@cache
def pipeline_of(name: str) -> Any:
    """The case's pipeline, which nothing changes."""
    return CASES[name].make()


def family(case: Case) -> Family:
    found = family_of(pipeline_of(case.name), case.size, case.name.lower().replace(" ", "-"))
    assert type(found).__name__ == case.family
    return found


def prompts_of(case: Case, folder: Path) -> list[Prompt]:
    """Four prompts, one with a negative prompt; where the family begins with a first frame, each with its own, written to `folder`."""
    images: list[Path | None] = [None] * len(case.texts)
    if family(case).takes_first_frame:
        from PIL import Image

        rng = torch.Generator().manual_seed(0)
        images = [folder / f"{i}.png" for i in range(len(case.texts))]
        for image in images:
            pixels = torch.randint(256, (case.size.height, case.size.width, 3), generator=rng, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(image)
    return [Prompt(text, image=image, negative=case.negative if i == 1 else None) for i, (text, image) in enumerate(zip(case.texts, images, strict=True))]


def rebuilt(pipe: Any, **parts: Any) -> Any:
    """A pipeline around the same parts, some replaced, with the same options."""
    options = {key: value for key, value in pipe.config.items() if key in ("boundary_ratio", "expand_timesteps", "force_zeros_for_empty_prompt")}
    other = type(pipe)(**{**pipe.components, **parts}, **options)
    other.set_progress_bar_config(disable=True)
    return other


class Stepped(NamedTuple):
    prev_sample: Tensor


class Recorder:
    """Stands for a scheduler that has one timestep and keeps the guided output that the pipeline steps with."""

    order, init_noise_sigma = 1, 1.0

    def __init__(self, timestep: float, config: Any) -> None:
        self.timesteps, self.sigmas, self.config = torch.tensor([timestep]), torch.tensor([timestep / 1000, 0.0]), config
        self.seen: list[Tensor] = []

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None) -> None:
        pass

    def set_begin_index(self, index: int = 0) -> None:
        pass

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(self, output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, generator: Any = None, eta: float = 0.0) -> Stepped:
        self.seen.append(output.clone())
        return Stepped(sample)


def stock_output(case: Case, pipe: Any, fam: Family, prompt: Prompt, x: Tensor, level: float) -> Tensor:
    """The guided output [1, ...] that the stock pipeline gives its scheduler's step, from x [1, ...] at `level`, in our layout of latents."""
    recorder = Recorder(timestep_of(fam, level), copy.deepcopy(pipe.scheduler.config))
    other = rebuilt(pipe)
    object.__setattr__(other, "scheduler", recorder)
    with starting_from(other, fam.stock_latents(x)):
        fam.stock_sample(other, [prompt], steps=1, guidance=case.guidance, guidance_2=case.guidance_2, output="latent")
    (raw,) = recorder.seen
    # DiT's pipeline steps the conditional and the unconditional half alike
    return fam.own_latents(raw[:1])


@contextmanager
def starting_from(pipe: Any, latents: Tensor) -> Iterator[None]:
    """The pipeline's first latents are these; DiT's pipeline draws them in its call."""
    if hasattr(pipe, "prepare_latents"):
        pipe.prepare_latents = given_latents(pipe.prepare_latents, latents)
        yield
    else:
        with patch("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *args, **kwargs: latents):
            yield


def given_latents(prepare: Callable[..., Any], latents: Tensor) -> Callable[..., Any]:
    """`prepare_latents` that starts from `latents`, and returns what else it makes (the condition of a first frame) as it is."""

    def prepared(*args: Any, **kwargs: Any) -> Any:
        made = prepare(*args, **kwargs)
        return (latents, *made[1:]) if isinstance(made, tuple) else latents

    return prepared


def timestep_of(fam: Family, level: float) -> float:
    """The pipeline's timestep for a level: 1000 t on the flow; level k / N of a table is training step k - 1."""
    steps = getattr(fam.path, "steps", None)
    return level * 1000 if steps is None else float(round(level * steps) - 1)


def our_output(case: Case, fam: Family, prompt: Prompt, x: Tensor, level: float) -> Tensor:
    """The family's guided prediction [1, ...] as its network would have put it out."""
    t = torch.tensor([level])
    teacher = Role("teacher", Backbone(fam, fam.new_backbone()))
    cond, null, scale = fam.encode([prompt]), fam.unconditional([prompt]), by_level(case.guidance, case.guidance_2, fam.boundary)
    with torch.no_grad():
        parts = halves(teacher(torch.cat([x, x]), torch.cat([t, t]), cond.stack(null)))
        found = guided_by(teacher, t, *parts, scale_at(scale, t, x))
        assert torch.equal(predict_guided(teacher, x, t, cond, null, scale).x0, found.x0)
    if fam.prediction_type == "velocity":
        return found.v
    a, b = fam.path.a(t).double(), fam.path.b(t).double()
    eps = (x - a * found.x0) / b
    return eps if fam.prediction_type == "eps" else a * eps - b * found.x0
