"""The record of a run: what makes it this run and no other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from instep.core import lock
from instep.core.disk import check_disk
from instep.core.files import write_json
from instep.core.fingerprint import weights_fingerprint
from instep.core.json_files import read_object
from instep.core.unusable import named
from instep.core.user_code import sources_in
from instep.core.version import __version__
from instep.data import latent_cache
from instep.data.first_frame import digest
from instep.data.prompt import Prompt
from instep.data.samples import PairSamples, RealSamples
from instep.methods.recipe import Recipe, describe
from instep.models.family import Family
from instep.rewards.base import Reward
from instep.training.disk import disk_bytes

if TYPE_CHECKING:
    from instep.training.options import RunOptions

DAMAGED = "restore it from a copy of the run, or choose another folder"
# of the files in a run's folder: raised whenever a run that an older version began could not be gone on with to the same result
FORMAT = 1
# options of an execution that a run goes on with
OPTIONS = ("dtype", "moments")
# what older records lack
UNRECORDED = ("moments", "reward_source", "other_weights", "size")
# changed fields that a message names
MOST = 3


def write_manifest(
    out: Path,
    recipe: Recipe,
    family: Family,
    options: RunOptions,
    prompts: Sequence[Prompt],
    start_from: Path | str | None,
    command: str,
    *,
    reward: Reward | None = None,
    real: RealSamples | None = None,
    pairs: PairSamples | None = None,
    negative_prompt: str | None = None,
    teacher: Family | None = None,
) -> None:
    """Writes recipe.json, or makes sure that the folder holds this very run."""
    named = [*prompts, *(real.prompts if real else ()), *(pairs.prompts if pairs else ())]
    identity = {
        "format": FORMAT,
        "recipe": recipe.name,
        "model": family.name,
        "weights": weights_fingerprint(family.pretrained),
        "teacher": teacher and {"model": teacher.name, "weights": weights_fingerprint(teacher.pretrained)},
        "dtype": str(options.execution.dtype_of(family)).removeprefix("torch."),
        "moments": options.execution.moments,
        "styles": [style.json() for style in family.styles],
        "seed": options.seed,
        "levels": list(recipe.levels),
        "prompts": hashlib.sha256("\n".join(map(str, prompts)).encode()).hexdigest()[:16],
        "negative_prompt": negative_prompt,
        **({"first_frames": shown} if (shown := digest(named)) else {}),
        "reward": reward and reward.name,
        "reward_source": sources_in(reward),
        "size": dataclasses.asdict(family.size),
        "other_weights": other_weights(family),
        "real": real and _digest(real.prompts, real.latents),
        "pairs": pairs and _digest(pairs.prompts, pairs.chosen, pairs.rejected),
        "hold": {"probe_every": options.probe_interval, **{b.figure: b.fraction for b in options.hold}} if options.hold else None,
        "start_from": str(Path(start_from).resolve()) if start_from else None,
        **({"recipe_source": recipe.source} if recipe.source else {}),
        "config": _config(json.loads(json.dumps(describe(recipe)))),
    }
    about = {
        "instep": __version__,
        "command": command,
        "model_path": family.source,
        "variant": family.variant,
        "teacher_path": teacher and teacher.source,
        "loaded_in": str(family.dtype).removeprefix("torch."),
        "prompt_count": len(set(prompts)),
        "example_prompt": str(prompts[0]),
    }
    file = out / "recipe.json"
    begun = any((out / name).exists() for name in ("log.jsonl", "checkpoints", "teacher_samples.parts", "teacher_samples.safetensors"))
    there = read_object(file, "out", DAMAGED) if file.is_file() else {}
    # older runs have no record of the format, which was the first, of their dtype, which was float32, of moments, which loading a checkpoint compares, of
    # styles and another teacher, which they could not have, of options that are newer than they are, nor of some others
    if isinstance(there.get("config"), Mapping):
        there = {**there, "config": _config(with_new_options(there["config"], recipe))}
    before = {"format": 1, "dtype": "float32", "styles": [], "teacher": None, **{key: identity[key] for key in UNRECORDED}, **there}
    different = [key for key in identity if before.get(key) != identity[key]]
    if "instep" in there and (begun or not different):
        if different:
            raise ValueError(f"out: {out} holds another run ({_difference(before, {**about, **identity}, different)}); {_fix(before, different, out)}")
    # the record of a run that was refused before it began is replaced
    elif "instep" not in there and out.exists() and any(path.name not in (lock.NAME, latent_cache.FOLDER) for path in out.iterdir()):
        raise ValueError(f"out: {out} is not empty and holds no run; choose a new or an empty folder")
    else:
        sampled = "stored" in recipe.needs or ("real" in recipe.needs and real is None)
        check_disk(out, disk_bytes(recipe, family, options, sampled=sampled), "run")
        write_json(file, {**about, **identity})


def _config(described: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a recipe without where it is from, which is recorded by itself."""
    return {key: value for key, value in described.items() if key != "source"}


