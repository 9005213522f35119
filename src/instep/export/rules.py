"""What an export refuses, one function a rule. An export calls them before it writes, and a run before its first step.

What ComfyUI cannot run is no reason to refuse: the card states it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from instep.core.json_files import read_object
from instep.core.outputs import check_output
from instep.core.unusable import Unusable, is_finite, named
from instep.export.scheduler import few_step_scheduler
from instep.models.adapters import Weight, has_adapter, lora_layers, plain_weights
from instep.models.family import Family

if TYPE_CHECKING:
    from instep.diffusion.sampling import Sampling

RECORD = "instep_export.json"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LONGEST = 255  # bytes of a file's name
TEMPORARY = 40  # of them for the name that a folder has while it is written


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises ValueError for a dtype that weights are not exported in."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype} is not allowed; allowed: {', '.join(map(str, DTYPES))}, None (keep)")


def check_target(out: Path, overwrite: bool = False) -> None:
    """Raises ValueError for a folder that holds something else than an export, or an export without `overwrite`; and for one that cannot be made.

    Of an earlier export only the files that instep wrote are replaced (`keep_others`).
    """
    if not out.name or len(os.fsencode(out.name)) > LONGEST - TEMPORARY:
        raise ValueError(f"out: the name {out.name!r} is not allowed for a new folder; it has 1 to {LONGEST - TEMPORARY} bytes; choose another")
    check_output("out", out, overwrite=overwrite, ours=lambda there: (there / RECORD).is_file(), empty=True)


def keep_others(out: Path, new: Path) -> None:
    """Lists the files of the export in `new` in its record, and copies the files of `out`, an earlier export, that instep did not write into it."""
    record: dict[str, Any] = json.loads((new / RECORD).read_text(encoding="utf-8"))
    names = sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file())
    (new / RECORD).write_text(json.dumps({**record, "files": names}, indent=2), encoding="utf-8")
    for path in others_in(out, names):
        there = new / path.relative_to(out)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, there)


def others_in(out: Path, new: Sequence[str] = ()) -> list[Path]:
    """The files in `out` that stay when an export replaces the one there: those that instep did not write and that have no name of `new`."""
    if not (out / RECORD).is_file():
        return []
    written = {*read_object(out / RECORD, "out", "choose another folder").get("files", ()), *new, RECORD}
    return [path for path in out.rglob("*") if path.is_file() and path.relative_to(out).as_posix() not in written]


def check_sampler(family: Family, sampling: Sampling) -> Any:
    """The scheduler of the exported pipeline: a stock one at the student's levels, or for a many-step student the pipeline's own.

    Raises ValueError if no stock scheduler samples at those levels, or if there is no stock pipeline for a many-step student.
    """
    if sampling.kind == "few-step":
        return few_step_scheduler(family.path, sampling.levels, family.prediction_type, even_sigmas=family.even_sigmas)
    if family.pipe is None:
        raise ValueError(
            f"model: {family.name} has no stock pipeline, and this recipe leaves a many-step model, which is exported as one; choose a recipe that distils"
        )
    return family.pipe.scheduler


def check_adapter(family: Family, network: nn.Module, adapter: str | None) -> dict[str, dict[str, Weight]]:
    """The plain weights of each part of `network`, with `adapter` merged; nothing is copied.

    Raises ValueError for LoRA layers where no adapter is named, for an adapter that is missing or not plain LoRA, and for a layer without a name in the file.
    """
    parts = family.parts(network)
    if adapter is not None:
        carrying = [name for name, part in parts.items() if has_adapter(part, adapter)]
        for name in carrying or list(parts)[:1]:  # without any, lora_layers raises the error
            for layer, _, _ in lora_layers(parts[name], adapter):
                family.lora_keys(name, layer)
    return {name: plain_weights(part, adapter) for name, part in parts.items()}


def check_finite(modules: Mapping[str, nn.Module]) -> None:
    """Raises Unusable if a weight of any of the networks is not finite, by their names."""
    bad = [f"{name}.{key}" for name, module in modules.items() for key, value in module.state_dict().items() if not is_finite(value)]
    if bad:
        raise Unusable(f"model: its weights {named(bad)} hold values that are not finite, so no sample of it is; load an intact copy of the model")


def networks(family: Family) -> dict[str, nn.Module]:
    """All networks of a family's pipeline by their component names, text encoders and VAE included."""
    bare = family.pipe is None
    components: Mapping[str, Any] = {**family.parts(family.pretrained), "vae": getattr(family, "vae", None)} if bare else family.pipe.components
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def check_run(family: Family, sampling: Sampling, out: Path, adapter: bool) -> None:
    """Everything that the export of a run's student refuses and that is known before its first step; see the rules above.

    adapter: whether the student is an adapter, which the run adds to the pretrained network. out: the folder that it is exported to.
    """
    check_sampler(family, sampling)
    if not adapter:
        check_adapter(family, family.pretrained, None)
    check_target(out, overwrite=True)
    check_finite(networks(family))
