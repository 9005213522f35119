"""The list of families: which class reads which diffusers pipeline. A new family is one file in this room and its line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from instep.core.size import Size
from instep.models.pipeline_family import PipelineFamily

if TYPE_CHECKING:
    from instep.models.family import Family

# the pipeline's class in diffusers -> the families that read it, as module:class; the first that accepts a pipeline's parts takes it
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "WanPipeline": ("instep.models.wan:WanFamily", "instep.models.wan22:Wan22Family", "instep.models.wan22_ti2v:TI2VFamily"),
    "WanImageToVideoPipeline": (
        "instep.models.wan_i2v:WanImageFamily",
        "instep.models.wan21_i2v:Wan21ImageFamily",
        "instep.models.wan22_i2v:Wan22ImageFamily",
        "instep.models.wan22_ti2v:TI2VImageFamily",
    ),
    "StableDiffusion3Pipeline": ("instep.models.sd3:SD3Family",),
    "StableDiffusionXLPipeline": ("instep.models.sdxl:SDXLFamily",),
    "ZImagePipeline": ("instep.models.z_image:ZImageFamily",),
    "FluxPipeline": ("instep.models.flux:FluxFamily",),
    "Flux2KleinPipeline": ("instep.models.flux2_klein:Flux2KleinBaseFamily", "instep.models.flux2_klein:Flux2KleinFamily"),
    "QwenImagePipeline": ("instep.models.qwen_image:QwenImageFamily",),
    "DiTPipeline": ("instep.models.latent_dit:LatentDiTFamily",),
    "CogVideoXPipeline": ("instep.models.cogvideox:CogVideoXFamily",),
}


def family_class(kind: str, parts: Mapping[str, Any]) -> type[PipelineFamily]:
    """The family of a pipeline class by its name and its parts and options (model_index.json, or `parts_of` a pipeline); ValueError for one that no family
    knows."""
    for entry in FAMILIES.get(kind, ()):
        module, _, name = entry.partition(":")
        found: type[PipelineFamily] = getattr(import_module(module), name)
        if found.accepts(parts):
            return found
    known = "of a variant that no family knows" if kind in FAMILIES else "which no family knows yet"
    raise ValueError(f"model: it is a {kind}, {known}; allowed: {', '.join(FAMILIES)}")


def parts_of(pipe: Any) -> dict[str, Any]:
    """A pipeline's components, and the options of its class (Wan's `expand_timesteps`), as model_index.json lists them."""
    return {**pipe.config, **pipe.components}


def family_of(pipe: Any, size: Size | Sequence[int] | None = None, name: str = "", source: str = "") -> Family:
    """Wrap a diffusers pipeline in its family, at `size` or the model's own; its networks are frozen and put into eval mode.

    Raises ValueError for a pipeline that no family knows.
    """
    kind, source = type(pipe).__name__, source or str(getattr(pipe, "name_or_path", None) or "")
    if kind not in FAMILIES:
        raise ValueError(f"family: {kind} is not a pipeline that a family knows; allowed: {', '.join(FAMILIES)}")
    # each class in the list adds what the base leaves to it
    return cast("Family", family_class(kind, parts_of(pipe))(pipe, size, name or Path(source).name or kind, source))
