"""The model card: describes the student, its use, its measurements and its limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from instep.core.size import Size
from instep.data.prompt import Prompt, as_prompts, is_file_name
from instep.diffusion.sampling import Sampling
from instep.models.family import Task
from instep.models.styles import Style


@dataclass(frozen=True)
class ExportInfo:
    """The origin of a student, for its card.

    base_model: hub id (owner/name) or the name of a bundled model. metrics: a row of metrics.json ({"name", "nfe", "n",
    "values": {key: {"value", "se"}}}) or None. training_prompts: their number. size: the training size of
    the videos. command: the command that reproduces the student. styles: the adapters inside the model that it was trained on.
    teacher: the model that taught it, if that is another one than base_model.
    """

    recipe: str
    base_model: str
    seed: int
    command: str
    instep_version: str
    training_prompts: int
    size: Size
    example_prompt: Prompt
    metrics: Mapping[str, Any] | None = None
    styles: tuple[Style, ...] = ()
    teacher: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "example_prompt", *as_prompts([self.example_prompt]))

    def json(self) -> dict[str, Any]:
        """The fields for the export's record; a first frame is recorded by its file name alone, as on the card."""
        image = self.example_prompt.image
        shown = replace(self.example_prompt, image=Path(image).name) if image is not None and is_file_name(image) else self.example_prompt
        return asdict(self) | {"example_prompt": str(shown), "styles": [style.json() for style in self.styles]}


@dataclass(frozen=True)
class Measured:
    """Measurements of an export; differences are the largest absolute ones of final latents, in float32.

    comfyui_shift, comfyui_difference: None where no workflow is made for the family. usual: default steps and guidance of the pipeline's
    call. unguided: the arguments of its call that turn guidance off. passes_generator: whether the pipeline passes `generator=` to the scheduler. task: the
    pipeline's task. loras: the LoRA files that were written. comfyui_reads_lora: whether ComfyUI has names for what they hold.
    """

    sampler_difference: float
    student_difference: float
    comfyui_shift: float | None
    comfyui_difference: float | None
    comfyui_obstacle: str | None
    lora: bool
    dtype: str
    pipeline: str = "WanPipeline"
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    usual: tuple[int, float] = (50, 5.0)
    unguided: Mapping[str, float] = field(default_factory=lambda: {"guidance_scale": 1.0})
    passes_generator: bool = False
    task: Task = "text-to-video"
    loras: tuple[str, ...] = ()
    comfyui_reads_lora: bool = False


# a larger difference is another level: ComfyUI's rounding to thousandths stays below
LEVELS_EQUAL = 5e-3


def model_card(info: ExportInfo, levels: Sequence[float], measured: Measured) -> str:
    """README.md in the hub's format: YAML front matter, then Markdown."""
    n = len(levels)
    sections = [
        _front_matter(info, measured),
        _head(info, n, measured),
        _usage(info, levels, measured),
        *([_styles(info, measured)] if info.styles else []),
        _measured(info, measured),
        _comfyui(levels, measured),
        _limits(info, levels),
        _training(info, levels),
    ]
    return "\n".join(sections)


def many_step_card(info: ExportInfo, sampling: Sampling, task: Task = "text-to-video", guided: Mapping[str, float] | None = None) -> str:
    """README.md of a student that keeps its model's own many-step sampler. `guided`: the arguments of the pipeline's call that guide as `sampling` does."""
    name, size, steps, guidance = info.base_model.rpartition("/")[2], info.size, len(sampling.levels), sampling.guidance
    inside = ""
    if sampling.guidance_scales is not None:
        w, skip = sampling.guidance_scales
        inside = (
            f"Guidance {w:g}{f' and skip-layer guidance {skip:g}' if skip else ''} is in these weights, one scale of a range that the student was trained"
            " on: `instep export RUN --to FOLDER --guidance W` folds in another.\n\n"
        )
    arguments = ", ".join(f"{key}={value:g}" for key, value in (guided or {"guidance_scale": guidance}).items())
    usage = (
        f"import torch\nfrom diffusers import DiffusionPipeline\n{_loads(info)}\n"
        'pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER", dtype=torch.float32)\n'
        f"{_medium(task)} = pipe({_asked(info, guided=guidance != 1)}, num_inference_steps={steps}, {arguments}, {_size_arguments(size, task)})"
        f"{_result(task)}\n"
    )
    return (
        f"---\nlibrary_name: diffusers\n---\n\n# {name}, aligned ({info.recipe})\n\n`{info.base_model}` after the recipe `{info.recipe}` of instep"
        f" {info.instep_version}{_taught(info)}: still a many-step model with its own scheduler, trained with {steps} steps and guidance {guidance:g}.\n\n"
        f"{inside}{_inside(info) if info.styles else ''}## Use\n\n```python\n{usage}```\n\nThe pipeline's scheduler takes other levels"
        " than training did for the same number of steps: at few steps take some more.\n\nTo make a few-step student of it: `instep train dmd2 --model"
        f" THIS_FOLDER --prompts PROMPTS --size {size.height} {size.width} {size.frames}`.\n\n"
        f"## Training\n\n- recipe: `{info.recipe}`\n- prompts: {info.training_prompts}\n- seed: {info.seed}\n\n```\n{info.command}\n```\n"
    )


