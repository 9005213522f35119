"""The published settings of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """What a model's card or paper publishes about sampling and distilling it.

    source: where the values stand. guidance: w of u + w (c - u), 1 for none; guidance_2: of the second expert, where a model has two. sampler_steps: steps of
    the model's own sampler. negative_prompt: the one that the model's own recipe guides away from. levels: a published few-step list. student_lr, fake_lr,
    betas, ema, batch: of a published distillation; None where there is none.
    """

    source: str
    guidance: float
    sampler_steps: int
    guidance_2: float | None = None
    negative_prompt: str | None = None
    levels: tuple[float, ...] | None = None
    student_lr: float | None = None
    fake_lr: float | None = None
    betas: tuple[float, float] | None = None
    ema: float | None = None
    batch: int | None = None
