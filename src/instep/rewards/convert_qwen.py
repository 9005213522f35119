"""HPSv3's and VideoAlign's published files as one folder: weights under the names of `qwen_scorer.QwenScorer`, tokenizer, instruction and settings."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instep.core.files import write_json
from instep.core.json_files import read_object
from instep.rewards.published_names import mismatch
from instep.rewards.qwen_scorer import RECORD, QwenScorer

# Qwen2-VL's layouts in older files
LAYOUT = ((r"^visual\.", "model.visual."), (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."))
# VideoAlign: the least pixels of a frame are in its code alone, and so are the moments where its configuration lacks them
LEAST_PIXELS = 128 * 28 * 28
NORMAL = {"vq": (3.6757, 2.2476), "mq": (1.1646, 1.3811), "ta": (2.8105, 2.5121)}
HPSV3_PIXELS = 256 * 28 * 28
INSTRUCTIONS = {"HPSv3": ("INSTRUCTION", "prompt_with_special_token"), "VideoAlign": ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",)}
SPECIAL = {"HPSv3": ["<|Reward|>"], "VideoAlign": ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]}


def prepared(weights: Mapping[str, Tensor], file: Path, base: Path, instruction: Path | None) -> tuple[str, dict[str, Tensor], Any, Any, dict[str, Any]]:
    """What the file is, its weights renamed (LoRA merged), configuration, tokenizer and record. Raises ValueError for what is missing or does not fit."""
    from transformers import AutoTokenizer, Qwen2VLConfig

    settings = _settings(file)
    scale = _lora_scale(settings)
    if scale is None and any(".lora_A." in name for name in weights):
        raise ValueError(f"file: {file} holds a LoRA, and no model_config.json beside it or above tells its scale; give the published folder")
    renamed = scorer_of_published(weights, scale or 0.0)
    what = "VideoAlign" if "rm_head.weight" in renamed else "HPSv3"
    if instruction is None:
        names = " and ".join(INSTRUCTIONS[what])
        raise ValueError(f"instruction: none was given, and {what} was trained with one; give the authors' file that holds {names}, --instruction FILE")
    text = constants_in(instruction, INSTRUCTIONS[what])
    config: Any = Qwen2VLConfig.from_pretrained(base, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ValueError(f"base: {base} has no chat template beside its tokenizer; give Qwen2-VL's own folder")
    tokenizer.add_tokens(SPECIAL[what], special_tokens=True)
    config.text_config.vocab_size = renamed["model.language_model.embed_tokens.weight"].shape[0]
    head = [value.shape for name, value in renamed.items() if name.startswith("rm_head.") and value.ndim == 2]
    hidden = None if what == "VideoAlign" else (head[0][0], head[1][0])
    with torch.device("meta"):
        network = QwenScorer(config, head[-1][0], hidden)
    if wrong := mismatch(renamed, network):
        raise ValueError(f"base: {base} is not of the file's architecture ({wrong}); give the Qwen2-VL that it was trained from")
    data, moments = settings.get("data_config", {}), settings.get("inference_config", {})
    record: dict[str, Any] = {"outputs": head[-1][0], "hidden": hidden, "instruction": text, "special": SPECIAL[what]}
    if what == "HPSv3":
        return what, renamed, config, tokenizer, record | {"pixels": [HPSV3_PIXELS, HPSV3_PIXELS]}
    normal = {part: [moments.get(f"{part.upper()}_mean", mean), moments.get(f"{part.upper()}_std", std)] for part, (mean, std) in NORMAL.items()}
    pixels = [min(LEAST_PIXELS, data.get("max_frame_pixels", LEAST_PIXELS)), data.get("max_frame_pixels", 200704)]
    return what, renamed, config, tokenizer, record | {"pixels": pixels, "fps": data.get("fps", 2), "normal": normal}


def save_beside(to: Path, config: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    """Everything but the weights."""
    config.save_pretrained(to)
    tokenizer.save_pretrained(to)
    write_json(to / RECORD, record)


def scorer_of_published(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The names of `QwenScorer`. A LoRA is merged, W + `scale` B A, computed in float32; the language head is left out."""
    plain = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
    out: dict[str, Tensor] = {}
    for name, value in plain.items():
        if re.search(r"\.lora_[AB]\.|\.original_module\.|^lm_head\.", name):
            continue
        own = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        stem = name.removesuffix(".base_layer.weight")
        if stem != name and f"{stem}.lora_A.default.weight" in plain:
            a, b = (plain[f"{stem}.lora_{side}.default.weight"].float() for side in "AB")
            value = (value.float() + scale * (b @ a)).to(value.dtype)
        for pattern, to in LAYOUT:
            own = re.sub(pattern, to, own)
        out[own] = value
    return out


def constants_in(file: Path, names: tuple[str, ...]) -> str:
    """The texts that a Python file assigns to names, one after another; the file is parsed and never run. ValueError where it lacks one."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"instruction: {file} cannot be read as a Python file ({error}); give the authors' file") from error
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"instruction: {file} assigns no text to {missing[0]}; give the authors' file, which does")
    return "".join(found[name] for name in names)


def _settings(file: Path) -> dict[str, Any]:
    """The authors' configuration beside the file or a folder above it; empty where there is none."""
    for place in (file.parent, file.parent.parent):
        if (place / "model_config.json").is_file():
            return read_object(place / "model_config.json", "source", "download it again")
    return {}


def _lora_scale(settings: dict[str, Any]) -> float | None:
    lora = settings.get("peft_lora_config", {})
    return float(lora["lora_alpha"]) / float(lora["lora_r"]) if "lora_alpha" in lora and "lora_r" in lora else None
