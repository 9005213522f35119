"""Published weights that are pickles, to safetensors: once, by the user, on purpose. torch reads them with `weights_only`, so no code of a file runs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instep.core.files import atomic_file
from instep.core.outputs import check_output
from instep.core.tensor_file import Entry, file_parts, write_parts
from instep.rewards.convert_qwen import prepared, save_beside
from instep.rewards.image_reward import BlipScorer
from instep.rewards.published_names import blip_of_image_reward, blip_settings, clip_of_open_clip, mismatch
from instep.rewards.score_head import ScoreHead

# of a base: configuration, tokenizer and preprocessing
BESIDE = ("*.json", "*.txt")


def convert(file: Path, to: Path, base: Path | None = None, instruction: Path | None = None) -> str:
    """Writes the weights of `file` into the folder `to` under the names of the networks here, beside the configuration and tokenizer of `base`.

    What the file holds is told by the names in it: a CLIP of open_clip (HPSv2, DFN-CLIP), a CLIP of transformers, ImageReward, the head of the aesthetic
    predictor, HPSv3 or VideoAlign; the last two need the Python file with the authors' `instruction`, which is parsed and not run.
    Returns what it was. Raises ValueError for other files, for a base that is missing or does not fit, and where `to` holds weights already.
    """
    weights = read_weights(file)
    names = weights.keys()
    if "layers.0.weight" in names:
        return _head(weights, to)
    if "blip.visual_encoder.cls_token" in names:
        return _image_reward(weights, to, base)
    if "visual.conv1.weight" in names:
        return _clip(_renamed(clip_of_open_clip, weights, file), to, base or file.parent, "a CLIP of open_clip")
    if "vision_model.embeddings.class_embedding" in names:
        return _clip(weights, to, base or file.parent, "a CLIP of transformers")
    if any("rm_head." in name for name in names):
        return _qwen(weights, file, to, base, instruction)
    some = ", ".join(list(names)[:3])
    raise ValueError(
        f"file: {file} is none of the files that are known (its weights begin {some}); allowed: HPSv2's, DFN-CLIP's or another CLIP's, ImageReward's, the head "
        "of the aesthetic predictor, HPSv3's and VideoAlign's"
    )


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a pickle, on the CPU, those of a nested `state_dict` or `model` too. Raises ValueError for what is none."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise ValueError(f"file: {file} does not exist; give the file of published weights")
    try:
        found: Any = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"file: {file} cannot be read as plain weights ({reason}); nothing but tensors is read, download it again") from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"file: {file} holds no table of tensors; give the file of published weights")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def _renamed(rename: Any, weights: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    try:
        return rename(weights)
    except KeyError as error:
        raise ValueError(f"file: {file} holds {error.args[0]!r}, which no network that is known has; give the published file") from error


def _clip(weights: dict[str, Tensor], to: Path, base: Path, what: str) -> str:
    from transformers import CLIPConfig, CLIPModel

    weights = {name: value for name, value in weights.items() if not name.endswith("position_ids")}
    _check_base(base, ("config.json", "*processor_config.json", "tokenizer_config.json"), "a CLIP with the same architecture")
    with torch.device("meta"):
        network = CLIPModel(CLIPConfig.from_pretrained(base, local_files_only=True))
    if wrong := mismatch(weights, network):
        raise ValueError(f"base: {base} is not of the file's architecture ({wrong}); give a CLIP with the same architecture")
    _write(to, weights, base)
    return what


def _image_reward(weights: dict[str, Tensor], to: Path, base: Path | None) -> str:
    from transformers import BlipConfig

    renamed = blip_of_image_reward(weights)
    vision, text = blip_settings(renamed)
    config = BlipConfig(vision_config=vision, text_config=text)
    with torch.device("meta"):
        network = BlipScorer(config)
    if wrong := mismatch(renamed, network):
        raise ValueError(f"file: it is not ImageReward as it was published ({wrong}); download it again")
    if base is None:
        raise ValueError("base: none was given, and ImageReward reads prompts with BERT's tokenizer; give the folder of bert-base-uncased, --base FOLDER")
    _check_base(base, ("tokenizer_config.json",), "the folder of bert-base-uncased")
    check_output("to", to / "model.safetensors")
    to.mkdir(parents=True, exist_ok=True)
    for pattern in ("tokenizer*", "vocab.txt", "special_tokens_map.json"):
        _copy(base, to, pattern)
    config.save_pretrained(to)
    _write_tensors(to / "model.safetensors", renamed)
    return "ImageReward"


def _head(weights: dict[str, Tensor], to: Path) -> str:
    if wrong := mismatch(weights, ScoreHead(weights["layers.0.weight"].shape[1])):
        raise ValueError(f"file: it is not the head of the aesthetic predictor ({wrong}); give sac+logos+ava1-l14-linearMSE.pth")
    check_output("to", to / "head.safetensors")
    _write_tensors(to / "head.safetensors", weights)
    return "the head of the aesthetic predictor"


def _qwen(weights: dict[str, Tensor], file: Path, to: Path, base: Path | None, instruction: Path | None) -> str:
    if base is None:
        raise ValueError("base: none was given; give the Qwen2-VL that the file was trained from, configuration and tokenizer, --base FOLDER")
    _check_base(base, ("config.json", "tokenizer_config.json"), "the Qwen2-VL that the file was trained from")
    what, renamed, config, tokenizer, record = prepared(weights, file, base, instruction)
    check_output("to", to / "model.safetensors")
    to.mkdir(parents=True, exist_ok=True)
    save_beside(to, config, tokenizer, record)
    _write_tensors(to / "model.safetensors", renamed)
    return what


def _write_tensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """A tensor at a time, whole or not at all: such files hold gigabytes."""
    with atomic_file(path, "file") as temporary:
        write_parts(temporary, file_parts({name: Entry.of(value.detach().contiguous()) for name, value in weights.items()}))


def _check_base(base: Path, files: tuple[str, ...], what: str) -> None:
    if missing := next((name for name in files if not any(base.glob(name))), None):
        raise ValueError(f"base: {base} has no {missing}; give {what}, --base FOLDER")


def _copy(base: Path, to: Path, pattern: str) -> None:
    for path in sorted(base.glob(pattern)):
        if path.resolve() != (to / path.name).resolve():
            shutil.copyfile(path, to / path.name)


def _write(to: Path, weights: Mapping[str, Tensor], base: Path) -> None:
    """The files beside the weights first: a folder without weights is refused."""
    check_output("to", to / "model.safetensors")
    to.mkdir(parents=True, exist_ok=True)
    for pattern in BESIDE:
        _copy(base, to, pattern)
    # an index of the base's own weights would lead to files that are not here
    (to / "model.safetensors.index.json").unlink(missing_ok=True)
    _write_tensors(to / "model.safetensors", weights)
