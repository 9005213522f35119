"""The models that `instep eval --prompts` measures: pipelines and students through stock diffusers, class-conditional ones, which have no stock pipeline,
through the package's own sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from instep.bundled import WORLDS, folder_of, load
from instep.bundled.baselines import noise_for
from instep.cli.sample import Settings, family_in, find_pipeline, sampling_settings
from instep.core.size import Size
from instep.data.prompt import Prompt
from instep.diffusion.sampling import Sampling, sample_ode
from instep.models.backbone import Backbone
from instep.models.family import Family
from instep.models.index import is_model_folder, read_json
from instep.models.loading import check_folder
from instep.models.outline import outline
from instep.models.role import Role


@dataclass(frozen=True)
class Measured:
    """A model on its device, with its export record where it is a student, and how it is sampled."""

    family: Family
    record: dict | None
    settings: Settings

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], seed: int) -> Tensor:
        """Media [B, 3, (F,) H, W] in [0, 1]."""
        family, settings = self.family, self.settings
        if family.pipe is not None:
            torch.manual_seed(seed)
            drawn = family.stock_sample(
                family.pipe, list(prompts), steps=settings.steps, guidance=settings.guidance, guidance_2=settings.guidance_2, output="media"
            )
            return drawn.clamp(0, 1)
        network = Role("student", Backbone(family, family.pretrained))
        noise, rng = noise_for(family, prompts, seed)
        noise, cond, null = noise.to(family.device), family.encode(prompts), family.unconditional(prompts)
        if self.record is not None:
            levels = tuple(self.record["levels"])
            sampling = Sampling(levels) if self.record.get("sampler", "few-step") == "few-step" else Sampling(levels, "ode", settings.guidance)
            return family.decode(sampling(network, cond, null, noise, family.path, rng)).clamp(0, 1)
        drawn = sample_ode(network, cond, null, noise, steps=settings.steps, path=family.path, shift=family.shift, guidance=settings.guidance)
        return family.decode(drawn).clamp(0, 1)


def open_model(name: str, size: Size | None, steps: int | None, guidance: float | None, device: str) -> Measured:
    """Loads the run's student, exported student, pipeline or bundled model of that name. ValueError where it cannot be sampled so."""
    folder, record, parts = _found(name)
    settings = sampling_settings(name, folder, record, steps, guidance)
    family = load(name if name in WORLDS else folder, size) if parts else family_in(name, folder, record, size)
    if family.pipe is None:
        return Measured(family.placed(device), record, settings)
    family.pipe.to(device)
    return Measured(family, record, settings)


def check_model(name: str, prompts: Sequence[Prompt], size: Size | None, steps: int | None, guidance: float | None) -> None:
    """Raises ValueError for a model that `open_model` could not load or sample, from its configurations alone: no weights of a folder are read."""
    folder, record, parts = _found(name)
    sampling_settings(name, folder, record, steps, guidance)
    if parts or name in WORLDS or (record is not None and record["info"]["base_model"] in WORLDS):
        # small, and bundled ones have first frames of their own
        family = load(name if name in WORLDS else folder, size) if parts else family_in(name, folder, record, size)
    else:
        check_folder(folder)
        family = outline(folder, size or (Size(**record["info"]["size"]) if record else None))
    family.check_prompts(prompts)
    if parts:
        family.encode(prompts)


def _found(name: str) -> tuple[Path, dict | None, bool]:
    """The folder of a model, its export record, and whether it holds the parts of a model without a stock pipeline."""
    folder = folder_of(name) if name in WORLDS else Path(name)
    for one in (folder / "student", folder):
        if is_model_folder(one) and not (one / "model_index.json").is_file():
            return one, read_json(one / "instep_export.json") or None, True
    return *find_pipeline(name), False
