"""The published settings of a model: how its card samples it, and how its published few-step distillation was trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from instep.diffusion.levels import check_levels, few_step_levels


@dataclass(frozen=True)
class Distillation:
    """The settings of a published few-step distillation of a model by distribution matching; None for what it does not publish.

    source: where the values stand, so that a reader can look them up. guidance, guidance_2: the teacher's, w of u + w (c - u); guidance_2 is that of the second
    expert. levels: the student's few-step list; shift: the timestep shift of these levels and of the re-noise levels. betas: of student and fake.
    fake_target: what the fake's error is measured in. batch: samples of a student update over all devices. critic_updates: updates of the fake for each of
    the student. lora_rank: rank of the student's adapter, where the learning rates are those of adapters.

    Raises ValueError for levels that are no few-step list, or that the shift does not give: a recipe is told the number of steps and the shift.
    """

    source: str
    guidance: float | None = None
    guidance_2: float | None = None
    levels: tuple[float, ...] | None = None
    shift: float | None = None
    student_lr: float | None = None
    fake_lr: float | None = None
    fake_target: Literal["velocity", "eps", "x0"] | None = None
    betas: tuple[float, float] | None = None
    student_weight_decay: float | None = None
    fake_weight_decay: float | None = None
    ema: float | None = None
    batch: int | None = None
    critic_updates: int | None = None
    lora_rank: int | None = None

    def __post_init__(self) -> None:
        if self.levels is None:
            return
        check_levels(self.levels)
        if self.shift is None:
            raise ValueError(f"shift: None is not allowed beside levels {list(self.levels)}; give the timestep shift that leads to them, 1 for even steps")
        expected = few_step_levels(len(self.levels), self.shift)
        if max(abs(a - b) for a, b in zip(self.levels, expected, strict=True)) > 1e-6:
            raise ValueError(
                f"levels: {list(self.levels)} is not allowed with shift {self.shift}, which gives {list(expected)}; give the shift of these levels, or leave "
                "both out"
            )


@dataclass(frozen=True)
class Preset:
    """What a model's card publishes about sampling it, and what is published about distilling it.

    source: where the values of sampling stand. guidance: w of u + w (c - u), 1 for none; guidance_2: of the second expert, where a model has two.
    sampler_steps: steps of the model's own sampler. negative_prompt: the one that the model's own recipe guides away from. distillation: None where none is
    published. micro_batch: samples that one device takes at once, as published, else 1 for models above a billion parameters; None: no bound.

    for_recipes: whether recipes begin from these settings; on a model for which they do not, the recipes' own defaults stand.
    """

    source: str
    guidance: float
    sampler_steps: int
    guidance_2: float | None = None
    negative_prompt: str | None = None
    distillation: Distillation | None = None
    micro_batch: int | None = None
    for_recipes: bool = True


@dataclass(frozen=True)
class ModelSettings:
    """What recipes begin from on a model: its published settings and the timestep shift of its own sampler, None where that was not read."""

    preset: Preset
    shift: float | None
