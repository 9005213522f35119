"""A teacher that is another network than the student's: of another size, or fine-tuned, where both share latents, texts and levels."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from instep.core.quiet import quiet
from instep.models.family import Family
from instep.models.folder import family_in
from instep.models.index import INDEX, read_json
from instep.models.loading import check_folder, check_kind, load_network, parts_in

# what a configuration records besides what the network computes, and how the VAE is run
ASIDE = {
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "name_or_path",
    "force_upcast",
    "sample_size",
    "sample_height",
    "sample_width",
}
# values of a tensor that are compared
FEW = 8
Values = Mapping[str, Callable[[], Tensor]]


def teacher_in(folder: Path, student: Family, dtype: torch.dtype = torch.float32, variant: str | None = None) -> Family:
    """The network of a pipeline folder as the teacher of `student`, in `dtype`. VAE and text encoders are the student's; those of the folder are not loaded.

    Raises ValueError, before weights are loaded, where `check_agrees` would.
    """
    with as_teachers():
        check_kind(folder)
        kind = family_in(folder)
        check_folder(folder, variant)
    if student.pipe is None or not (folder / INDEX).is_file():
        return check_agrees(cast("Family", kind.load(folder, name=folder.name, dtype=dtype, variant=variant)), student)
    if not issubclass(type(student), kind):
        raise _refused(folder.name, f"it is read by {kind.__name__}, and the student by {type(student).__name__}", "give one of the student's family")
    for name, part in _encoders(student).items():
        if name in parts_in(folder):
            _check_part(folder.name, name, read_json(folder / name / "config.json"), part, _in_folder(folder / name))
    with quiet(), as_teachers():
        parts = {name: load_network(folder, name, dtype, variant) for name in kind.denoisers}
        scheduler = getattr(import_module("diffusers"), parts_in(folder)["scheduler"][1]).from_pretrained(folder / "scheduler", local_files_only=True)
    return _around(student, parts, scheduler, folder.name, str(folder))


@contextmanager
def as_teachers() -> Iterator[None]:
    """Errors about a model name the option teacher."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith("teacher:") else f"teacher: {text.removeprefix('model: ')}") from error


def as_teacher(given: Family, student: Family) -> Family:
    """A family's network as the teacher of `student`, at its size, around the student's VAE and text encoders; what was lent stays as it is.

    Raises ValueError where `check_agrees` would.
    """
    if type(given) is not type(student):
        raise _refused(given.name, f"it is a {type(given).__name__}, and the student a {type(student).__name__}", "give one of the student's family")
    if student.pipe is None:
        return check_agrees(given, student)
    theirs = _encoders(given)
    for name, part in _encoders(student).items():
        if name in theirs:
            _check_part(given.name, name, _config(theirs[name]), part, _in_memory(theirs[name]))
    made = _around(student, given.parts(given.pretrained), given.pipe.scheduler, given.name, given.source)
    made.styles = given.styles
    return made


def check_agrees(teacher: Family, student: Family) -> Family:
    """The teacher, if its latents, levels, prediction and conditions are the student's. Raises ValueError for the first that differs."""
    for what, theirs, ours in (
        ("latents [C, (F,) H, W]", teacher.latent_shape, student.latent_shape),
        ("prediction_type", teacher.prediction_type, student.prediction_type),
        ("noise levels", teacher.path, student.path),
        ("boundary of two experts", teacher.boundary, student.boundary),
        ("shape of a text", *_widths(teacher, student)),
    ):
        if theirs != ours:
            shown = "they differ" if what == "noise levels" else f"{theirs}, and the student's {ours}"
            raise _refused(teacher.name, f"its {what}: {shown}", "give a model that shares VAE, text encoders and scheduler with the student")
    return teacher


def _around(student: Family, parts: Mapping[str, nn.Module], scheduler: Any, name: str, source: str) -> Family:
    """A family of the student's kind around these networks, in which all other parts are the student's."""
    with as_teachers():
        made = student.with_pipe(student.pipeline(parts, scheduler=scheduler), student.size)
    made.name, made.source = name, source
    return check_agrees(made, student)


def _check_part(teacher: str, name: str, theirs: Mapping[str, Any], own: nn.Module, values: Values) -> None:
    """Raises ValueError if a part is configured otherwise than the student's own, or if it is a text encoder of other weights."""
    if conflict := _conflict(theirs, _config(own)):
        key, a, b = conflict
        raise _refused(teacher, f"the {key} of its {name} is {_short(a)}, and that of the student's {_short(b)}", "give a model that shares it")
    if name.startswith("text_encoder") and (other := _differing(own, values)):
        raise _refused(
            teacher, f"the weights of its {name} differ from the student's ({other})", "both read one encoding of a prompt; give a model that shares it"
        )


def _differing(own: nn.Module, values: Values) -> str | None:
    """The first tensor of which a few values differ by more than rounding; None: none does, as far as names agree."""
    for name, ours in own.state_dict().items():
        if name not in values or ours.is_meta or not ours.is_floating_point():
            continue
        theirs = values[name]()
        if theirs.is_meta:
            continue
        if theirs.shape != ours.shape or not torch.allclose(_few(theirs), _few(ours), rtol=2**-6, atol=1e-6):
            return name
    return None


def _few(x: Tensor) -> Tensor:
    flat = x.detach().flatten()
    return flat[:: max(1, len(flat) // FEW)][:FEW].float().cpu()


def _encoders(family: Family) -> dict[str, nn.Module]:
    """The parts around the denoiser that latents and texts depend on."""
    return {name: part for name, part in family.pipe.components.items() if isinstance(part, nn.Module) and name not in family.denoisers}


def _in_folder(folder: Path) -> Values:
    """The tensors of its safetensors files, mapped: of a tensor no more is read than is looked at."""
    found: dict[str, Callable[[], Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        there = safe_open(file, "pt")
        found |= {name: partial(there.get_tensor, name) for name in there.keys()}  # noqa: SIM118 (no mapping)
    return found


def _in_memory(part: nn.Module) -> Values:
    return {name: partial(_itself, value) for name, value in part.state_dict().items()}


def _itself(value: Tensor) -> Tensor:
    return value


def _config(part: Any) -> dict[str, Any]:
    config = part.config
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def _conflict(theirs: Any, ours: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key at which two configurations differ, with both values; keys that one of them lacks (other versions of a library) do not count."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        common = [k for k in theirs if k in ours and k not in ASIDE and not str(k).startswith("_")]
        return next((found for k in common if (found := _conflict(theirs[k], ours[k], str(k)))), None)
    # as JSON has them: tuples are lists
    a, b = (json.loads(json.dumps(value, default=str)) for value in (theirs, ours))
    return None if a == b else (key, a, b)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _widths(teacher: Family, student: Family) -> tuple[str, str]:
    """Name and shape, without the batch, of the first tensor in which the conditions of the two differ; empty where none does."""
    theirs, ours = ({field.name: getattr(one, field.name) for field in dataclasses.fields(one)} for one in (teacher.blank(1)[0], student.blank(1)[0]))
    for name, value in ours.items():
        a, b = (list(x.shape[1:]) if isinstance(x, Tensor) else None for x in (theirs.get(name), value))
        if a != b:
            return f"{name} {a}", f"{name} {b}"
    return "", ""


def _refused(teacher: str, why: str, fix: str) -> ValueError:
    return ValueError(f"teacher: {teacher} cannot teach this student: {why}; {fix}")
