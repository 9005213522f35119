"""Model families: one file a family behind one protocol, and the roles that run on their networks. `load` imports a family only when it is asked for; the
room may import `data`, `methods`, `diffusion` and `core`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from instep.core.size import Size, as_size
from instep.models.families import family_of
from instep.models.folder import family_in
from instep.models.index import INDEX, read_json
from instep.models.loading import check_folder, check_kind

__all__ = ["family_of", "load"]

if TYPE_CHECKING:
    from instep.models.family import Family


def load(
    model: str | Path,
    size: Size | Sequence[int] | None = None,
    *,
    name: str | None = None,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Family:
    """The family of a diffusers pipeline folder, or of the parts of a class-conditional DiT (transformer/ and scheduler/, without an index: no stock pipeline
    samples it). `name` is what the family is called, by default as its folder; `dtype` that of its networks (the VAE's is float32). `variant`: the word in
    the names of the files to load, fp16 for model.fp16.safetensors, as in diffusers.

    Raises ValueError if the folder is not there, lacks a part, a file or a tensor, or holds a pipeline that no family knows (`models/loading.py`), and for a
    `size` where the network has its own. A pickle is never opened.
    """
    size = None if size is None else as_size(size)
    folder = Path(model)
    name = name or folder.name
    check_kind(folder)
    family = family_in(folder)
    if not (folder / INDEX).is_file():
        check_folder(folder, variant)
        images = cast("Family", family.load(folder, name=name, dtype=dtype, variant=variant))
        if size not in (None, images.size):
            raise ValueError(f"size: {size} is not allowed; {images.name} draws {images.size.height} x {images.size.width} images; leave the size out")
        return images
    record = read_json(folder / "instep_export.json")
    if record and record.get("sampler", "few-step") == "few-step":
        raise ValueError(
            f"model: {folder} is a few-step student ({len(record['levels'])} steps), which cannot serve as a many-step teacher; give the model it was made "
            "from, or with --start-from its run to go on training it"
        )
    if record and size is None:
        size = Size(**record["info"]["size"])
    check_folder(folder, variant)
    return cast("Family", family.load(folder, size, name=name, dtype=dtype, variant=variant))
