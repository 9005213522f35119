"""A vision-language model of transformers in this process, in place of the server of `vlm.OpenAIEndpoint`."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from instep.core.fingerprint import weights_fingerprint
from instep.core.quiet import quiet

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class TransformersEndpoint:
    """An image-text-to-text model and its processor; answers greedily, so that the same question always gets the same answer (retries are useless).

    `name` contains the model, its weights' fingerprint and the precision.
    """

    network: Any
    processor: Any
    name: str
    max_new_tokens: int = 64

    def ask(self, content: Sequence[dict[str, Any]]) -> str:
        """The answer's text, stripped of special tokens. ValueError for a part that is neither text nor an image within a data URL."""
        given = self.inputs(content)
        with torch.no_grad():
            output = self.network.generate(**given, max_new_tokens=self.max_new_tokens)
        return self.processor.batch_decode(output[:, given["input_ids"].shape[1] :], skip_special_tokens=True)[0]

    def inputs(self, content: Sequence[dict[str, Any]]) -> Any:
        """What the network is given for a message, up to where its answer begins."""
        images: list[Any] = []
        parts = [_part(part, images) for part in content]
        # the template writes special tokens itself: the tokenizer must not add them again
        text = self.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False)
        given = self.processor(text=[text], images=[images] if images else None, add_special_tokens=False, return_tensors="pt")
        return given.to(self.network.device, self.network.dtype)

    def tokens_of(self, answer: str) -> list[int]:
        """The tokens of an answer as the network would write it, with one that ends it. ValueError where no token does."""
        ends = self.network.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        own = self.processor.tokenizer.eos_token_id
        if not ends:
            raise ValueError(f"model: {self.name} names no token that ends an answer; give one whose generation_config.json has eos_token_id")
        end = own if own in ends else ends[0]
        return [*self.processor.tokenizer(answer, add_special_tokens=False)["input_ids"], end]


def transformers_endpoint(model: str, device: str = "cpu", dtype: Dtype = "bfloat16", max_new_tokens: int = 64) -> TransformersEndpoint:
    """Loads a local folder or a model of the hub: weights as safetensors, never code of the model's own. ValueError for what cannot be loaded."""
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype: {dtype!r} is not allowed; use one of {', '.join(get_args(Dtype))}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens} is not allowed; it is 1 or more")
    try:
        with quiet():
            processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
            network = AutoModelForImageTextToText.from_pretrained(model, use_safetensors=True, trust_remote_code=False, dtype=getattr(torch, dtype))
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model: {model!r} cannot be loaded ({reason}); give the folder of an image-text-to-text model with .safetensors") from error
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"model: {model!r} has no chat template, so it cannot be asked; give one that was tuned to follow instructions")
    # of the generation config only the start and end tokens are kept: penalties and forbidden repetitions could suppress an option
    own = network.generation_config
    network.generation_config = GenerationConfig(do_sample=False, bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    network.eval().requires_grad_(False).to(device)
    # the template and the image preprocessing change answers just as weights do
    image_processor = getattr(processor, "image_processor", None)
    asked = (processor.chat_template, sorted(processor.tokenizer.get_vocab().items()), image_processor and image_processor.to_json_string())
    read = hashlib.sha256(repr((weights_fingerprint(network), *asked)).encode()).hexdigest()[:16]
    return TransformersEndpoint(network, processor, f"{Path(model).name} {read}, {dtype}", max_new_tokens)


def _part(part: dict[str, Any], images: list[Any]) -> dict[str, Any]:
    """A part of a message of the OpenAI interface as chat templates read it; its image is decoded and appended to `images`."""
    from PIL import Image

    if part.get("type") == "text":
        return {"type": "text", "text": part["text"]}
    url = part["image_url"]["url"] if part.get("type") == "image_url" else ""
    head, _, data = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        raise ValueError(f"content: a part of type {part.get('type')!r} is not allowed; text, or image_url with a data URL")
    images.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    return {"type": "image", "image": images[-1]}