def _asked(info: ExportInfo, guided: bool = False) -> str:
    """Arguments of the pipeline's call, with guidance also the negative prompt; an image file is shown by its name alone, to keep its folder private."""
    prompt = info.example_prompt
    text, image = json.dumps(prompt.text), prompt.image
    negative = f", negative_prompt={json.dumps(prompt.negative, ensure_ascii=False)}" if guided and prompt.negative else ""
    if image is None:
        return text + negative
    return f"prompt={text}, image=load_image({json.dumps(Path(image).name if is_file_name(image) else 'first_frame.png')}){negative}"


def _loads(info: ExportInfo) -> str:
    return "" if info.example_prompt.image is None else "from diffusers.utils import load_image\n"


def _medium(task: Task) -> str:
    return "image" if task == "text-to-image" else "video"


def _result(task: Task) -> str:
    return ".images[0]" if task == "text-to-image" else ".frames[0]"


def _size_arguments(size: Size, task: Task) -> str:
    frames = "" if task == "text-to-image" else f", num_frames={size.frames}"
    return f"height={size.height}, width={size.width}{frames}"


def _head(info: ExportInfo, n: int, measured: Measured) -> str:
    text = (
        f"# {info.base_model.rpartition('/')[2]}, {n} step{'s' if n > 1 else ''} ({info.recipe})\n\nA {n}-step student"
        f" of `{info.base_model}`, distilled with the recipe `{info.recipe}` of instep {info.instep_version}{_taught(info)}: {n}"
        f" network evaluation{'s' if n > 1 else ''} a {_medium(measured.task)}, no guidance.\n"
    )
    if measured.lora:
        files = " and ".join(f"`{name}`" for name in measured.loras) or "`lora.safetensors`"
        text += (
            f"\n{files} {'are' if len(measured.loras) > 1 else 'is'} the same student as a LoRA on the base model (strength 1; diffusers"
            f"{' and ComfyUI read' if measured.comfyui_reads_lora else ' reads'} it).\n"
        )
    return text


def _taught(info: ExportInfo) -> str:
    return f", taught by `{info.teacher}`" if info.teacher else ""


def _training(info: ExportInfo, levels: Sequence[float]) -> str:
    return (
        f"## Training\n\n- recipe: `{info.recipe}`\n- prompts: {info.training_prompts}\n- seed: {info.seed}\n- levels:"
        f" {list(levels)}\n- size: {info.size.height} x {info.size.width}, {info.size.frames}"
        f" frames\n\n```\n{info.command}\n```\n"
    )


def _front_matter(info: ExportInfo, measured: Measured) -> str:
    # a JSON string is also a valid YAML string, so no further quoting is needed
    lines = ["---", "library_name: diffusers", f"pipeline_tag: {measured.task}"]
    if info.base_model.count("/") == 1:
        lines += [f"base_model: {json.dumps(info.base_model)}", "base_model_relation: finetune"]
    lines += [
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in (measured.task, "distillation", "few-step", "instep", info.recipe)),
    ]
    if measured.lora:
        lines.append("- lora")
    return "\n".join([*lines, "---", ""])


def _usage(info: ExportInfo, levels: Sequence[float], measured: Measured) -> str:
    n, size = len(levels), info.size
    steps, guidance = measured.usual
    unguided = ", ".join(f"{name}={value:.1f}" for name, value in measured.unguided.items())
    if measured.passes_generator:
        seeding, argument = "", "generator=torch.Generator().manual_seed(0), "
        repeat = "- `generator=` makes a sample repeatable: the pipeline hands it on to `scheduler.step`, which draws the noise of every later step."
    else:
        seeding, argument = "torch.manual_seed(0)  # and not generator=: see below\n", ""
        repeat = (
            "- `torch.manual_seed(...)` makes a sample repeatable. A `generator=` alone does not: this pipeline does not pass it on\n"
            "  to `scheduler.step`, which draws the noise of every later step."
        )
    if measured.scheduler == "LCMScheduler":
        repeat += (
            f"\n- The scheduler is a stock `LCMScheduler` with this model's own table of noise levels. For {n} step{'s' if n > 1 else ''} it predicts the clean"
            f" {_medium(measured.task)} and noises\n  it anew; its boundary condition is scaled away."
        )
    return f"""## Use

```python
import torch
from diffusers import DiffusionPipeline
{"" if measured.task == "text-to-image" else "from diffusers.utils import export_to_gif"}
{_loads(info)}
# "." is this folder; a hub id works as well
pipe = DiffusionPipeline.from_pretrained(".", torch_dtype=torch.{measured.dtype})
{seeding}{_medium(measured.task)} = pipe(
    {_asked(info)},
    {_size_arguments(size, measured.task)},
    num_inference_steps={n}, {unguided}, {argument}output_type="pil",
){_result(measured.task)}
{'image.save("image.png")' if measured.task == "text-to-image" else 'export_to_gif(video, "video.gif", fps=8)'}
```

- `num_inference_steps={n}` and `{unguided}` must be given: the pipeline's own defaults are {steps} and {guidance:g}. The
  scheduler in this folder yields the student's levels for {n} step{"s" if n > 1 else ""} and for no other number.
{repeat}
"""


