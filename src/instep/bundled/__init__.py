"""The miniature worlds that ship with the package: weights, grammar, classifiers, prompts and their evaluation. It may import every room below the
command line except the laboratory and human evaluation; no other room names a bundled model. A world registers itself by its line in `WORLDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from instep.core.json_files import read_object
from instep.core.size import Size, as_size

if TYPE_CHECKING:
    from instep.bundled.world import World
    from instep.models.family import Family
    from instep.models.preset import ModelSettings


class Entry(NamedTuple):
    """One bundled world: what it is, in a clause, and where its `World` stands, as module:name."""

    about: str
    where: str


def folder_of(name: str) -> Path:
    """Folder of a model that ships with the package."""
    return Path(__file__).parent / "assets" / name


MOVING_DIGITS, DIGITS, MOVING_DIGITS_I2V, MOVING_WORDS = "moving-digits", "digits", "moving-digits-i2v", "moving-words"
_ENTRIES = {
    MOVING_DIGITS: Entry("videos", "instep.bundled.worlds:MOVING_DIGITS_WORLD"),
    DIGITS: Entry("class-conditional 8 x 8 images", "instep.bundled.worlds:DIGITS_WORLD"),
    MOVING_DIGITS_I2V: Entry("videos from their first frame", "instep.bundled.worlds:MOVING_DIGITS_I2V_WORLD"),
    MOVING_WORDS: Entry("videos of a word", "instep.bundled.moving_words:MOVING_WORDS_WORLD"),
}


def with_weights(folder_of: Callable[[str], Path]) -> dict[str, Entry]:
    """The worlds whose networks are in their folders; one without is not there for any command."""
    return {name: entry for name, entry in _ENTRIES.items() if (folder_of(name) / "transformer").is_dir()}


WORLDS = with_weights(folder_of)
NAMES = tuple(WORLDS)
DEFAULT = MOVING_DIGITS
LISTED = ", ".join(NAMES)
DESCRIBED = ", ".join(f"{name} ({entry.about})" for name, entry in WORLDS.items())


def find(name: str) -> World:
    """The bundled world of that name, imported now; ValueError for a name that is none."""
    if name not in WORLDS:
        raise ValueError(f"world: {name!r} is not bundled; allowed: {LISTED}")
    module, attribute = WORLDS[name].where.split(":")
    return getattr(import_module(module), attribute)


def load(model: str | Path, size: Size | Sequence[int] | None = None, dtype: torch.dtype = torch.float32, variant: str | None = None) -> Family:
    """The family of a bundled model by its name, or of a folder, as `instep.models.load` reads it. A folder may not pass for a bundled model: if it has the
    name of one, the family is called by its whole path. `dtype` and `variant`: of a folder's networks; a bundled model is loaded in float32.
    """
    size = None if size is None else as_size(size)
    if model in WORLDS:
        return find(str(model)).load(size)
    from instep import models

    folder = Path(model)
    if not folder.exists() and len(folder.parts) == 1:
        raise ValueError(
            f"model: {str(model)!r} is not a model folder; allowed: {LISTED}, or the path of a diffusers pipeline folder as save_pretrained writes it"
        )
    family = models.load(folder, size, name=str(folder) if folder.name in WORLDS else None, dtype=dtype, variant=variant)
    base = base_model(folder)
    return find(base).adopt(family) if base in WORLDS else family


def settings_of(model: str | Path) -> ModelSettings | None:
    """The settings that recipes begin from on a bundled model, a published size or the model in a folder, without loading it.

    None for what is neither, which loading the model refuses. Raises ValueError for a pipeline that no family knows.
    """
    from instep.models.folder import settings_in
    from instep.models.index import is_model_folder
    from instep.models.outline import PUBLISHED, settings_of_size

    folder = Path(model)
    world = model if model in WORLDS else base_model(folder)
    if world in WORLDS:
        from instep.bundled.presets import preset_of
        from instep.models.preset import ModelSettings

        return ModelSettings(preset_of(str(world)), None)
    if model in PUBLISHED:
        return settings_of_size(str(model))
    return settings_in(folder) if is_model_folder(folder) else None


def base_model(folder: Path) -> str | None:
    """The model that a folder was tuned from, if it is an export of a run; else None."""
    file = folder / "instep_export.json"
    info = read_object(file, "model", "export the student again").get("info") if file.is_file() else None
    return info.get("base_model") if isinstance(info, dict) else None