def with_new_options(there: Any, value: Any) -> Any:
    """The description `there` of a recipe, or of a part of it, with the fields of `value` that it lacks and that have their defaults: an option that is newer
    than a run was not used in it. One that is used now is missing still, and makes it another run."""
    if dataclasses.is_dataclass(value) and isinstance(there, Mapping):
        filled = dict(there)
        for each in dataclasses.fields(value):
            own = getattr(value, each.name)
            if each.name in there:
                filled[each.name] = with_new_options(there[each.name], own)
            elif own == (each.default if each.default_factory is dataclasses.MISSING else each.default_factory()):
                filled[each.name] = json.loads(json.dumps(describe(own)))
        return filled
    if isinstance(value, Mapping) and isinstance(there, Mapping):
        return {key: with_new_options(part, value[key]) if key in value else part for key, part in there.items()}
    if isinstance(value, tuple | list) and isinstance(there, list) and len(value) == len(there):
        return [with_new_options(part, own) for part, own in zip(there, value, strict=True)]
    return there


def _difference(there: Mapping[str, Any], here: Mapping[str, Any], different: Sequence[str]) -> str:
    """In which way a folder's run is another one. Weights that were rounded to another dtype differ for that reason alone."""
    if options := [key for key in OPTIONS if key in different]:
        explained = {*options, "weights", "other_weights"} if "dtype" in options else {*options}
        others = [key for key in different if key not in explained]
        found = [f"its {key}: {there[key]} there, {here[key]} now" for key in options]
        return "; ".join([*found, f"{', '.join(others)} too"] if others else found)
    was = f"it was {there['recipe']} with seed {there['seed']}"
    if "weights" in different:
        for key, did, preposition in (("loaded_in", "was loaded", "in"), ("model_path", "came", "from")):
            if there.get(key, here[key]) != here[key] and {*different} <= {"weights", "other_weights"}:
                return f"its {', '.join(different)} differ: its model {did} {preposition} {there[key]}, and this one {preposition} {here[key]}; {was}"
    found = [change for key in different for change in changes(there.get(key), here[key], key)]
    return f"its {', '.join(different)} differ: {named(found, MOST)}; {was}"


def changes(there: Any, here: Any, field: str) -> list[str]:
    """Each field that differs in two values of JSON, with both values."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        return [c for key in dict.fromkeys([*there, *here]) for c in changes(there.get(key), here.get(key), f"{field}.{key}")]
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        return [c for i, (a, b) in enumerate(zip(there, here, strict=True)) for c in changes(a, b, f"{field}[{i}]")]
    return [] if there == here else [f"{field} {_short(there)} there, {_short(here)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fix(there: Mapping[str, Any], different: Sequence[str], out: Path) -> str:
    if options := [key for key in OPTIONS if key in different]:
        values = " and ".join(f"{key} {there[key]}" for key in options)
        return f"to go on with it give {values} ({' '.join(f'--{key} {there[key]}' for key in options)}), or choose another folder"
    if "format" in different:
        return f"go on with instep {there['instep']}, which wrote it, or choose another folder"
    return (
        "choose another folder, or repeat that run's command to go on with it; to lengthen it, or to go on with other settings, begin another run from it: "
        f"--start-from {out} --out NEW"
    )


def other_weights(family: Family) -> dict[str, str]:
    """Digests of the pipeline's networks that are not trained (VAE, text encoders), by their names; empty without a pipeline."""
    components = {} if family.pipe is None else family.pipe.components
    return {name: weights_fingerprint(part) for name, part in components.items() if isinstance(part, nn.Module) and name not in family.denoisers}


def _digest(prompts: Sequence[Prompt], *latents: Tensor) -> str:
    """Of samples and their prompts; latents that are mapped from a file are read a few at a time."""
    digest = hashlib.sha256("\n".join(map(str, prompts)).encode())
    for part in (part for x in latents for part in x.detach().split(64)):
        digest.update(part.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
