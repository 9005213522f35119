"""Model families: one file a family behind one protocol, and the roles that run on their networks. `load` imports a family only when it is asked for; the
room may import `data`, `methods`, `diffusion` and `core`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instep.core.size import VideoSize, as_size

if TYPE_CHECKING:
    from instep.models.family import Family

MOVING_DIGITS = "moving-digits"
MOVING_DIGITS_I2V = "moving-digits-i2v"
DIGITS = "digits"
BUNDLED = (MOVING_DIGITS, DIGITS, MOVING_DIGITS_I2V)


MOVING_DIGITS_SIZE = VideoSize(48, 48, 9)


def bundled(name: str) -> Path:
    """Folder of a model that ships with the package."""
    return Path(str(files("instep"))) / "bundled" / "assets" / name


def load(model: str, size: VideoSize | Sequence[int] | None = None) -> Family:
    """The family of `model`: the bundled `moving-digits`, `moving-digits-i2v` or `digits`, a diffusers pipeline folder, or the parts of a class-conditional DiT
    (transformer/ and scheduler/, without an index: no stock pipeline samples it).

    Raises ValueError if the folder is not there, lacks a part, or holds a pipeline that no family knows, and for a `size` where the network has its own.
    """
    size = None if size is None else as_size(size)
    if model == MOVING_DIGITS_I2V:
        from instep.bundled.moving_digits_i2v import MovingDigitsImageFamily, bundled_pipeline

        return MovingDigitsImageFamily(bundled_pipeline(), size or MOVING_DIGITS_SIZE, model, str(bundled(model)))
    folder = bundled(model) if model in BUNDLED else Path(model)
    index = folder / "model_index.json"
    if not index.is_file() and _class_of(folder / "transformer" / "config.json") == "DiTTransformer2DModel":
        from instep.models.dit import DiTFamily

        family = DiTFamily.load(folder, name=_name(model, folder))
        if size not in (None, family.size):
            raise ValueError(f"size: {size} is not allowed; {family.name} draws {family.size.height} x {family.size.width} images; leave the size out")
        return family
    if not index.is_file():
        raise ValueError(
            f"model: {model!r} is not a model folder ({index} is missing); allowed: {', '.join(map(repr, BUNDLED))}, or the path of a "
            "diffusers pipeline folder as save_pretrained writes it"
        )
    record = _export_record(folder)
    if record and record.get("sampler", "few-step") == "few-step":
        raise ValueError(
            f"model: {folder} is a few-step student ({len(record['levels'])} steps), which cannot serve as a many-step teacher; give the model it was made "
            "from, or with --start-from its run to go on training it"
        )
    if record and size is None:
        size = VideoSize(**record["info"]["size"])
    parts = {k: v for k, v in json.loads(index.read_text()).items() if isinstance(v, list) and v[0] is not None}
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise ValueError(f"model: {folder} lacks the part {missing[0]!r} that its model_index.json names; copy or download it again")
    kind = json.loads(index.read_text()).get("_class_name")
    if kind == "WanPipeline":
        from instep.models.wan import WanFamily

        chosen = size or (MOVING_DIGITS_SIZE if model == MOVING_DIGITS else VideoSize())
        return WanFamily.load(folder, chosen, name=_name(model, folder))
    if kind == "WanImageToVideoPipeline":
        from instep.models.wan_i2v import WanImageFamily

        if record and record.get("info", {}).get("base_model") == MOVING_DIGITS_I2V:
            from instep.bundled.moving_digits_i2v import MovingDigitsImageFamily

            return MovingDigitsImageFamily.load(folder, size or VideoSize(), name=_name(model, folder))
        return WanImageFamily.load(folder, size or VideoSize(), name=_name(model, folder))
    if kind == "CogVideoXPipeline":
        from instep.models.cogvideox import CogVideoXFamily

        return CogVideoXFamily.load(folder, size, name=_name(model, folder))
    raise ValueError(f"model: {folder} holds a {kind}, which no family knows yet; allowed: WanPipeline, WanImageToVideoPipeline, CogVideoXPipeline")


def family_of(pipe: Any, size: VideoSize | Sequence[int] | None = None) -> Family:
    """Wrap a diffusers pipeline in its family, at `size` or the model's own. Raises ValueError for a pipeline that no family knows."""
    kind, source = type(pipe).__name__, str(getattr(pipe, "name_or_path", None) or "")
    name = _name("", Path(source)) if source else kind
    chosen = None if size is None else as_size(size)
    if kind == "WanPipeline":
        from instep.models.wan import WanFamily

        return WanFamily(pipe, chosen or VideoSize(), name, source)
    if kind == "WanImageToVideoPipeline":
        from instep.models.wan_i2v import WanImageFamily

        return WanImageFamily(pipe, chosen or VideoSize(), name, source)
    if kind == "CogVideoXPipeline":
        from instep.models.cogvideox import CogVideoXFamily

        return CogVideoXFamily(pipe, chosen, name, source)
    raise ValueError(f"family: {kind} is not a pipeline that a family knows; allowed: WanPipeline, WanImageToVideoPipeline, CogVideoXPipeline")


def _name(model: str, folder: Path) -> str:
    """Of a family: a bundled model's, or its folder's, which may not pass for a bundled one."""
    if model in BUNDLED:
        return model
    return folder.name if folder.name not in BUNDLED else str(folder)


def _export_record(folder: Path) -> dict | None:
    """What an export of ours says of itself; None of any other folder."""
    file = folder / "instep_export.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _class_of(config: Path) -> str | None:
    """The class that a diffusers config.json names; None without such a file."""
    return json.loads(config.read_text()).get("_class_name") if config.is_file() else None