def _inside(info: ExportInfo) -> str:
    """What adapters the networks hold."""
    names, them = " and ".join(f"`{style.name}`" for style in info.styles), "it" if len(info.styles) == 1 else "them"
    return (
        f"The pipeline that this student was trained on carried {'; '.join(map(str, info.styles))}. Its teacher was the model with {them}, so the networks in "
        f"this folder hold {names}: do not load {them} again.\n\n"
    )


def _styles(info: ExportInfo, measured: Measured) -> str:
    """The section on adapters inside, and how the student's own file is loaded beside them."""
    text = f"## Inside\n\n{_inside(info)}"
    if not measured.lora:
        return text
    loads = "\n".join(f'pipe.load_lora_weights("{style.name}.safetensors", adapter_name="{style.name}")' for style in info.styles)
    files = {name: "few_step" + (f"_{i + 1}" if i else "") for i, name in enumerate(measured.loras or ("lora.safetensors",))}
    steps = "\n".join(
        f'pipe.load_lora_weights(".", weight_name="{file}", adapter_name="{name}"{", load_into_transformer_2=True" if i else ""})'
        for i, (file, name) in enumerate(files.items())
    )
    names = [*(style.name for style in info.styles), *files.values()]
    scales = ", ".join(f"{scale:g}" for scale in [*(style.scale[1] for style in info.styles), *[1.0] * len(files)])
    return (
        f"{text}The LoRA holds the steps alone. On the plain base model, with this folder's scheduler, it needs "
        f"{'the style' if len(info.styles) == 1 else 'the styles'} beside it, and both together draw what this folder draws:\n\n"
        f"```python\n{loads}\n{steps}\npipe.set_adapters({json.dumps(names)}, [{scales}])\n```\n\nOther styles and strengths can take the place of these; the "
        "student was not trained with them.\n"
    )


def _measured(info: ExportInfo, measured: Measured) -> str:
    text = (
        "## Measured\n\n- Stock diffusers against the training library's sampler, same weights, same noise: largest"
        f" difference of a latent {measured.sampler_difference:.1e} (float32).\n- This folder against the student in"
        f" memory (weights in {measured.dtype} here): {measured.student_difference:.1e}.\n"
    )
    if info.metrics is None:
        return text + "- Quality was not measured for this export.\n"
    row = info.metrics
    text += f"\n{row['name']}: {row['n']} samples, {row['nfe']} network evaluations a sample; value ± standard error.\n\n| metric | value |\n|---|---|\n"
    for key, entry in row["values"].items():
        se = entry.get("se")
        text += f"| {key} | {entry['value']:.4g}{'' if se is None else f' ± {se:.2g}'} |\n"
    return text


def _comfyui(levels: Sequence[float], measured: Measured) -> str:
    n = len(levels)
    text = "## ComfyUI\n\n"
    if measured.comfyui_difference is None or measured.comfyui_shift is None:
        return text + f"No workflow is included: there is none for a {measured.pipeline}.\n"
    if measured.comfyui_obstacle:
        return text + f"ComfyUI cannot run this model: {measured.comfyui_obstacle}. `comfyui_workflow.json` shows the settings it would need.\n"
    file = (
        "put `lora.safetensors` into models/loras and the base model into models/diffusion_models"
        if measured.lora
        else ("put `comfyui_diffusion_model.safetensors` (this student under the names ComfyUI reads) into models/diffusion_models")
    )
    if measured.comfyui_difference > LEVELS_EQUAL:
        return (
            text + f"No workflow is included: the levels {list(levels)} are not uniform-then-shifted, and scheduler `simple`"
            f" would miss them by up to {measured.comfyui_difference:.2g} (at shift {measured.comfyui_shift:g}).\n"
        )
    exact = "equals" if measured.comfyui_difference < 1e-5 else f"differs by at most {measured.comfyui_difference:.1g} from"
    return (
        text + f"Drop `comfyui_workflow.json` on the window; {file}. The settings: ModelSamplingSD3 shift"
        f" {measured.comfyui_shift:g}, sampler `lcm`, scheduler `simple`, {n} step{'s' if n > 1 else ''}, cfg 1. With"
        f" them ComfyUI's list of levels {exact} the one this student was trained on. ComfyUI draws its noise"
        " differently, so the same seed gives another video than diffusers. The workflow was generated, not run"
        " there.\n"
    )


def _limits(info: ExportInfo, levels: Sequence[float]) -> str:
    n, size = len(levels), info.size
    return f"""## Limits

- Made for {n} step{"s" if n > 1 else ""} without guidance; a negative prompt does nothing at guidance 1.
- Trained and checked at {size.height} x {size.width}, {size.frames} frames, on {info.training_prompts} prompts;
  other sizes and kinds of prompt were not tried.
- The licence and the limits of its base model apply to it.
"""
