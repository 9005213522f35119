"""What a model folder lacks, from names, JSON and the headers of its files, before a weight is read; and its networks, no tensor of which is left to chance."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from instep.core.tensor_file import check_whole
from instep.models.index import INDEX, is_model_folder, read_json

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# files of weights that run code when they are opened, or that are no tensors
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# parts of a pipeline without weights, by words of their classes
WITHOUT_WEIGHTS = ("Tokenizer", "Processor", "Extractor", "Scheduler")
AGAIN = "copy or download it again"


def check_kind(folder: Path) -> None:
    """Raises ValueError for what is no folder of a pipeline, nor of the parts of a DiT."""
    if is_model_folder(folder):
        return
    diffusers_folder = "give the path of a diffusers pipeline folder as save_pretrained writes it"
    if folder.is_file():
        raise ValueError(
            f"model: {str(folder)!r} is a file, and a model is a folder; open a single-file checkpoint in diffusers (from_single_file), "
            "save_pretrained(FOLDER), and give FOLDER"
        )
    if not folder.is_dir() and HUB_ID.fullmatch(str(folder)):
        name = folder.name
        raise ValueError(f"model: {str(folder)!r} is not a model folder; if it is a name on the hub: hf download {folder} --local-dir {name}, then give {name}")
    if not folder.is_dir():
        raise ValueError(f"model: {str(folder)!r} is not a model folder, nor the name of a bundled model; {diffusers_folder}")
    config = read_json(folder / "config.json")
    if config.get("_class_name") or config.get("architectures"):
        kind = config.get("_class_name") or config["architectures"][0]
        raise ValueError(
            f"model: {str(folder)!r} is not a model folder but holds a {kind} alone; put it in its place in a copy of its pipeline's folder, beside "
            "model_index.json, and give that"
        )
    if file := next((file.name for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".gguf", *PICKLES)), None):
        raise ValueError(
            f"model: {str(folder)!r} is not a model folder ({INDEX} is missing); open {file} in diffusers (from_single_file), save_pretrained(FOLDER), and "
            "give FOLDER"
        )
    raise ValueError(f"model: {str(folder)!r} is not a model folder ({INDEX} is missing); {diffusers_folder}")


def check_folder(folder: Path, variant: str | None = None) -> None:
    """Raises ValueError, with the fix, for a part or a file of weights that is missing, cut short or a pickle.

    `variant` as in diffusers: the word in the names of the files, model.fp16.safetensors.
    """
    if not (folder / INDEX).is_file():
        check_weights(folder / "transformer", variant)
        return
    for name, (_, kind) in parts_in(folder).items():
        if not (folder / name).is_dir():
            raise ValueError(f"model: {folder} lacks the part {name!r} that its model_index.json names; {AGAIN}")
        if not any(word in kind for word in WITHOUT_WEIGHTS):
            check_weights(folder / name, variant)
        elif kind.endswith("Scheduler") and not (folder / name / "scheduler_config.json").is_file():
            raise ValueError(f"model: {folder / name} lacks scheduler_config.json; {AGAIN}")


def parts_in(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class of each part of a pipeline folder."""
    entries = read_json(folder / INDEX).items()
    return {name: (entry[0], entry[1]) for name, entry in entries if isinstance(entry, list) and entry[0] is not None}


def networks_in(folder: Path) -> dict[str, tuple[str, str]]:
    """Those of them that have weights and are of diffusers or transformers."""
    known = ("diffusers", "transformers")
    return {name: (lib, kind) for name, (lib, kind) in parts_in(folder).items() if lib in known and not any(word in kind for word in WITHOUT_WEIGHTS)}


def check_weights(part: Path, variant: str | None = None) -> None:
    """Raises ValueError unless a network's folder has a configuration and whole safetensors files, those of `variant` if it has any."""
    if not (part / "config.json").is_file():
        raise ValueError(f"model: {part} lacks config.json; {AGAIN}")
    there = variants_in(part)
    if not there:
        name = f"{_stem(part)}.safetensors"
        if pickle := next((file.name for file in sorted(part.iterdir()) if file.suffix in PICKLES), None):
            raise ValueError(
                f"model: {part / name} is missing, and {pickle} beside it is a pickle, which is never opened; download the model's safetensors, or convert it "
                "where you trust it: load it in diffusers and save_pretrained(FOLDER)"
            )
        raise ValueError(f"model: {part / name} is missing; {AGAIN}")
    if _chosen(there, variant) not in there:
        others = sorted(str(name) for name in there)
        raise ValueError(
            f"model: {part} holds the variant {' and '.join(others)} alone, {there[others[0]]}; load it with --variant {others[0]} (variant={others[0]!r})"
        )
    for file in _files(part, there[_chosen(there, variant)]):
        if not file.is_file():
            raise ValueError(f"model: {file} is missing, which the index beside it names; {AGAIN}")
        check_whole(file)


def variants_in(part: Path) -> dict[str | None, str]:
    """The variants of a network's weights, None for those without a word in their names, with the file (or the index of shards) of each."""
    stem, found = re.escape(_stem(part)), {}
    single, index = re.compile(rf"{stem}(?:\.(\w+))?\.safetensors"), re.compile(rf"{stem}\.safetensors\.index(?:\.(\w+))?\.json")
    for file in sorted(part.iterdir()):
        for pattern in (index, single):
            if match := pattern.fullmatch(file.name):
                found[match.group(1)] = file.name
    return found


def load_network(folder: Path, name: str, dtype: torch.dtype, variant: str | None = None) -> nn.Module:
    """A network of a pipeline folder in `dtype`, in eval mode. Raises ValueError for a class that is not installed and for tensors that its files lack: the
    libraries would fill these with random numbers.
    """
    library, kind = parts_in(folder)[name]
    made: Any = getattr(import_module(library), kind, None)
    if made is None:
        raise ValueError(f"model: the {name} of {folder} is a {kind}, which the installed {library} does not have; update it, or choose another model")
    chosen = _chosen(variants_in(folder / name), variant)
    given = {"variant": chosen} if chosen else {}
    try:
        network, info = made.from_pretrained(folder / name, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True, **given)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"model: {folder / name} cannot be loaded as a {kind}: {_first_line(error)}; {AGAIN}") from error
    wrong = sorted(map(str, info["missing_keys"])) or [str(entry[0]) for entry in info["mismatched_keys"]]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"model: {folder / name} lacks {', '.join(wrong[:3])}{more}, which a {kind} of its config.json has; {AGAIN}")
    return network.eval()


def _chosen(there: Mapping[str | None, str], variant: str | None) -> str | None:
    """The variant that is loaded: the one that was asked for where there is one, as in diffusers."""
    return variant if variant in there else None


def _files(part: Path, name: str) -> list[Path]:
    """The safetensors of a single file, or those that an index names."""
    if not name.endswith(".json"):
        return [part / name]
    weights = read_json(part / name).get("weight_map", {})
    return [part / file for file in dict.fromkeys(weights.values())]


def _stem(part: Path) -> str:
    """How diffusers (`_class_name` in config.json) and transformers begin the names of weights."""
    return "diffusion_pytorch_model" if read_json(part / "config.json").get("_class_name") else "model"


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."
